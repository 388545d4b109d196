// The lists of what an architecture has compiled: every dtype, head_dim and kv_block_size.
#pragma once

#include <type_traits>
#include <vector>

#include "common/ptx.cuh"
#include "launchers.h"

namespace sparse_attn {

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, ptx::BFloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;

template <int kArch, template <class, int, int> class Variant, class T, int kHeadDim,
          int... kBlockSizes>
void add_attention(std::vector<AttentionVariant>& to) {
  (to.push_back({{kArch, kDtype<T>, kHeadDim, kBlockSizes},
                 Variant<T, kHeadDim, kBlockSizes>::forward,
                 Variant<T, kHeadDim, kBlockSizes>::backward}),
   ...);
}

template <int kArch, template <class, int> class Variant, class T, int... kHeadDims>
void add_selection(std::vector<SelectionVariant>& to) {
  (to.push_back({{kArch, kDtype<T>, kHeadDims}, Variant<T, kHeadDims>::run}), ...);
}

template <int kArch, template <class, int> class Variant, class T, int... kHeadDims>
void add_paged(std::vector<PagedAttentionVariant>& to) {
  (to.push_back({{kArch, kDtype<T>, kHeadDims}, Variant<T, kHeadDims>::run}), ...);
}

// Without float16 there is half as much to compile.
#if !defined(SPARSE_ATTN_FLOAT16)
#define SPARSE_ATTN_FLOAT16 1
#endif

template <class Add>
void for_each_dtype(Add add) {
  add.template operator()<ptx::BFloat16>();
#if SPARSE_ATTN_FLOAT16
  add.template operator()<ptx::Float16>();
#endif
}

// Those of one dtype. A `Variant<T, kHeadDim, kBlockSize>` has static functions `forward` and
// `backward`.
template <int kArch, template <class, int, int> class Variant, class T>
std::vector<AttentionVariant> list_attention() {
  std::vector<AttentionVariant> all;
  add_attention<kArch, Variant, T, 64, 16, 32, 64, 128>(all);
  add_attention<kArch, Variant, T, 96, 16, 32, 64, 128>(all);
  add_attention<kArch, Variant, T, 128, 16, 32, 64, 128>(all);
  add_attention<kArch, Variant, T, 256, 16, 32, 64, 128>(all);
  return all;
}

template <int kArch, template <class, int, int> class Variant>
std::vector<AttentionVariant> list_attention() {
  std::vector<AttentionVariant> all;
  for_each_dtype([&]<class T>() {
    const auto some = list_attention<kArch, Variant, T>();
    all.insert(all.end(), some.begin(), some.end());
  });
  return all;
}

// A `Variant<T, kHeadDim>` has a static function `run`.
template <int kArch, template <class, int> class Variant>
std::vector<SelectionVariant> list_selection() {
  std::vector<SelectionVariant> all;
  for_each_dtype([&]<class T>() { add_selection<kArch, Variant, T, 64, 96, 128, 256>(all); });
  return all;
}

template <int kArch, template <class, int> class Variant>
std::vector<PagedAttentionVariant> list_paged() {
  std::vector<PagedAttentionVariant> all;
  for_each_dtype([&]<class T>() { add_paged<kArch, Variant, T, 64, 96, 128, 256>(all); });
  return all;
}

}  // namespace sparse_attn
