// The SM80 forward kernel as an XLA custom call for the platform "cpu", run by the simulator.
#include <optional>
#include <string>
#include <vector>

#include "sm80/attention_forward.cuh"
#include "xla/ffi/api/ffi.h"

namespace sparse_attn {
namespace {

namespace ffi = xla::ffi;

std::string shape_text(ffi::Span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Checks the arguments as they come from outside of Python.
class Checker {
 public:
  void shape(const char* name, const ffi::AnyBuffer& x, std::vector<std::int64_t> expected) {
    if (error_) return;
    const auto found = x.dimensions();
    if (!std::equal(found.begin(), found.end(), expected.begin(), expected.end())) {
      error_ = std::string(name) + " has shape " + shape_text(found) + "; needed is " +
               shape_text({expected.data(), expected.size()});
    }
  }
  // An option that is off is an array without elements.
  template <class T>
  const T* option(const char* name, const ffi::AnyBuffer& x, std::vector<std::int64_t> expected) {
    if (x.element_count() == 0) return nullptr;
    shape(name, x, std::move(expected));
    return static_cast<const T*>(x.untyped_data());
  }
  void dtype(const char* name, const ffi::AnyBuffer& x, ffi::DataType expected) {
    if (!error_ && x.element_type() != expected)
      error_ = std::string(name) + " has the wrong dtype";
  }
  void require(bool condition, const char* what) {
    if (!error_ && !condition) error_ = what;
  }
  std::optional<std::string> error() const { return error_; }

 private:
  std::optional<std::string> error_;
};

template <class Config>
void run(const AttentionForwardParams& params, const std::vector<host_sim::Buffer>& buffers,
         std::uint64_t seed) {
  const host_sim::Dim3 grid{static_cast<unsigned>(params.plan.num_tiles),
                            static_cast<unsigned>(params.shape.num_kv_heads),
                            static_cast<unsigned>(params.shape.batch)};
  host_sim::launch(grid, {Config::kThreads}, {.seed = seed, .shared_bytes = Config::kSharedBytes},
                   buffers, [&] { sm80::attention_forward<Config>(params); });
}

template <class T, int kHeadDim>
void run_block_size(const AttentionForwardParams& params,
                    const std::vector<host_sim::Buffer>& buffers, std::uint64_t seed) {
  switch (params.shape.kv_block_size) {
    case 16:
      return run<sm80::ForwardConfig<T, kHeadDim, 16, 4>>(params, buffers, seed);
    case 32:
      return run<sm80::ForwardConfig<T, kHeadDim, 32, 4>>(params, buffers, seed);
    default:
      return run<sm80::ForwardConfig<T, kHeadDim, 64, 4>>(params, buffers, seed);
  }
}

template <class T>
void run_head_dim(int head_dim, const AttentionForwardParams& params,
                  const std::vector<host_sim::Buffer>& buffers, std::uint64_t seed) {
  switch (head_dim) {
    case 64:
      return run_block_size<T, 64>(params, buffers, seed);
    case 96:
      return run_block_size<T, 96>(params, buffers, seed);
    case 128:
      return run_block_size<T, 128>(params, buffers, seed);
    default:
      return run_block_size<T, 256>(params, buffers, seed);
  }
}

ffi::Error attention_forward(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                             ffi::AnyBuffer key_bias, ffi::AnyBuffer blocks, ffi::AnyBuffer counts,
                             ffi::AnyBuffer membership, ffi::AnyBuffer q_positions,
                             ffi::AnyBuffer kv_positions, ffi::AnyBuffer q_segments,
                             ffi::AnyBuffer kv_segments, ffi::AnyBuffer window_left,
                             ffi::AnyBuffer window_right, ffi::AnyBuffer num_sinks,
                             ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                             float scale, float logits_soft_cap, std::int32_t kv_block_size,
                             std::int32_t tile_size, std::int32_t row_group_tokens,
                             std::int32_t row_group_heads, bool is_causal, std::int64_t seed) {
  const auto q_shape = query.dimensions(), k_shape = key.dimensions(),
             list_shape = blocks.dimensions();
  if (q_shape.size() != 4 || k_shape.size() != 4 || list_shape.size() != 4) {
    return ffi::Error::InvalidArgument("query, key and blocks need four dimensions");
  }
  const std::int64_t batch = q_shape[0], q_len = q_shape[1], num_q_heads = q_shape[2],
                     head_dim = q_shape[3];
  const std::int64_t kv_len = k_shape[1], num_kv_heads = k_shape[2];
  const std::int64_t num_tiles = list_shape[2], capacity = list_shape[3];
  const std::int64_t num_words =
      membership.element_count() == 0 ? 0 : membership.dimensions().back();
  const std::int64_t position_batch =
      q_positions.dimensions().size() == 2 ? q_positions.dimensions()[0] : 0;

  Checker check;
  const auto dtype = query.element_type();
  check.require(dtype == ffi::DataType::BF16 || dtype == ffi::DataType::F16,
                "query must be bfloat16 or float16");
  check.require(head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256,
                "head_dim must be 64, 96, 128 or 256");
  check.require(
      kv_block_size == 16 || kv_block_size == 32 || kv_block_size == 64 || kv_block_size == 128,
      "kv_block_size must be 16, 32, 64 or 128");
  check.require(num_kv_heads > 0 && num_q_heads % num_kv_heads == 0,
                "num_kv_heads must divide num_q_heads");
  if (check.error()) return ffi::Error::InvalidArgument(*check.error());
  const std::int64_t group_size = num_q_heads / num_kv_heads;
  check.require(tile_size > 0 && tile_size * group_size <= 64,
                "tile_size * group_size must be 1 to 64");
  check.require(num_tiles == (q_len + tile_size - 1) / (tile_size > 0 ? tile_size : 1),
                "blocks has the wrong number of tiles");
  check.require(row_group_tokens > 0 && row_group_heads > 0, "row groups must not be empty");
  if (check.error()) return ffi::Error::InvalidArgument(*check.error());
  check.require(tile_size % row_group_tokens == 0 && group_size % row_group_heads == 0,
                "row groups must divide a tile");
  const std::int64_t num_groups = tile_size / row_group_tokens * (group_size / row_group_heads);
  check.require(num_words == 0 ? num_groups == 1 : 32 * num_words >= num_groups,
                "membership has too few words");
  check.require(position_batch == 1 || position_batch == batch,
                "q_positions must be [1 or batch, q_len]");
  check.require(list_shape[0] == 1 || list_shape[0] == batch, "blocks must have 1 or `batch` rows");
  check.require(list_shape[1] == 1 || list_shape[1] == num_kv_heads,
                "blocks must have 1 or `num_kv_heads` heads");
  check.shape("key", key, {batch, kv_len, num_kv_heads, head_dim});
  check.shape("value", value, {batch, kv_len, num_kv_heads, head_dim});
  check.dtype("key", key, dtype);
  check.dtype("value", value, dtype);
  check.dtype("blocks", blocks, ffi::DataType::S32);
  check.dtype("counts", counts, ffi::DataType::S32);
  check.dtype("membership", membership, ffi::DataType::U32);
  check.dtype("key_bias", key_bias, ffi::DataType::F32);
  for (const auto* x : {&q_positions, &kv_positions, &q_segments, &kv_segments, &window_left,
                        &window_right, &num_sinks}) {
    check.dtype("an array of the token mask", *x, ffi::DataType::S32);
  }
  check.shape("counts", counts, {list_shape[0], list_shape[1], num_tiles});
  check.shape("q_positions", q_positions, {position_batch, q_len});

  AttentionForwardParams params{};
  params.shape = {static_cast<int>(batch),        static_cast<int>(q_len),
                  static_cast<int>(kv_len),       static_cast<int>(num_q_heads),
                  static_cast<int>(num_kv_heads), kv_block_size};
  params.plan.blocks = static_cast<const std::int32_t*>(blocks.untyped_data());
  params.plan.counts = static_cast<const std::int32_t*>(counts.untyped_data());
  params.plan.membership = check.option<std::uint32_t>(
      "membership", membership, {list_shape[0], list_shape[1], num_tiles, capacity, num_words});
  params.plan.plan_batch = static_cast<int>(list_shape[0]);
  params.plan.plan_heads = static_cast<int>(list_shape[1]);
  params.plan.num_tiles = static_cast<int>(num_tiles);
  params.plan.capacity = static_cast<int>(capacity);
  params.plan.num_words = static_cast<int>(num_words);
  params.plan.tile_size = tile_size;
  params.plan.row_group_tokens = row_group_tokens;
  params.plan.row_group_heads = row_group_heads;
  params.mask.q_positions = static_cast<const std::int32_t*>(q_positions.untyped_data());
  params.mask.kv_positions = check.option<std::int32_t>("kv_positions", kv_positions, {kv_len});
  params.mask.q_segments = check.option<std::int32_t>("q_segments", q_segments, {batch, q_len});
  params.mask.kv_segments = check.option<std::int32_t>("kv_segments", kv_segments, {batch, kv_len});
  params.mask.window_left = check.option<std::int32_t>("window_left", window_left, {num_q_heads});
  params.mask.window_right =
      check.option<std::int32_t>("window_right", window_right, {num_q_heads});
  params.mask.num_sinks = check.option<std::int32_t>("num_sinks", num_sinks, {num_q_heads});
  params.mask.position_batch = static_cast<int>(position_batch);
  params.mask.is_causal = is_causal;
  params.query = query.untyped_data();
  params.key = key.untyped_data();
  params.value = value.untyped_data();
  params.key_bias = check.option<float>("key_bias", key_bias, {batch, num_kv_heads, kv_len});
  params.out = out->untyped_data();
  params.lse = static_cast<float*>(lse->untyped_data());
  params.scale = scale;
  params.logits_soft_cap = logits_soft_cap;
  check.require((params.mask.q_segments == nullptr) == (params.mask.kv_segments == nullptr),
                "segments need both sides");
  check.shape("out", *out, {batch, q_len, num_q_heads, head_dim});
  check.shape("lse", *lse, {batch, q_len, num_q_heads});
  check.dtype("out", *out, dtype);
  check.dtype("lse", *lse, ffi::DataType::F32);
  if (check.error()) return ffi::Error::InvalidArgument(*check.error());

  std::vector<host_sim::Buffer> buffers;
  const auto add = [&](const char* name, const ffi::AnyBuffer& x, bool is_writable) {
    buffers.push_back({x.untyped_data(), x.size_bytes(), is_writable, name});
    if (is_writable) std::memset(x.untyped_data(), host_sim::kPoison, x.size_bytes());
  };
  add("query", query, false);
  add("key", key, false);
  add("value", value, false);
  add("key_bias", key_bias, false);
  add("blocks", blocks, false);
  add("counts", counts, false);
  add("membership", membership, false);
  add("q_positions", q_positions, false);
  add("kv_positions", kv_positions, false);
  add("q_segments", q_segments, false);
  add("kv_segments", kv_segments, false);
  add("window_left", window_left, false);
  add("window_right", window_right, false);
  add("num_sinks", num_sinks, false);
  add("out", *out, true);
  add("lse", *lse, true);
  try {
    const auto n = static_cast<std::uint64_t>(seed);
    if (dtype == ffi::DataType::BF16) {
      run_head_dim<ptx::BFloat16>(static_cast<int>(head_dim), params, buffers, n);
    } else {
      run_head_dim<ptx::Float16>(static_cast<int>(head_dim), params, buffers, n);
    }
  } catch (const host_sim::Error& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace sparse_attn

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_attention_forward, sparse_attn::attention_forward,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("logits_soft_cap")
                                  .Attr<std::int32_t>("kv_block_size")
                                  .Attr<std::int32_t>("tile_size")
                                  .Attr<std::int32_t>("row_group_tokens")
                                  .Attr<std::int32_t>("row_group_heads")
                                  .Attr<bool>("is_causal")
                                  .Attr<std::int64_t>("seed"));
