// How the consumers of a CTA learn from its producer which pieces of work it computes.
#pragma once

#include "common/work_queue.cuh"
#include "sm90/matrix.cuh"

namespace sparse_attn::sm90 {

template <int kConsumerWarps>
class PieceRing {
  // The producer may be a piece ahead.
  using Numbers = Ring<2, 8, kConsumerWarps>;

 public:
  static constexpr int kBytes = Numbers::kBytes + Numbers::kBarrierBytes;

  // `base` is a multiple of 8.
  __device__ explicit PieceRing(std::uint32_t base) : numbers_(base, base + Numbers::kBytes) {}

  // By one thread, as `Ring::init`.
  __device__ void init() const { numbers_.init(); }

  // By the producer warp: calls `compute` with each piece, and which one of the CTA's it is.
  template <class Queue, class Compute>
  __device__ void produce(const Queue& queue, Compute compute) const {
    int step = 0;
    for (int piece = Queue::first(); queue.has(piece); piece = queue.take_by_warp()) {
      if (queue.is_empty(piece)) continue;
      send(piece, step);
      compute(piece, step++);
    }
    send(kEnd, step);
  }

  // By the consumers, the same.
  template <class Compute>
  __device__ void consume(Compute compute) const {
    for (int step = 0;; ++step) {
      numbers_.wait_full(step);
      const int piece = ptx::load_shared<int>(numbers_.stage(step));
      numbers_.release(step);
      if (piece == kEnd) return;
      compute(piece, step);
    }
  }

 private:
  static constexpr int kEnd = -1;

  __device__ void send(int piece, int step) const {
    if (ptx::lane_index() != 0) return;
    numbers_.wait_empty(step);
    ptx::store_shared(numbers_.stage(step), piece);
    ptx::mbarrier_arrive(numbers_.full(step));
  }

  Numbers numbers_;
};

}  // namespace sparse_attn::sm90
