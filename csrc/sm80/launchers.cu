// The variants of compute capability 8.0 that are compiled.
#include <algorithm>
#include <array>

#include "common/launch.cuh"
#include "sm80/attention_backward.cuh"
#include "sm80/attention_forward.cuh"

namespace sparse_attn::sm80 {
namespace {

Grid grid_of(std::int64_t x, const AttentionInputs& in) {
  return {x, in.shape.num_kv_heads, in.shape.batch};
}

template <class Config>
Grid grid_of_slices(const AttentionInputs& in) {
  const std::int64_t slices = Tile::slices_per_tile(in.shape, in.plan, Config::kRows);
  return grid_of(in.plan.num_tiles * slices, in);
}

std::int64_t num_kv_blocks(const AttentionShape& shape) {
  return (std::int64_t{shape.kv_len} + shape.kv_block_size - 1) / shape.kv_block_size;
}

template <class Config_>
struct Forward {
  using Config = Config_;
  static constexpr auto kKernel = &attention_forward<Config>;
  static Grid grid(const AttentionForwardParams& p) { return grid_of_slices<Config>(p.in); }
};

template <class Config_>
struct QueryGradient {
  using Config = Config_;
  static constexpr auto kKernel = &query_gradient<Config>;
  static Grid grid(const AttentionBackwardParams& p) { return grid_of_slices<Config>(p.in); }
};

template <class Config_>
struct KeyGradients {
  using Config = Config_;
  static constexpr auto kKernel = &key_gradient<Config>;
  static Grid grid(const AttentionBackwardParams& p) {
    // Blocks with several parts have at most as many as there is room for their sums.
    const std::int64_t parts = num_kv_blocks(p.in.shape) + p.inverse.num_partials;
    return grid_of(parts * (p.in.shape.kv_block_size / Config::kKeys), p.in);
  }
};

template <class Config_>
struct SumPartials {
  using Config = Config_;
  static constexpr auto kKernel = &sum_partials<Config>;
  static Grid grid(const AttentionBackwardParams& p) {
    return grid_of(p.inverse.num_partials == 0 ? 0 : num_kv_blocks(p.in.shape), p.in);
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
