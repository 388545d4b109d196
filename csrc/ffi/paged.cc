// Attention over pages as an XLA custom call.
#include "ffi/handler.h"
#include "ffi/handlers.h"

namespace sparse_attn {
namespace {

struct PagedAttentionAttributes {
  float scale, logits_soft_cap;
  std::int32_t block_size;  // of the lists
  std::int32_t num_splits;
  std::int64_t seed;  // the order in which a simulated grid runs
  std::int32_t arch;  // of the kernel
};

constexpr std::int64_t kMostKeys = 1 << 30;  // of the pool, and of a sequence

// Check the call's error afterwards.
PagedAttentionParams read_paged(Call& call, const PagedAttentionAttributes& a) {
  PagedAttentionParams p{};
  Checker& check = call.check;
  const auto q_shape = call["query"].dimensions(), page_shape = call["key_pages"].dimensions(),
             table_shape = call["page_table"].dimensions(),
             list_shape = call["blocks"].dimensions();
  check.require(q_shape.size() == 4 && page_shape.size() == 4 && list_shape.size() == 4,
                "query, key_pages and blocks need four dimensions");
  check.require(table_shape.size() == 2, "page_table needs two dimensions");
  const auto dtype = call.input_dtype("query");
  if (check.error()) return p;
  const std::int64_t batch = q_shape[0], q_len = q_shape[1], num_q_heads = q_shape[2],
                     head_dim = q_shape[3];
  const std::int64_t num_pages = page_shape[0], page_size = page_shape[1],
                     num_kv_heads = page_shape[2];
  const std::int64_t max_pages = table_shape[1];
  const std::int64_t list_heads = list_shape[1], list_rows = list_shape[2],
                     num_slots = list_shape[3];
  check.require(num_q_heads > 0 && num_kv_heads > 0 && num_q_heads % num_kv_heads == 0,
                "num_kv_heads must divide num_q_heads");
  check.require(page_size > 0 && page_size % 16 == 0 && a.block_size > 0 && a.block_size % 16 == 0,
                "page_size and block_size must be multiples of 16");
  check.require(num_pages * page_size <= kMostKeys && max_pages * page_size <= kMostKeys,
                "pages must not have more than 2^30 tokens");
  check.require(max_pages > 0, "page_table must have a page for each sequence");
  check.require(list_heads == 1 || list_heads == num_kv_heads || list_heads == num_q_heads,
                "blocks must have 1, `num_kv_heads` or `num_q_heads` heads");
  check.require(list_rows == 1 || list_rows == q_len, "blocks must have 1 or `q_len` rows");
  check.require(a.num_splits > 0, "num_splits must be positive");
  if (check.error()) return p;
  const auto rows = [&](const char* name) { return rows_that_divide(call, name, batch); };
  const std::int64_t num_splits = a.num_splits;
  p.query = call["query"].untyped_data();
  p.key_pages = call.get<void>("key_pages", dtype, {num_pages, page_size, num_kv_heads, head_dim});
  p.value_pages =
      call.get<void>("value_pages", dtype, {num_pages, page_size, num_kv_heads, head_dim});
  p.page_table = call.get<std::int32_t>("page_table", kInt, {rows("page_table"), max_pages});
  p.seq_lens = call.get<std::int32_t>("seq_lens", kInt, {rows("seq_lens")});
  p.blocks =
      call.get<std::int32_t>("blocks", kInt, {rows("blocks"), list_heads, list_rows, num_slots});
  p.counts = call.get<std::int32_t>("counts", kInt, {rows("counts"), list_heads, list_rows});
  p.window_left =
      call.option<std::int32_t>("window_left", kInt, {rows("window_left"), num_q_heads});
  p.num_sinks = call.option<std::int32_t>("num_sinks", kInt, {rows("num_sinks"), num_q_heads});
  p.out = call.get<void>("out", dtype, {batch, q_len, num_q_heads, head_dim});
  p.lse = call.get<float>("lse", kFloat, {batch, q_len, num_q_heads});
  if (num_splits > 1) {
    p.partial_out =
        call.get<float>("partial_out", kFloat, {batch, num_splits, q_len, num_q_heads, head_dim});
    p.partial_lse_log2 =
        call.get<float>("partial_lse", kFloat, {batch, num_splits, q_len, num_q_heads});
  }
  p.batch = static_cast<int>(batch);
  p.q_len = static_cast<int>(q_len);
  p.num_q_heads = static_cast<int>(num_q_heads);
  p.num_kv_heads = static_cast<int>(num_kv_heads);
  p.head_dim = static_cast<int>(head_dim);
  p.num_pages = static_cast<int>(num_pages);
  p.page_size = static_cast<int>(page_size);
  p.max_pages = static_cast<int>(max_pages);
  p.list_heads = static_cast<int>(list_heads);
  p.list_rows = static_cast<int>(list_rows);
  p.num_slots = static_cast<int>(num_slots);
  p.block_size = a.block_size;
  p.num_splits = a.num_splits;
  p.table_batch = static_cast<int>(rows("page_table"));
  p.length_batch = static_cast<int>(rows("seq_lens"));
  p.list_batch = static_cast<int>(rows("blocks"));
  p.count_batch = static_cast<int>(rows("counts"));
  p.window_batch = static_cast<int>(rows("window_left"));
  p.sinks_batch = static_cast<int>(rows("num_sinks"));
  p.scale = a.scale;
  p.logits_soft_cap = a.logits_soft_cap;
  return p;
}

template <class... Stream>
ffi::Error attend(ffi::RemainingArgs args, ffi::RemainingRets rets,
                  PagedAttentionAttributes attributes, Stream... stream) {
  Call call(args, rets,
            {"query", "key_pages", "value_pages", "page_table", "seq_lens", "blocks", "counts",
             "window_left", "num_sinks", "out", "lse", "partial_out", "partial_lse"},
            4);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const PagedAttentionParams params = read_paged(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const SelectionKey key = {attributes.arch, call.kernel_dtype("query"), params.head_dim};
  if (params.batch == 0 || params.q_len == 0) return ffi::Error::Success();
  return result_of(paged_attention(key, params, context_of(call, attributes.seed, stream...)));
}

constexpr auto kAttend = SPARSE_ATTN_HANDLER(attend);

}  // namespace
}  // namespace sparse_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sparse_attn::PagedAttentionAttributes,
                                      ::xla::ffi::StructMember<float>("scale"),
                                      ::xla::ffi::StructMember<float>("logits_soft_cap"),
                                      ::xla::ffi::StructMember<std::int32_t>("block_size"),
                                      ::xla::ffi::StructMember<std::int32_t>("num_splits"),
                                      ::xla::ffi::StructMember<std::int64_t>("seed"),
                                      ::xla::ffi::StructMember<std::int32_t>("arch"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_paged_attention, sparse_attn::kAttend,
                              sparse_attn::bind_handler<sparse_attn::PagedAttentionAttributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
