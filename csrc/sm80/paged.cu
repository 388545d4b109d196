// The variants of paged attention for compute capability 8.0 that are compiled.
#include "common/variants.cuh"
#include "sm80/paged_attention.cuh"

namespace sparse_attn::sm80 {
namespace {

template <class T, int kHeadDim>
struct Variant {
  static Status run(const PagedAttentionParams& p, const LaunchContext& context) {
    return launch_paged<PagedAttentionConfig, T, kHeadDim, kMostSharedBytes>(p, context);
  }
};

}  // namespace

std::span<const PagedAttentionVariant> paged_attention_variants() {
  static const auto all = list_paged<80, Variant>();
  return all;
}

}  // namespace sparse_attn::sm80
