// Gradients of keys and values whose lists were split: the sums of the parts.
#pragma once

#include "common/inverse.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "params.h"

namespace sparse_attn {

template <class T_, int kHeadDim_>
struct SumPartialsConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
};

// Sums the parts of the blocks whose lists were split. A CTA has a block, a warp a key.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    sum_partials(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim, kWidth = kPartialWidth<kHeadDim>;
  const AttentionShape& shape = p.in.shape;
  const int block = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y),
            batch = static_cast<int>(blockIdx.z), lane = ptx::lane_index();
  const InverseList list = InverseList::of_block(p.in, p.inverse, batch, kv_head, block);
  if (!list.exists() || list.is_whole()) return;
  for (int i = ptx::warp_index(); i < shape.kv_block_size; i += Config::kThreads / 32) {
    const int key = block * shape.kv_block_size + i;
    if (key >= shape.kv_len) return;
    const float* from = p.partials + list.partial_row(shape, p.inverse, key) * kWidth;
    const std::int64_t stride = static_cast<std::int64_t>(shape.kv_block_size) * kWidth;
    const auto sum = [&](int element) {
      float total = 0;
      for (int part = 0; part < list.num_parts(); ++part)
        total += ptx::load_global(from + part * stride + element);
      return total;
    };
    const std::int64_t row = key_row(shape, batch, kv_head, key) * (kHeadDim / 2);
    for (int pair = lane; pair < kHeadDim / 2; pair += 32) {
      ptx::store_global(static_cast<std::uint32_t*>(p.d_key) + row + pair,
                        ptx::pack<T>(sum(2 * pair) * p.in.scale, sum(2 * pair + 1) * p.in.scale));
      ptx::store_global(static_cast<std::uint32_t*>(p.d_value) + row + pair,
                        ptx::pack<T>(sum(kHeadDim + 2 * pair), sum(kHeadDim + 2 * pair + 1)));
    }
    if (p.d_key_bias != nullptr && lane == 0)
      ptx::store_global(p.d_key_bias + bias_offset(shape, batch, kv_head, key), sum(2 * kHeadDim));
  }
}

template <class Config>
struct PartialSums {
  static Status run(const AttentionBackwardParams& p, const LaunchContext& context) {
    if (p.inverse.num_partials == 0) return {};
    const AttentionShape& shape = p.in.shape;
    return launch<Config>(&sum_partials<Config>,
                          {num_kv_blocks(shape), shape.num_kv_heads, shape.batch}, p, context);
  }
};

}  // namespace sparse_attn
