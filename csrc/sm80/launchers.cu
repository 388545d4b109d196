// The variants of compute capability 8.0 that are compiled.
#include <algorithm>
#include <array>

#include "common/launch.cuh"
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

  using ForwardKernels = Sequence<Forward<ForwardConfig<T, kHeadDim, kKeys>>>;

  using OfQuery = QueryGradient<QueryGradientConfig<T, kHeadDim, kKeys>>;
  template <KeyGradient kWhich>
  using OfKey = KeyGradients<KeyGradientConfig<T, kHeadDim, kOwnKeys, kWhich>>;
  using OfParts = SumPartials<SumPartialsConfig<T, kHeadDim>>;
  using BackwardKernels = std::conditional_t<
      kHeadDim <= 128, Sequence<OfQuery, OfKey<KeyGradient::kBoth>, OfParts>,
      Sequence<OfQuery, OfKey<KeyGradient::kKey>, OfKey<KeyGradient::kValue>, OfParts>>;
};

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, ptx::BFloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;

template <class T, int kHeadDim, int... kBlockSizes>
void add(std::vector<AttentionVariant>& to) {
  const auto add_one = [&]<int kBlockSize>() {
    using V = Variant<T, kHeadDim, kBlockSize>;
    to.push_back({{80, kDtype<T>, kHeadDim, kBlockSize},
                  V::ForwardKernels::template run<AttentionForwardParams>,
                  V::BackwardKernels::template run<AttentionBackwardParams>});
  };
  (add_one.template operator()<kBlockSizes>(), ...);
}

template <class T>
void add_dtype(std::vector<AttentionVariant>& to) {
  add<T, 64, 16, 32, 64, 128>(to);
  add<T, 96, 16, 32, 64, 128>(to);
  add<T, 128, 16, 32, 64, 128>(to);
  add<T, 256, 16, 32, 64, 128>(to);
}

}  // namespace

std::span<const AttentionVariant> attention_variants() {
  static const std::vector<AttentionVariant> all = [] {
    std::vector<AttentionVariant> made;
    add_dtype<ptx::BFloat16>(made);
    add_dtype<ptx::Float16>(made);
    return made;
  }();
  return all;
}

}  // namespace sparse_attn::sm80
