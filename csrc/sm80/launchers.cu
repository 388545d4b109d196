// The variants of compute capability 8.0 that are compiled.
#include <algorithm>

#include "common/delta.cuh"
#include "common/launch.cuh"
#include "common/partials.cuh"
#include "common/variants.cuh"
#include "sm80/attention_backward.cuh"
#include "sm80/attention_forward.cuh"

namespace sparse_attn::sm80 {
namespace {

template <class Config>
struct Forward {
  static Status run(const AttentionForwardParams& p, const LaunchContext& context) {
    return launch_queue<Config>(&attention_forward<Config>, Slices::count(p.in, Config::kRows),
                                Slices::kKind, p.num_taken, p, context);
  }
};

template <class Config>
struct QueryGradient {
  static Status run(const AttentionBackwardParams& p, const LaunchContext& context) {
    return launch_queue<Config>(&query_gradient<Config>, Slices::count(p.in, Config::kRows),
                                Slices::kKind, p.num_taken, p, context);
  }
};

template <class Config>
struct KeyGradients {
  static Status run(const AttentionBackwardParams& p, const LaunchContext& context) {
    return launch_queue<Config>(&key_gradient<Config>, KeyChunks::count(p, Config::kKeys),
                                KeyChunks::kKind, p.num_taken, p, context);
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
  using OfRows = Deltas<DeltaConfig<T, kHeadDim>>;
  using OfParts = PartialSums<SumPartialsConfig<T, kHeadDim>>;
  using Backward = std::conditional_t<
      kHeadDim <= 128, Sequence<OfRows, OfQuery, OfKey<KeyGradient::kBoth>, OfParts>,
      Sequence<OfRows, OfQuery, OfKey<KeyGradient::kKey>, OfKey<KeyGradient::kValue>, OfParts>>;
  static constexpr auto backward = Backward::template run<AttentionBackwardParams>;
};

}  // namespace

std::span<const AttentionVariant> attention_variants() {
  static const auto all = list_attention<80, Variant>();
  return all;
}

}  // namespace sparse_attn::sm80
