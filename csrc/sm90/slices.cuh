// How the consumers of a CTA learn from its producer which slices it computes.
#pragma once

#include "common/slices.cuh"
#include "sm90/matrix.cuh"

namespace sparse_attn::sm90 {

template <int kConsumerWarps>
class SliceRing {
  // The producer may be a slice ahead.
  using Numbers = Ring<2, 8, kConsumerWarps>;

 public:
  static constexpr int kBytes = Numbers::kBytes + Numbers::kBarrierBytes;

  // `base` is a multiple of 8.
  __device__ explicit SliceRing(std::uint32_t base) : numbers_(base, base + Numbers::kBytes) {}

  // By one thread, as `Ring::init`.
  __device__ void init() const { numbers_.init(); }

  // By the producer warp: calls `compute` with each slice as a tile, and which one of the CTA's it
  // is.
  template <class Compute>
  __device__ void produce(const Slices& slices, Compute compute) const {
    int step = 0;
    for (int slice = Slices::first(); slices.has(slice); slice = take(slices)) {
      const Tile tile = slices.tile(slice);
      if (tile.num_rows <= 0) continue;
      send(slice, step);
      compute(tile, step++);
    }
    send(kEnd, step);
  }

  // By the consumers, the same.
  template <class Compute>
  __device__ void consume(const Slices& slices, Compute compute) const {
    for (int step = 0;; ++step) {
      numbers_.wait_full(step);
      const int slice = ptx::load_shared<int>(numbers_.stage(step));
      numbers_.release(step);
      if (slice == kEnd) return;
      compute(slices.tile(slice), step);
    }
  }

 private:
  static constexpr int kEnd = -1;

  __device__ static int take(const Slices& slices) {
    const int slice = ptx::lane_index() == 0 ? slices.take() : 0;
    return ptx::shuffle(slice, 0);
  }
  __device__ void send(int slice, int step) const {
    if (ptx::lane_index() != 0) return;
    numbers_.wait_empty(step);
    ptx::store_shared(numbers_.stage(step), slice);
    ptx::mbarrier_arrive(numbers_.full(step));
  }

  Numbers numbers_;
};

}  // namespace sparse_attn::sm90
