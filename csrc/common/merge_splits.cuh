// The results of several splits of the keys become one.
#pragma once

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "params.h"

namespace sparse_attn {

template <class T_>
struct MergeSplitsConfig {
  using T = T_;
  static constexpr int kThreads = 128;
  static constexpr std::uint32_t kSharedBytes = 0;
};

// A warp has a row, which is a query token and head.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    merge_splits(const __grid_constant__ PagedAttentionParams p) {
  using T = typename Config::T;
  const int lane = ptx::lane_index();
  const std::int64_t batch_rows = static_cast<std::int64_t>(p.q_len) * p.num_q_heads,
                     row = static_cast<std::int64_t>(blockIdx.x) * (Config::kThreads / 32) +
                           ptx::warp_index(),
                     batch = row / batch_rows;
  if (batch >= p.batch) return;
  // Of the row in split 0; those of the other splits follow at distances of `batch_rows`.
  const std::int64_t first = batch * (p.num_splits - 1) * batch_rows + row;
  const auto lse_of = [&](int split) {
    return ptx::load_global(p.partial_lse_log2 + first + split * batch_rows);
  };

  float maximum = -INFINITY;
  for (int split = lane; split < p.num_splits; split += 32) maximum = fmaxf(maximum, lse_of(split));
  for (int distance = 16; distance > 0; distance /= 2)
    maximum = fmaxf(maximum, ptx::shuffle_xor(maximum, distance));
  const float shift = maximum == -INFINITY ? 0 : maximum;
  float sum = 0;
  for (int split = lane; split < p.num_splits; split += 32)
    sum += ptx::exp2_approx(lse_of(split) - shift);
  for (int distance = 16; distance > 0; distance /= 2) sum += ptx::shuffle_xor(sum, distance);
  const float factor = sum == 0 ? 0 : 1 / sum;

  for (int column = 2 * lane; column < p.head_dim; column += 64) {
    float low = 0, high = 0;
    for (int split = 0; split < p.num_splits; ++split) {
      const float lse = lse_of(split);
      if (lse == -INFINITY) continue;  // nothing was stored
      const float weight = ptx::exp2_approx(lse - shift) * factor;
      const float* x = p.partial_out + (first + split * batch_rows) * p.head_dim + column;
      low += ptx::load_global(x) * weight;
      high += ptx::load_global(x + 1) * weight;
    }
    ptx::store_global(static_cast<std::uint32_t*>(p.out) + (row * p.head_dim + column) / 2,
                      ptx::pack<T>(low, high));
  }
  if (lane == 0)
    ptx::store_global(p.lse + row, sum == 0 ? -INFINITY : (maximum + ptx::log2_approx(sum)) * kLn2);
}

}  // namespace sparse_attn
