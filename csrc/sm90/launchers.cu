// The variants of compute capability 9.0 that are compiled. They take longest of all, and those of
// float16 are compiled beside them.
#include "sm90/launchers.cuh"

namespace sparse_attn::sm90 {

std::vector<AttentionVariant> float16_variants();

std::span<const AttentionVariant> attention_variants() {
  static const auto all = [] {
    auto all = list_attention<90, Variant, ptx::BFloat16>();
    const auto more = float16_variants();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }();
  return all;
}

}  // namespace sparse_attn::sm90
