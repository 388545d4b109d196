// How the CTAs of a kernel share its pieces of work.
//
// There are as many CTAs as run at the same time, and each stays for many pieces. Its first one is
// that of its own number; then it takes from a counter that all CTAs share, because lists are
// ragged and no fixed share would be a fair one. Pieces are numbered so that long ones come first.
// Which CTA computes a piece changes nothing in the results.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace sparse_attn {

class WorkQueue {
 public:
  // `num_taken`: how many pieces CTAs have taken; 0 when the kernel starts. There are `count`, at
  // most INT32_MAX less the number of CTAs, which the launch has checked.
  __device__ WorkQueue(int* num_taken, std::int64_t count)
      : num_taken_(num_taken), count_(static_cast<int>(count)) {}

  __device__ static int first() { return static_cast<int>(blockIdx.x); }
  // By one thread of the CTA.
  __device__ int take() const {
    return static_cast<int>(gridDim.x) + ptx::atomic_add_global(num_taken_, 1);
  }
  // By a warp, for all of its lanes.
  __device__ int take_by_warp() const {
    return ptx::shuffle(ptx::lane_index() == 0 ? take() : 0, 0);
  }
  __device__ bool has(int piece) const { return piece < count_; }
  // Whether there is nothing to compute.
  __device__ static bool is_empty(int) { return false; }

 private:
  int* num_taken_;
  int count_;
};

}  // namespace sparse_attn
