// The work of a kernel that is query-major: slices of query tiles.
#pragma once

#include "common/tile.cuh"
#include "common/work_queue.cuh"
#include "params.h"

namespace sparse_attn {

class Slices : public WorkQueue {
 public:
  static constexpr const char* kKind =
      "slices of query tiles (batch * num_kv_heads * q_len * group size / rows of a slice)";

  __device__ Slices(const AttentionInputs& in, int* num_taken, int rows)
      : WorkQueue(num_taken, count(in, rows)), in_(in), rows_(rows) {}

  __host__ __device__ static std::int64_t count(const AttentionInputs& in, int rows) {
    return static_cast<std::int64_t>(in.shape.batch) * in.shape.num_kv_heads * per_head(in, rows);
  }

  // All slices of a head follow each other, because they share keys; later ones first, as they see
  // more of them.
  __device__ Tile tile(int slice) const {
    const auto slices = static_cast<int>(per_head(in_, rows_));
    const int pair = slice / slices;
    return Tile(in_.shape, in_.plan, rows_, pair / in_.shape.num_kv_heads,
                pair % in_.shape.num_kv_heads, slices - 1 - slice % slices);
  }
  __device__ bool is_empty(int slice) const { return tile(slice).num_rows <= 0; }

 private:
  __host__ __device__ static std::int64_t per_head(const AttentionInputs& in, int rows) {
    return static_cast<std::int64_t>(in.plan.num_tiles) *
           Tile::slices_per_tile(in.shape, in.plan, rows);
  }

  const AttentionInputs& in_;
  int rows_;
};

}  // namespace sparse_attn
