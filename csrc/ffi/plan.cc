// The parts of a plan as XLA custom calls.
#include <algorithm>

#include "ffi/handler.h"
#include "ffi/handlers.h"

namespace sparse_attn {
namespace {

struct UnionAttributes {
  std::int32_t num_kv_blocks, q_block_size, tile_size, row_group_tokens;
  std::int32_t window_blocks;  // that are marked at a time; 0: as many as there is room for
  std::int64_t seed;           // the order in which a simulated grid runs
};

struct InverseAttributes {
  std::int32_t num_kv_blocks;
  std::int64_t seed;
};

UnionParams read_unions(Call& call, const UnionAttributes& a) {
  UnionParams p{};
  Checker& check = call.check;
  const auto shape = call["indices"].dimensions(), list_shape = call["blocks"].dimensions();
  check.require(shape.size() == 5 && list_shape.size() == 4,
                "indices needs five dimensions, blocks four");
  check.require(a.num_kv_blocks >= 0, "num_kv_blocks must not be negative");
  check.require(a.q_block_size > 0, "q_block_size must be positive");
  check.require(a.row_group_tokens > 0 && a.tile_size > 0 && a.tile_size % a.row_group_tokens == 0,
                "tile_size must be a positive multiple of row_group_tokens");
  check.require(a.window_blocks >= 0 && a.window_blocks % 32 == 0,
                "window_blocks must be a multiple of 32");
  if (check.error()) return p;
  const std::int64_t batch = shape[0], heads = shape[1], lists_per_head = shape[2],
                     num_rows = shape[3], num_slots = shape[4];
  const std::int64_t num_tiles = list_shape[2], capacity = list_shape[3];
  check.require(lists_per_head > 0 && num_slots > 0, "indices must not be empty");
  if (check.error()) return p;
  const std::int64_t num_groups = a.tile_size / a.row_group_tokens * lists_per_head;
  check.require(num_groups <= INT32_MAX / num_slots && num_tiles <= INT32_MAX / a.tile_size,
                "there are more than 2^31 - 1 slots in a tile, or tokens");
  check.require(capacity == std::min<std::int64_t>(num_groups * num_slots, a.num_kv_blocks),
                "blocks must have room for all slots of a tile or all blocks");
  if (check.error()) return p;
  const std::int64_t num_words = num_groups == 1 ? 0 : (num_groups + 31) / 32;
  p.indices =
      call.get<std::int32_t>("indices", kInt, {batch, heads, lists_per_head, num_rows, num_slots});
  p.blocks = call.get<std::int32_t>("blocks", kInt, {batch, heads, num_tiles, capacity});
  p.counts = call.get<std::int32_t>("counts", kInt, {batch, heads, num_tiles});
  if (num_words > 0) {
    p.membership = call.get<std::uint32_t>("membership", ffi::DataType::U32,
                                           {batch, heads, num_tiles, capacity, num_words});
  }
  p.batch = static_cast<int>(batch);
  p.heads = static_cast<int>(heads);
  p.num_rows = static_cast<int>(num_rows);
  p.num_tiles = static_cast<int>(num_tiles);
  p.capacity = static_cast<int>(capacity);
  p.num_words = static_cast<int>(num_words);
  p.num_kv_blocks = a.num_kv_blocks;
  p.num_groups = static_cast<int>(num_groups);
  p.tile_size = a.tile_size;
  p.row_group_tokens = a.row_group_tokens;
  p.lists_per_head = Divisor(static_cast<int>(lists_per_head));
  p.num_slots = Divisor(static_cast<int>(num_slots));
  p.q_block_size = Divisor(a.q_block_size);
  return p;
}

template <class... Stream>
ffi::Error unions(ffi::RemainingArgs args, ffi::RemainingRets rets, UnionAttributes attributes,
                  Stream... stream) {
  Call call(args, rets, {"indices", "blocks", "counts", "membership"}, 3);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const UnionParams params = read_unions(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  return result_of(
      build_unions(params, attributes.window_blocks, context_of(call, attributes.seed, stream...)));
}

InversionParams read_inversion(Call& call, const InverseAttributes& a) {
  InversionParams p{};
  Checker& check = call.check;
  const auto shape = call["blocks"].dimensions(), cursor_shape = call["cursors"].dimensions();
  check.require(shape.size() == 4 && cursor_shape.size() == 4,
                "blocks and cursors need four dimensions");
  check.require(a.num_kv_blocks >= 0, "num_kv_blocks must not be negative");
  if (check.error()) return p;
  const std::int64_t batch = shape[0], heads = shape[1], num_tiles = shape[2], capacity = shape[3],
                     num_parts = cursor_shape[2];
  check.require(num_parts > 0, "cursors needs at least one part");
  check.require(num_tiles * capacity <= INT32_MAX && batch * heads <= INT32_MAX,
                "blocks has more than 2^31 - 1 entries or rows");
  if (check.error()) return p;
  const std::int64_t entries = num_tiles * capacity, num_kv_blocks = a.num_kv_blocks;
  p.blocks = call.get<std::int32_t>("blocks", kInt, {batch, heads, num_tiles, capacity});
  p.offsets = call.get<std::int32_t>("offsets", kInt, {batch, heads, num_kv_blocks + 1});
  p.tiles = call.get<std::int32_t>("tiles", kInt, {batch, heads, entries});
  p.slots = call.get<std::int32_t>("slots", kInt, {batch, heads, entries});
  p.cursors = call.get<std::int32_t>("cursors", kInt, {batch, heads, num_parts, num_kv_blocks});
  p.rows = static_cast<int>(batch * heads);
  p.num_tiles = static_cast<int>(num_tiles);
  p.num_kv_blocks = a.num_kv_blocks;
  p.num_parts = static_cast<int>(num_parts);
  p.tiles_per_part = static_cast<int>((num_tiles + num_parts - 1) / num_parts);
  p.capacity = static_cast<int>(capacity);
  return p;
}

template <class... Stream>
ffi::Error inverse(ffi::RemainingArgs args, ffi::RemainingRets rets, InverseAttributes attributes,
                   Stream... stream) {
  Call call(args, rets, {"blocks", "offsets", "tiles", "slots", "cursors"}, 4);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const InversionParams params = read_inversion(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  return result_of(invert_plan(params, context_of(call, attributes.seed, stream...)));
}

constexpr auto kUnions = SPARSE_ATTN_HANDLER(unions);
constexpr auto kInverse = SPARSE_ATTN_HANDLER(inverse);

}  // namespace
}  // namespace sparse_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sparse_attn::UnionAttributes,
                                      ::xla::ffi::StructMember<std::int32_t>("num_kv_blocks"),
                                      ::xla::ffi::StructMember<std::int32_t>("q_block_size"),
                                      ::xla::ffi::StructMember<std::int32_t>("tile_size"),
                                      ::xla::ffi::StructMember<std::int32_t>("row_group_tokens"),
                                      ::xla::ffi::StructMember<std::int32_t>("window_blocks"),
                                      ::xla::ffi::StructMember<std::int64_t>("seed"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sparse_attn::InverseAttributes,
                                      ::xla::ffi::StructMember<std::int32_t>("num_kv_blocks"),
                                      ::xla::ffi::StructMember<std::int64_t>("seed"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_plan_unions, sparse_attn::kUnions,
                              sparse_attn::bind_handler<sparse_attn::UnionAttributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_plan_inverse, sparse_attn::kInverse,
                              sparse_attn::bind_handler<sparse_attn::InverseAttributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
