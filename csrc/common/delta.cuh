// What the gradients of a row's logits have in common: delta = sum(out * d_out) - d_lse.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "params.h"

namespace sparse_attn {

template <class T_, int kHeadDim_>
struct DeltaConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, of a row
  static constexpr int kLanes = kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;  // that have a row
  static constexpr int kThreads = 256, kRows = kThreads / kLanes;
  static constexpr int kSharedBytes = 0;
  static_assert(kHeadDim % 8 == 0 && kPieces <= kLanes);
};

// A lane has 16 bytes of a row.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    row_deltas(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename Config::T;
  struct alignas(16) Piece {
    T x[8];
  };
  const AttentionShape& shape = p.in.shape;
  const std::int64_t rows =
                         static_cast<std::int64_t>(shape.batch) * shape.q_len * shape.num_q_heads,
                     row = static_cast<std::int64_t>(blockIdx.x) * Config::kRows +
                           static_cast<int>(threadIdx.x) / Config::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % Config::kLanes;
  float sum = 0;
  if (row < rows && lane < Config::kPieces) {
    const std::int64_t at = row * Config::kPieces + lane;
    const Piece out = ptx::load_global(static_cast<const Piece*>(p.out) + at),
                d_out = ptx::load_global(static_cast<const Piece*>(p.d_out) + at);
    SPARSE_ATTN_UNROLL
    for (int i = 0; i < 8; ++i) sum += ptx::to_float(out.x[i]) * ptx::to_float(d_out.x[i]);
  }
  SPARSE_ATTN_UNROLL
  for (int distance = Config::kLanes / 2; distance > 0; distance /= 2)
    sum += ptx::shuffle_xor(sum, distance);
  if (row < rows && lane == 0)
    ptx::store_global(p.delta + row, sum - ptx::load_global(p.d_lse + row));
}

template <class Config>
struct Deltas {
  static Status run(const AttentionBackwardParams& p, const LaunchContext& context) {
    const AttentionShape& shape = p.in.shape;
    const std::int64_t rows =
        static_cast<std::int64_t>(shape.batch) * shape.q_len * shape.num_q_heads;
    return launch<Config>(&row_deltas<Config>, {(rows + Config::kRows - 1) / Config::kRows, 1, 1},
                          p, context);
  }
};

}  // namespace sparse_attn
