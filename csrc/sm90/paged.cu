// The variants of paged attention for compute capability 9.0 that are compiled. What bounds them is
// memory, so they are the kernels of compute capability 8.0, with deeper rings.
#include "common/variants.cuh"
#include "sm80/paged_attention.cuh"
#include "sm90/matrix.cuh"

namespace sparse_attn::sm90 {

template <class T, int kHeadDim, int kRowWarps, int kStages>
struct PagedAttentionConfig : sm80::PagedAttentionConfig<T, kHeadDim, kRowWarps, kStages> {};

namespace {

template <class T, int kHeadDim>
struct Variant {
  static Status run(const PagedAttentionParams& p, const LaunchContext& context) {
    return sm80::launch_paged<PagedAttentionConfig, T, kHeadDim, shared_bytes_of(1)>(p, context);
  }
};

}  // namespace

std::span<const PagedAttentionVariant> paged_attention_variants() {
  static const auto all = list_paged<90, Variant>();
  return all;
}

}  // namespace sparse_attn::sm90
