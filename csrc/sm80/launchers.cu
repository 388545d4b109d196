// The variants of compute capability 8.0 that are compiled.
#include <algorithm>

#include "common/launch.cuh"
#include "common/variants.cuh"
#include "sm80/attention_backward.cuh"
#include "sm80/attention_forward.cuh"

namespace sparse_attn::sm80 {
namespace {

std::int64_t num_kv_blocks(const AttentionShape& shape) {
  return (std::int64_t{shape.kv_len} + shape.kv_block_size - 1) / shape.kv_block_size;
}

Grid grid_of(std::int64_t x, const AttentionInputs& in) {
  return {x, in.shape.num_kv_heads, in.shape.batch};
}

template <class Config>
struct Forward {
  static Status run(const AttentionForwardParams& p, const LaunchContext& context) {
    return launch_slices<Config>(&attention_forward<Config>, p.in, p.num_taken, p, context);
  }
};

template <class Config>
struct QueryGradient {
  static Status run(const AttentionBackwardParams& p, const LaunchContext& context) {
    return launch_slices<Config>(&query_gradient<Config>, p.in, p.num_taken, p, context);
  }
};

template <class Config>
struct KeyGradients {
  static Status run(const AttentionBackwardParams& p, const LaunchContext& context) {
    // Blocks with several parts have at most as many as there is room for their sums.
    const std::int64_t parts = num_kv_blocks(p.in.shape) + p.inverse.num_partials,
                       chunks = parts * (p.in.shape.kv_block_size / Config::kKeys);
    return launch<Config>(&key_gradient<Config>, grid_of(chunks, p.in), p, context);
  }
};

template <class Config>
struct SumPartials {
  static Status run(const AttentionBackwardParams& p, const LaunchContext& context) {
    if (p.inverse.num_partials == 0) return {};
    return launch<Config>(&sum_partials<Config>, grid_of(num_kv_blocks(p.in.shape), p.in), p,
                          context);
  }
};

template <class T, int kHeadDim, int kBlockSize>
struct Variant {
  // Keys of a chunk: a block, or what registers and shared memory hold of it.
  static constexpr int kKeys = std::min(kBlockSize, kHeadDim > 128 ? 32 : 64);
  static constexpr int kOwnKeys = std::min(kBlockSize, 64);

  static constexpr auto forward = Forward<ForwardConfig<T, kHeadDim, kKeys>>::run;

  using OfQuery = QueryGradient<QueryGradientConfig<T, kHeadDim, kKeys>>;
  template <KeyGradient kWhich>
  using OfKey = KeyGradients<KeyGradientConfig<T, kHeadDim, kOwnKeys, kWhich>>;
  using OfParts = SumPartials<SumPartialsConfig<T, kHeadDim>>;
  using Backward = std::conditional_t<
      kHeadDim <= 128, Sequence<OfQuery, OfKey<KeyGradient::kBoth>, OfParts>,
      Sequence<OfQuery, OfKey<KeyGradient::kKey>, OfKey<KeyGradient::kValue>, OfParts>>;
  static constexpr auto backward = Backward::template run<AttentionBackwardParams>;
};

}  // namespace

std::span<const AttentionVariant> attention_variants() {
  static const auto all = list_attention<80, Variant>();
  return all;
}

}  // namespace sparse_attn::sm80
