// Block selection as an XLA custom call.
#include <algorithm>
#include <string_view>

#include "ffi/handler.h"
#include "ffi/handlers.h"

namespace sparse_attn {
namespace {

struct SelectionAttributes {
  float scale;
  std::int32_t kv_len, block_size;
  std::int32_t kernel_size, kernel_stride, coarse_kernel_size, coarse_kernel_stride;
  std::int32_t top_k, num_sink_blocks, num_local_blocks;
  std::string_view pooling, group_reduction;  // "none": a list per query head
  bool is_causal;
  std::int32_t segment_blocks;  // whose scores are held at a time; 0: as many as there is room for
  std::int64_t seed;            // the order in which a simulated grid runs
  std::int32_t arch;            // of the kernel
};

// Complete units of `size` tokens in `length`.
std::int64_t num_units(std::int64_t length, std::int64_t size, std::int64_t stride) {
  return length < size ? 0 : (length - size) / stride + 1;
}

void check_attributes(Checker& check, const SelectionAttributes& a) {
  check.require(a.kv_len >= 0 && a.kv_len <= 1 << 30, "kv_len must be 0 to 2^30");
  check.require(a.block_size > 0, "block_size must be positive");
  check.require(a.kernel_size > 0 && a.kernel_stride > 0,
                "kernel_size and kernel_stride must be positive");
  check.require(a.coarse_kernel_size > 0 && a.coarse_kernel_stride > 0,
                "coarse_kernel_size and coarse_kernel_stride must be positive");
  check.require(a.num_sink_blocks >= 0 && a.num_local_blocks >= 0,
                "num_sink_blocks and num_local_blocks must not be negative");
  check.require(a.top_k > 0 && std::int64_t{a.num_sink_blocks} + a.num_local_blocks <= a.top_k,
                "top_k must be positive and at least num_sink_blocks + num_local_blocks");
  check.require(a.pooling == "max" || a.pooling == "overlap_sum",
                "pooling must be 'max' or 'overlap_sum'");
  check.require(a.group_reduction == "sum" || a.group_reduction == "mean" ||
                    a.group_reduction == "max" || a.group_reduction == "none",
                "group_reduction must be 'sum', 'mean', 'max' or 'none'");
  check.require(a.segment_blocks >= 0, "segment_blocks must not be negative");
}

// Check the call's error afterwards.
SelectionParams read_selection(Call& call, const SelectionAttributes& a) {
  SelectionParams p{};
  Checker& check = call.check;
  check_attributes(check, a);
  const auto q_shape = call["query"].dimensions(), unit_shape = call["compressed"].dimensions(),
             position_shape = call["positions"].dimensions();
  check.require(q_shape.size() == 4 && unit_shape.size() == 4,
                "query and compressed need four dimensions");
  check.require(position_shape.size() == 2, "positions needs two dimensions");
  const auto dtype = call.input_dtype("query");
  if (check.error()) return p;
  const std::int64_t batch = q_shape[0], q_len = q_shape[1], num_q_heads = q_shape[2],
                     head_dim = q_shape[3];
  const std::int64_t unit_batch = unit_shape[0], num_kv_heads = unit_shape[2],
                     position_batch = position_shape[0];
  check.require(num_q_heads > 0 && num_kv_heads > 0 && num_q_heads % num_kv_heads == 0,
                "num_kv_heads must divide num_q_heads");
  check.require(unit_batch > 0 && batch % unit_batch == 0,
                "compressed must have a divisor of batch rows");
  check.require(position_batch > 0 && batch % position_batch == 0,
                "positions must have a divisor of batch rows");
  if (check.error()) return p;
  const auto units = [&](const char* name, std::int32_t size, std::int32_t stride) -> UnitParams {
    const std::int64_t count = num_units(a.kv_len, size, stride);
    const auto* keys =
        call.get<const void>(name, dtype, {unit_batch, count, num_kv_heads, head_dim});
    return {keys, static_cast<int>(count), size, Divisor(stride)};
  };
  p.query = call["query"].untyped_data();
  p.fine = units("compressed", a.kernel_size, a.kernel_stride);
  // Without coarse units, and with too few keys for one, the array is empty.
  p.coarse = call["coarse"].element_count() == 0
                 ? UnitParams{nullptr, 0, a.coarse_kernel_size, Divisor(a.coarse_kernel_stride)}
                 : units("coarse", a.coarse_kernel_size, a.coarse_kernel_stride);
  p.positions = call.get<std::int32_t>("positions", kInt, {position_batch, q_len});
  const std::int64_t num_lists = a.group_reduction == "none" ? num_q_heads : num_kv_heads;
  p.indices = call.get<std::int32_t>("indices", kInt, {batch, num_lists, q_len, a.top_k});
  p.num_taken = call.get<std::int32_t>("num_taken", kInt, {batch, num_kv_heads});
  p.batch = static_cast<int>(batch);
  p.q_len = static_cast<int>(q_len);
  p.num_q_heads = static_cast<int>(num_q_heads);
  p.num_kv_heads = static_cast<int>(num_kv_heads);
  p.num_lists = static_cast<int>(num_lists);
  p.unit_batch = static_cast<int>(unit_batch);
  p.position_batch = static_cast<int>(position_batch);
  p.num_blocks = static_cast<int>((std::int64_t{a.kv_len} + a.block_size - 1) / a.block_size);
  p.block_size = Divisor(a.block_size);
  p.top_k = a.top_k;
  p.num_sink_blocks = a.num_sink_blocks;
  p.num_local_blocks = a.num_local_blocks;
  p.scale = a.scale;
  p.is_causal = a.is_causal;
  p.pooling = a.pooling == "max" ? Pooling::kMax : Pooling::kOverlapSum;
  p.group_reduction = a.group_reduction == "max" ? GroupReduction::kMax : GroupReduction::kSum;
  return p;
}

template <class... Stream>
ffi::Error select(ffi::RemainingArgs args, ffi::RemainingRets rets, SelectionAttributes attributes,
                  Stream... stream) {
  Call call(args, rets, {"query", "compressed", "coarse", "positions", "indices", "num_taken"}, 2);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const SelectionParams params = read_selection(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const SelectionKey key = {attributes.arch, call.kernel_dtype("query"),
                            static_cast<int>(call["query"].dimensions()[3])};
  return result_of(select_blocks(key, params, attributes.segment_blocks,
                                 context_of(call, attributes.seed, stream...)));
}

constexpr auto kSelect = SPARSE_ATTN_HANDLER(select);

}  // namespace
}  // namespace sparse_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sparse_attn::SelectionAttributes, ::xla::ffi::StructMember<float>("scale"),
    ::xla::ffi::StructMember<std::int32_t>("kv_len"),
    ::xla::ffi::StructMember<std::int32_t>("block_size"),
    ::xla::ffi::StructMember<std::int32_t>("kernel_size"),
    ::xla::ffi::StructMember<std::int32_t>("kernel_stride"),
    ::xla::ffi::StructMember<std::int32_t>("coarse_kernel_size"),
    ::xla::ffi::StructMember<std::int32_t>("coarse_kernel_stride"),
    ::xla::ffi::StructMember<std::int32_t>("top_k"),
    ::xla::ffi::StructMember<std::int32_t>("num_sink_blocks"),
    ::xla::ffi::StructMember<std::int32_t>("num_local_blocks"),
    ::xla::ffi::StructMember<std::string_view>("pooling"),
    ::xla::ffi::StructMember<std::string_view>("group_reduction"),
    ::xla::ffi::StructMember<bool>("is_causal"),
    ::xla::ffi::StructMember<std::int32_t>("segment_blocks"),
    ::xla::ffi::StructMember<std::int64_t>("seed"), ::xla::ffi::StructMember<std::int32_t>("arch"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_select_blocks, sparse_attn::kSelect,
                              sparse_attn::bind_handler<sparse_attn::SelectionAttributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
