// The kernels as XLA custom calls: on platform "CUDA", or in the simulator's build on platform
// "cpu".
#include "ffi/handlers.h"

#include "ffi/handler.h"

namespace sparse_attn {
namespace {

VariantKey key_of(const Call& call, const Attributes& attributes) {
  return {attributes.arch, call.kernel_dtype("query"),
          static_cast<int>(call["query"].dimensions()[3]), attributes.kv_block_size};
}

template <class... Stream>
ffi::Error forward(ffi::RemainingArgs args, ffi::RemainingRets rets, Attributes attributes,
                   Stream... stream) {
  Call call(args, rets, names_of_call({"out", "lse", "num_taken"}), 3);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  AttentionForwardParams params{};
  params.in = read_inputs(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const auto q = call["query"].dimensions();
  params.out = call.get<void>("out", call["query"].element_type(), {q[0], q[1], q[2], q[3]});
  params.lse = call.get<float>("lse", kFloat, {q[0], q[1], q[2]});
  params.num_taken = call.get<std::int32_t>("num_taken", kInt, {q[0], call["key"].dimensions()[2]});
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  return result_of(attention_forward(key_of(call, attributes), params,
                                     context_of(call, attributes.seed, stream...)));
}

template <class... Stream>
ffi::Error backward(ffi::RemainingArgs args, ffi::RemainingRets rets, Attributes attributes,
                    Stream... stream) {
  Call call(args, rets,
            names_of_call({"out", "d_out", "lse", "d_lse", "inverse_offsets", "inverse_tiles",
                           "inverse_slots", "inverse_parts", "first_partials", "d_query", "d_key",
                           "d_value", "d_key_bias", "delta", "partials", "num_taken"}),
            7);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  AttentionBackwardParams params{};
  params.in = read_inputs(call, attributes);
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const auto q = call["query"].dimensions(), k = call["key"].dimensions();
  const auto dtype = call["query"].element_type();
  const PlanParams& plan = params.in.plan;
  const std::int64_t entries = static_cast<std::int64_t>(plan.num_tiles) * plan.capacity;
  const std::int64_t num_kv_blocks =
      (k[1] + attributes.kv_block_size - 1) / attributes.kv_block_size;
  params.out = call.get<void>("out", dtype, {q[0], q[1], q[2], q[3]});
  params.d_out = call.get<void>("d_out", dtype, {q[0], q[1], q[2], q[3]});
  params.lse = call.get<float>("lse", kFloat, {q[0], q[1], q[2]});
  params.d_lse = call.get<float>("d_lse", kFloat, {q[0], q[1], q[2]});
  params.delta = call.get<float>("delta", kFloat, {q[0], q[1], q[2]});
  const auto partials_shape = call["partials"].dimensions();
  if (partials_shape.size() != 5)
    call.check.fail("partials has shape " + shape_text(partials_shape) + "; needed are five axes");
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const std::int64_t num_partials = partials_shape[2];
  const auto read_inverse = [&](const char* name, std::int64_t size) {
    return call.get<std::int32_t>(name, kInt, {plan.plan_batch, plan.plan_heads, size});
  };
  params.inverse = {.offsets = read_inverse("inverse_offsets", num_kv_blocks + 1),
                    .tiles = read_inverse("inverse_tiles", entries),
                    .slots = read_inverse("inverse_slots", entries),
                    .parts = read_inverse("inverse_parts", num_kv_blocks + 1),
                    .first_partials = read_inverse("first_partials", num_kv_blocks),
                    .num_partials = static_cast<int>(num_partials)};
  params.partials = call.get<float>(
      "partials", kFloat, {q[0], k[2], num_partials, attributes.kv_block_size, 2 * k[3] + 2});
  params.d_query = call.get<void>("d_query", dtype, {q[0], q[1], q[2], q[3]});
  params.d_key = call.get<void>("d_key", dtype, {q[0], k[1], k[2], k[3]});
  params.d_value = call.get<void>("d_value", dtype, {q[0], k[1], k[2], k[3]});
  params.d_key_bias = call.option<float>("d_key_bias", kFloat, {q[0], k[2], k[1]});
  params.num_taken = call.get<std::int32_t>("num_taken", kInt, {q[0], k[2]});
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  return result_of(attention_backward(key_of(call, attributes), params,
                                      context_of(call, attributes.seed, stream...)));
}

constexpr auto kForward = SPARSE_ATTN_HANDLER(forward);
constexpr auto kBackward = SPARSE_ATTN_HANDLER(backward);

}  // namespace
}  // namespace sparse_attn

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_attention_forward, sparse_attn::kForward,
                              sparse_attn::bind_handler<sparse_attn::Attributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_attention_backward, sparse_attn::kBackward,
                              sparse_attn::bind_handler<sparse_attn::Attributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
