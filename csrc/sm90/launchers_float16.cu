#include "sm90/launchers.cuh"

namespace sparse_attn::sm90 {

std::vector<AttentionVariant> float16_variants() {
#if SPARSE_ATTN_FLOAT16
  return list_attention<90, Variant, ptx::Float16>();
#else
  return {};
#endif
}

}  // namespace sparse_attn::sm90
