// How the CTAs of a kernel that is query-major share the slices of query tiles.
//
// A CTA stays for many slices. Its first one is that of its own number; then it takes from a
// counter that all CTAs share, because lists are ragged and no fixed share would be a fair one.
// Slices that see most come first. Which CTA computes a slice changes nothing in the results.
#pragma once

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "params.h"

namespace sparse_attn {

class Slices {
 public:
  // `num_taken`: how many slices CTAs have taken; 0 when the kernel starts.
  __device__ Slices(const AttentionInputs& in, int* num_taken, int rows)
      : in_(in), num_taken_(num_taken), rows_(rows), count_(static_cast<int>(count(in, rows))) {}

  // At most INT32_MAX less the number of CTAs, which the launch has checked.
  __host__ __device__ static std::int64_t count(const AttentionInputs& in, int rows) {
    return static_cast<std::int64_t>(in.shape.batch) * in.shape.num_kv_heads * per_head(in, rows);
  }

  __device__ static int first() { return static_cast<int>(blockIdx.x); }
  // By one thread of the CTA.
  __device__ int take() const {
    return static_cast<int>(gridDim.x) + ptx::atomic_add_global(num_taken_, 1);
  }
  __device__ bool has(int slice) const { return slice < count_; }

  // All slices of a head follow each other, because they share keys; later ones first, as they see
  // more of them.
  __device__ Tile tile(int slice) const {
    const auto slices = static_cast<int>(per_head(in_, rows_));
    const int pair = slice / slices;
    return Tile(in_.shape, in_.plan, rows_, pair / in_.shape.num_kv_heads,
                pair % in_.shape.num_kv_heads, slices - 1 - slice % slices);
  }

 private:
  __host__ __device__ static std::int64_t per_head(const AttentionInputs& in, int rows) {
    return static_cast<std::int64_t>(in.plan.num_tiles) *
           Tile::slices_per_tile(in.shape, in.plan, rows);
  }

  const AttentionInputs& in_;
  int* num_taken_;
  int rows_, count_;
};

}  // namespace sparse_attn
