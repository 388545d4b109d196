// The lists of what an architecture has compiled: every dtype, head_dim and kv_block_size.
#pragma once

#include <type_traits>
#include <vector>

#include "common/ptx.cuh"
#include "launchers.h"

namespace sparse_attn {

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, ptx::BFloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;

// Calls `add` with each dtype and head_dim as template arguments.
template <class Add>
void for_each_row_type(Add add) {
  const auto add_dtype = [&]<class T>() {
    add.template operator()<T, 64>();
    add.template operator()<T, 96>();
    add.template operator()<T, 128>();
    add.template operator()<T, 256>();
  };
  add_dtype.template operator()<ptx::BFloat16>();
  add_dtype.template operator()<ptx::Float16>();
}

// A `Variant<T, kHeadDim, kBlockSize>` has static functions `forward` and `backward`.
template <int kArch, template <class, int, int> class Variant>
std::vector<AttentionVariant> list_attention() {
  std::vector<AttentionVariant> all;
  for_each_row_type([&]<class T, int kHeadDim>() {
    const auto add = [&]<int kBlockSize>() {
      using V = Variant<T, kHeadDim, kBlockSize>;
      all.push_back({{kArch, kDtype<T>, kHeadDim, kBlockSize}, V::forward, V::backward});
    };
    add.template operator()<16>();
    add.template operator()<32>();
    add.template operator()<64>();
    add.template operator()<128>();
  });
  return all;
}

// A `Variant<T, kHeadDim>` has a static function `run`.
template <int kArch, template <class, int> class Variant>
std::vector<SelectionVariant> list_selection() {
  std::vector<SelectionVariant> all;
  for_each_row_type([&]<class T, int kHeadDim>() {
    all.push_back({{kArch, kDtype<T>, kHeadDim}, Variant<T, kHeadDim>::run});
  });
  return all;
}

}  // namespace sparse_attn
