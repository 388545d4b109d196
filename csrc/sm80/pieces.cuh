// How the threads of a CTA learn which piece of work comes next.
#pragma once

#include "common/ptx.cuh"
#include "common/work_queue.cuh"

namespace sparse_attn::sm80 {

// One thread takes the piece, in time for the counter's answer to be there when it is needed, and
// tells the others.
class NextPiece {
 public:
  static constexpr int kBytes = 16;

  __device__ explicit NextPiece(std::uint32_t address) : address_(address) {}

  __device__ void take(const WorkQueue& queue) {
    if (threadIdx.x == 0) taken_ = queue.take();
  }
  // By all threads, once after each `take`; they have left the piece before.
  __device__ int share() {
    address_ ^= 4;  // so that nobody still reads the place that is written
    if (threadIdx.x == 0) ptx::store_shared(address_, taken_);
    ptx::sync_threads();
    return ptx::load_shared<int>(address_);
  }

 private:
  std::uint32_t address_;
  int taken_ = 0;
};

}  // namespace sparse_attn::sm80
