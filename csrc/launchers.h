// The compiled kernels as plain functions, which know no XLA type: the caller has checked the
// shapes and dtypes of all arrays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/target.h"
#include "params.h"

#if SPARSE_ATTN_HOST_SIM
#include "host_sim/simulator.h"
#else
struct CUstream_st;
#endif

namespace sparse_attn {

// What went wrong, if anything did.
using Status = std::optional<std::string>;

// Where kernels run.
struct LaunchContext {
#if SPARSE_ATTN_HOST_SIM
  std::uint64_t seed;                     // the order in which the blocks and threads of a grid run
  std::vector<host_sim::Buffer> buffers;  // what kernels may touch
#else
  CUstream_st* stream;  // a cudaStream_t
#endif
};

// What a kernel takes of a multiprocessor.
struct KernelInfo {
  std::string config;  // the type that the kernel is a template over
  int threads;         // of a block
  int shared_bytes;    // dynamic; -1 if each call says
};

// Of all kernels for which there is a `launch`.
inline std::vector<KernelInfo>& kernel_infos() {
  static std::vector<KernelInfo> all;
  return all;
}

enum class Dtype { kBFloat16, kFloat16 };

// What a kernel is chosen by.
struct VariantKey {
  int arch;  // of the kernel's source: 80 is csrc/sm80
  Dtype dtype;
  int head_dim;
  int kv_block_size;
  bool operator==(const VariantKey&) const = default;
};

struct AttentionVariant {
  VariantKey key;
  Status (*forward)(const AttentionForwardParams&, const LaunchContext&);
  Status (*backward)(const AttentionBackwardParams&, const LaunchContext&);
};

struct SelectionKey {
  int arch;
  Dtype dtype;
  int head_dim;
  bool operator==(const SelectionKey&) const = default;
};

struct SelectionVariant {
  SelectionKey key;
  // `segment_blocks`: whose scores are held at a time; 0 is as many as there is room for.
  Status (*run)(SelectionParams, int segment_blocks, const LaunchContext&);
};

struct PagedAttentionVariant {
  SelectionKey key;
  // The results of all splits.
  Status (*run)(const PagedAttentionParams&, const LaunchContext&);
};

// The one of a key, or null.
template <class Variant, class Key = decltype(Variant::key)>
const Variant* find_variant(std::span<const Variant> all, const Key& key) {
  const auto found = std::find_if(all.begin(), all.end(),
                                  [&](const Variant& variant) { return variant.key == key; });
  return found == all.end() ? nullptr : &*found;
}

namespace sm80 {
std::span<const AttentionVariant> attention_variants();
std::span<const SelectionVariant> selection_variants();
std::span<const PagedAttentionVariant> paged_attention_variants();
}  // namespace sm80
namespace sm90 {
std::span<const AttentionVariant> attention_variants();
std::span<const SelectionVariant> selection_variants();
std::span<const PagedAttentionVariant> paged_attention_variants();
}  // namespace sm90

// These start kernels and return. They allocate nothing and wait for nothing.
Status attention_forward(const VariantKey& key, const AttentionForwardParams& params,
                         const LaunchContext& context);
Status attention_backward(const VariantKey& key, const AttentionBackwardParams& params,
                          const LaunchContext& context);
// The params come without a tiling.
Status select_blocks(const SelectionKey& key, const SelectionParams& params, int segment_blocks,
                     const LaunchContext& context);
Status paged_attention(const SelectionKey& key, const PagedAttentionParams& params,
                       const LaunchContext& context);
// What a variant left of the splits becomes one result.
Status merge_splits(Dtype dtype, const PagedAttentionParams& params, const LaunchContext& context);
Status find_extrema(Dtype dtype, const ExtremaParams& params, const LaunchContext& context);
Status select_by_bounds(Dtype dtype, int head_dim, const BoundParams& params,
                        const LaunchContext& context);
// `window_blocks`: that are marked at a time; 0 is as many as there is room for.
Status build_unions(const UnionParams& params, int window_blocks, const LaunchContext& context);
Status invert_plan(const InversionParams& params, const LaunchContext& context);

}  // namespace sparse_attn

// What was compiled, as JSON. `sparse_attn_variants`: a list of {"kernel": "attention", "arch": 80,
// "dtype": "bfloat16", "head_dim": 64, "kv_block_sizes": [16, 32]}; kernels named "selection",
// "paged_attention" and "bounds" have no sizes of blocks of their own and list none.
// `sparse_attn_kernels`: of every kernel that is launched anywhere, {"config": the type that it is
// a template over, "threads": of a block, "shared_bytes": dynamic, null if each call says}.
extern "C" const char* sparse_attn_variants();
extern "C" const char* sparse_attn_kernels();
