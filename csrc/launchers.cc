#include "launchers.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

namespace sparse_attn {
namespace {

template <class Variant>
std::vector<Variant> concatenated(std::initializer_list<std::span<const Variant>> lists) {
  std::vector<Variant> all;
  for (const auto list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

std::span<const AttentionVariant> attention_variants() {
  static const auto all = concatenated<AttentionVariant>({
      sm80::attention_variants(),
#if SPARSE_ATTN_SM90
      sm90::attention_variants(),
#endif
  });
  return all;
}

std::span<const SelectionVariant> selection_variants() {
  static const auto all = concatenated<SelectionVariant>({
      sm80::selection_variants(),
#if SPARSE_ATTN_SM90
      sm90::selection_variants(),
#endif
  });
  return all;
}

std::span<const PagedAttentionVariant> paged_attention_variants() {
  static const auto all = concatenated<PagedAttentionVariant>({
      sm80::paged_attention_variants(),
#if SPARSE_ATTN_SM90
      sm90::paged_attention_variants(),
#endif
  });
  return all;
}

const char* name_of(Dtype dtype) { return dtype == Dtype::kBFloat16 ? "bfloat16" : "float16"; }

template <class Items, class Text>
std::string joined(const Items& items, Text text) {
  std::string all;
  for (const auto& item : items) all += (all.empty() ? "" : ", ") + text(item);
  return all;
}

// Why no variant was found.
std::string missing(const VariantKey& key) {
  std::set<int> archs;
  for (const auto& variant : attention_variants()) archs.insert(variant.key.arch);
  if (archs.count(key.arch) == 0) {
    return "arch is " + std::to_string(key.arch) + ", and kernels are compiled in for " +
           joined(archs, [](int arch) { return std::to_string(arch); }) +
           "; pass one of these, or build the extension with SPARSE_ATTN_CUDA_ARCHITECTURES naming "
           "the architecture";
  }
  return "no attention kernel of arch " + std::to_string(key.arch) + " is compiled in for " +
         name_of(key.dtype) + ", head_dim " + std::to_string(key.head_dim) + ", kv_block_size " +
         std::to_string(key.kv_block_size);
}

std::string missing(const char* kernel, const SelectionKey& key) {
  return "no " + std::string(kernel) + " kernel of arch " + std::to_string(key.arch) +
         " is compiled in for " + name_of(key.dtype) + ", head_dim " + std::to_string(key.head_dim);
}

template <class Params>
Status run(Status (*AttentionVariant::*pass)(const Params&, const LaunchContext&),
           const VariantKey& key, const Params& params, const LaunchContext& context) {
  const AttentionVariant* variant = find_variant(attention_variants(), key);
  return variant ? (variant->*pass)(params, context) : missing(key);
}

std::string variant_text(const char* kernel, int arch, Dtype dtype, int head_dim,
                         const std::vector<int>& kv_block_sizes) {
  return R"({"kernel": ")" + std::string(kernel) + R"(", "arch": )" + std::to_string(arch) +
         R"(, "dtype": ")" + name_of(dtype) + R"(", "head_dim": )" + std::to_string(head_dim) +
         R"(, "kv_block_sizes": [)" +
         joined(kv_block_sizes, [](int size) { return std::to_string(size); }) + "]}";
}

std::string variants_json() {
  std::map<std::tuple<int, Dtype, int>, std::vector<int>> block_sizes;
  for (const auto& [key, forward, backward] : attention_variants())
    block_sizes[{key.arch, key.dtype, key.head_dim}].push_back(key.kv_block_size);
  std::vector<std::string> texts;
  for (const auto& [key, sizes] : block_sizes) {
    const auto& [arch, dtype, head_dim] = key;
    texts.push_back(variant_text("attention", arch, dtype, head_dim, sizes));
  }
  for (const auto& [key, run] : selection_variants())
    texts.push_back(variant_text("selection", key.arch, key.dtype, key.head_dim, {}));
  // Selection by bounds has the same ones, whose kernels are the same for every architecture.
  for (const char* kernel : {"paged_attention", "bounds"}) {
    for (const auto& [key, run] : paged_attention_variants())
      texts.push_back(variant_text(kernel, key.arch, key.dtype, key.head_dim, {}));
  }
  return "[" + joined(texts, [](const std::string& text) { return text; }) + "]";
}

std::string kernels_json() {
  std::map<std::string, KernelInfo> kernels;  // each once, in order
  for (const auto& kernel : kernel_infos()) kernels[kernel.config] = kernel;
  return "[" +
         joined(kernels,
                [](const auto& item) {
                  const auto& [config, threads, shared_bytes] = item.second;
                  return R"({"config": ")" + config + R"(", "threads": )" +
                         std::to_string(threads) + R"(, "shared_bytes": )" +
                         (shared_bytes < 0 ? "null" : std::to_string(shared_bytes)) + "}";
                }) +
         "]";
}

}  // namespace

Status attention_forward(const VariantKey& key, const AttentionForwardParams& params,
                         const LaunchContext& context) {
  return run(&AttentionVariant::forward, key, params, context);
}

Status attention_backward(const VariantKey& key, const AttentionBackwardParams& params,
                          const LaunchContext& context) {
  return run(&AttentionVariant::backward, key, params, context);
}

Status select_blocks(const SelectionKey& key, const SelectionParams& params, int segment_blocks,
                     const LaunchContext& context) {
  if (const SelectionVariant* variant = find_variant(selection_variants(), key))
    return variant->run(params, segment_blocks, context);
  return missing("selection", key);
}

Status paged_attention(const SelectionKey& key, const PagedAttentionParams& params,
                       const LaunchContext& context) {
  const PagedAttentionVariant* variant = find_variant(paged_attention_variants(), key);
  if (variant == nullptr) return missing("paged attention", key);
  const Status status = variant->run(params, context);
  return status || params.num_splits == 1 ? status : merge_splits(key.dtype, params, context);
}

}  // namespace sparse_attn

const char* sparse_attn_variants() {
  static const std::string text = sparse_attn::variants_json();
  return text.c_str();
}

const char* sparse_attn_kernels() {
  static const std::string text = sparse_attn::kernels_json();
  return text.c_str();
}
