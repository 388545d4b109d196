// The extrema of blocks, and block selection by bounds, as XLA custom calls.
#include <string_view>

#include "ffi/handler.h"
#include "ffi/handlers.h"

namespace sparse_attn {
namespace {

struct ExtremaAttributes {
  std::int32_t block_size;
  std::int64_t seed;  // the order in which a simulated grid runs
};

// Check the call's error afterwards.
ExtremaParams read_extrema(Call& call, const ExtremaAttributes& a) {
  ExtremaParams p{};
  Checker& check = call.check;
  const auto shape = call["keys"].dimensions(), block_shape = call["blocks"].dimensions(),
             result_shape = call["maximum"].dimensions(),
             table_shape = call["page_table"].dimensions();
  const bool is_paged = call["page_table"].element_count() > 0;
  check.require(shape.size() == 4 && block_shape.size() == 2 && result_shape.size() == 4,
                "keys and maximum need four dimensions, blocks two");
  check.require(!is_paged || table_shape.size() == 2, "page_table needs two dimensions");
  const auto dtype = call.input_dtype("keys");
  check.require(a.block_size > 0, "block_size must be positive");
  if (check.error()) return p;
  const std::int64_t batch = result_shape[0], num_blocks = block_shape[1], heads = shape[2],
                     head_dim = shape[3];
  const auto rows = [&](const char* name) { return rows_that_divide(call, name, batch); };
  check.require(head_dim % 8 == 0, "head_dim must be a multiple of 8");
  check.require(shape[1] > 0, "keys must not be empty");
  const std::int64_t first = is_paged ? shape[0] : rows("keys");
  if (check.error()) return p;
  p.keys = call.get<void>("keys", dtype, {first, shape[1], heads, head_dim});
  if (is_paged)
    p.page_table = call.get<std::int32_t>("page_table", kInt, {rows("page_table"), table_shape[1]});
  p.blocks = call.get<std::int32_t>("blocks", kInt, {rows("blocks"), num_blocks});
  p.lengths = call.get<std::int32_t>("lengths", kInt, {rows("lengths")});
  p.maximum = call.get<void>("maximum", dtype, {batch, num_blocks, heads, head_dim});
  p.minimum = call.get<void>("minimum", dtype, {batch, num_blocks, heads, head_dim});
  check.require(heads * head_dim / 8 <= INT32_MAX, "a token has too many channels");
  p.batch = static_cast<int>(batch);
  p.num_blocks = static_cast<int>(num_blocks);
  p.block_size = a.block_size;
  p.row_pieces = static_cast<int>(heads * head_dim / 8);
  p.num_pages = is_paged ? static_cast<int>(first) : 0;
  p.page_size = static_cast<int>(shape[1]);
  p.max_pages = is_paged ? static_cast<int>(table_shape[1]) : 0;
  p.kv_len = static_cast<int>(shape[1]);
  p.key_batch = is_paged ? 1 : static_cast<int>(first);
  p.table_batch = static_cast<int>(rows("page_table"));
  p.block_batch = static_cast<int>(rows("blocks"));
  p.length_batch = static_cast<int>(rows("lengths"));
  return p;
}

template <class... Stream>
ffi::Error extrema(ffi::RemainingArgs args, ffi::RemainingRets rets, ExtremaAttributes attributes,
                   Stream... stream) {
  Call call(args, rets, {"blocks", "keys", "page_table", "lengths", "maximum", "minimum"}, 2);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const ExtremaParams params = read_extrema(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  return result_of(find_extrema(call.kernel_dtype("keys"), params,
                                context_of(call, attributes.seed, stream...)));
}

struct BoundAttributes {
  std::int32_t top_k;
  std::string_view reduction;  // "max", "mean_bound", "mean_q"; "none": a list per query head
  std::int64_t seed;           // the order in which a simulated grid runs
};

// Check the call's error afterwards.
BoundParams read_bounds(Call& call, const BoundAttributes& a) {
  BoundParams p{};
  Checker& check = call.check;
  const auto q_shape = call["query"].dimensions(), shape = call["maximum"].dimensions(),
             table_shape = call["page_table"].dimensions();
  const bool is_paged = call["page_table"].element_count() > 0;
  check.require(q_shape.size() == 4 && shape.size() == 4, "query and maximum need four dimensions");
  check.require(!is_paged || table_shape.size() == 2, "page_table needs two dimensions");
  const auto dtype = call.input_dtype("query");
  check.require(a.reduction == "max" || a.reduction == "mean_bound" || a.reduction == "mean_q" ||
                    a.reduction == "none",
                "reduction must be 'max', 'mean_bound', 'mean_q' or 'none'");
  check.require(a.top_k > 0, "top_k must be positive");
  if (check.error()) return p;
  const std::int64_t batch = q_shape[0], q_len = q_shape[1], num_q_heads = q_shape[2],
                     head_dim = q_shape[3];
  const std::int64_t num_kv_heads = shape[2];
  check.require(num_q_heads > 0 && num_kv_heads > 0 && num_q_heads % num_kv_heads == 0,
                "num_kv_heads must divide num_q_heads");
  const std::int64_t max_pages = is_paged ? table_shape[1] : 0,
                     num_blocks = is_paged ? max_pages * shape[1] : shape[1];
  check.require(num_blocks <= 1 << 30, "there may be 2^30 blocks");
  if (check.error()) return p;
  const auto rows = [&](const char* name) { return rows_that_divide(call, name, batch); };
  const std::int64_t first = is_paged ? shape[0] : rows("maximum");
  const std::int64_t num_lists = a.reduction == "none" ? num_q_heads : num_kv_heads;
  p.query = call["query"].untyped_data();
  p.maximum = call.get<void>("maximum", dtype, {first, shape[1], num_kv_heads, head_dim});
  p.minimum = call.get<void>("minimum", dtype, {first, shape[1], num_kv_heads, head_dim});
  if (is_paged)
    p.page_table = call.get<std::int32_t>("page_table", kInt, {rows("page_table"), max_pages});
  p.limits = call.get<std::int32_t>("limits", kInt, {rows("limits"), q_len, 4});
  p.indices = call.get<std::int32_t>("indices", kInt, {batch, num_lists, q_len, a.top_k});
  p.scores = call.get<float>("scores", kFloat, {batch, num_lists, q_len, num_blocks});
  p.batch = static_cast<int>(batch);
  p.q_len = static_cast<int>(q_len);
  p.num_q_heads = static_cast<int>(num_q_heads);
  p.num_kv_heads = static_cast<int>(num_kv_heads);
  p.num_lists = static_cast<int>(num_lists);
  p.num_blocks = static_cast<int>(num_blocks);
  p.num_pages = is_paged ? static_cast<int>(shape[0]) : 0;
  p.page_rows = static_cast<int>(shape[1]);
  p.max_pages = static_cast<int>(max_pages);
  p.extrema_batch = is_paged ? 1 : static_cast<int>(first);
  p.table_batch = static_cast<int>(rows("page_table"));
  p.limit_batch = static_cast<int>(rows("limits"));
  p.top_k = a.top_k;
  p.reduction = a.reduction == "mean_bound" ? BoundReduction::kMean
                : a.reduction == "mean_q"   ? BoundReduction::kMeanQuery
                                            : BoundReduction::kMax;
  return p;
}

template <class... Stream>
ffi::Error select(ffi::RemainingArgs args, ffi::RemainingRets rets, BoundAttributes attributes,
                  Stream... stream) {
  Call call(args, rets,
            {"query", "maximum", "minimum", "page_table", "limits", "indices", "scores"}, 2);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const BoundParams params = read_bounds(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const int head_dim = static_cast<int>(call["query"].dimensions()[3]);
  return result_of(select_by_bounds(call.kernel_dtype("query"), head_dim, params,
                                    context_of(call, attributes.seed, stream...)));
}

constexpr auto kExtrema = SPARSE_ATTN_HANDLER(extrema);
constexpr auto kSelect = SPARSE_ATTN_HANDLER(select);

}  // namespace
}  // namespace sparse_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sparse_attn::ExtremaAttributes,
                                      ::xla::ffi::StructMember<std::int32_t>("block_size"),
                                      ::xla::ffi::StructMember<std::int64_t>("seed"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sparse_attn::BoundAttributes,
                                      ::xla::ffi::StructMember<std::int32_t>("top_k"),
                                      ::xla::ffi::StructMember<std::string_view>("reduction"),
                                      ::xla::ffi::StructMember<std::int64_t>("seed"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_block_extrema, sparse_attn::kExtrema,
                              sparse_attn::bind_handler<sparse_attn::ExtremaAttributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_select_by_bounds, sparse_attn::kSelect,
                              sparse_attn::bind_handler<sparse_attn::BoundAttributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
