// The SM80 kernels as XLA custom calls for the platform "cpu", run by the simulator.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sm80/attention_backward.cuh"
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
  void dtype(const char* name, const ffi::AnyBuffer& x, ffi::DataType expected) {
    if (!error_ && x.element_type() != expected)
      error_ = std::string(name) + " has the wrong dtype";
  }
  void fail(std::string what) {
    if (!error_) error_ = std::move(what);
  }
  void require(bool condition, const char* what) {
    if (!condition) fail(what);
  }
  std::optional<std::string> error() const { return error_; }

 private:
  std::optional<std::string> error_;
};

using Buffers = std::vector<host_sim::Buffer>;

// The arguments and results of a call, by position, with the names that errors give them.
class Call {
 public:
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, std::vector<const char*> names,
       std::size_t num_results)
      : names_(std::move(names)) {
    check.require(args.size() + num_results == names_.size() && rets.size() == num_results,
                  "wrong number of arguments or results");
    if (check.error()) return;
    for (std::size_t i = 0; i < args.size(); ++i) arrays_.push_back(*args.get<ffi::AnyBuffer>(i));
    num_args_ = arrays_.size();
    for (std::size_t i = 0; i < rets.size(); ++i) arrays_.push_back(**rets.get<ffi::AnyBuffer>(i));
  }

  const ffi::AnyBuffer& operator[](const std::string& name) const { return arrays_[index(name)]; }

  // The array's elements, after a check of its shape and dtype.
  template <class T>
  T* get(const std::string& name, ffi::DataType dtype, std::vector<std::int64_t> shape) {
    const auto& x = (*this)[name];
    check.dtype(name.c_str(), x, dtype);
    check.shape(name.c_str(), x, std::move(shape));
    return static_cast<T*>(x.untyped_data());
  }
  // The same, or null for an array without elements: an option that is off.
  template <class T>
  T* option(const std::string& name, ffi::DataType dtype, std::vector<std::int64_t> shape) {
    return (*this)[name].element_count() == 0 ? nullptr : get<T>(name, dtype, std::move(shape));
  }

  // What a launch may touch. Results start as NaN.
  Buffers buffers() const {
    Buffers all;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      const bool is_result = i >= num_args_;
      all.push_back({arrays_[i].untyped_data(), arrays_[i].size_bytes(), is_result, names_[i]});
      if (is_result)
        std::memset(arrays_[i].untyped_data(), host_sim::kPoison, arrays_[i].size_bytes());
    }
    return all;
  }

  Checker check;

 private:
  std::size_t index(const std::string& name) const {
    return std::find(names_.begin(), names_.end(), name) - names_.begin();
  }

  std::vector<const char*> names_;
  std::vector<ffi::AnyBuffer> arrays_;
  std::size_t num_args_ = 0;
};

constexpr auto kFloat = ffi::DataType::F32;
constexpr auto kInt = ffi::DataType::S32;

struct Attributes {
  float scale, logits_soft_cap;
  std::int32_t kv_block_size, tile_size, row_group_tokens, row_group_heads;
  bool is_causal;
  std::int64_t seed;
};

// The leading axis of an array that may have fewer rows than the batch; 1 for an option that is
// off.
std::int64_t rows_that_divide(Call& call, const std::string& name, std::int64_t batch) {
  if (call[name].element_count() == 0 || call[name].dimensions().size() == 0) return 1;
  const std::int64_t rows = call[name].dimensions()[0];
  if (rows < 1 || batch % rows != 0) {
    call.check.fail(name + " has " + std::to_string(rows) + " rows; needed is a divisor of " +
                    std::to_string(batch));
    return 1;
  }
  return rows;
}

// What forward and backward share of their arguments. Check the call's error afterwards.
AttentionInputs read_inputs(Call& call, const Attributes& attributes) {
  AttentionInputs in{};
  Checker& check = call.check;
  const auto q_shape = call["query"].dimensions(), k_shape = call["key"].dimensions();
  const auto list_shape = call["blocks"].dimensions(),
             position_shape = call["q_positions"].dimensions();
  check.require(q_shape.size() == 4 && k_shape.size() == 4, "query and key need four dimensions");
  check.require(list_shape.size() == 4 && position_shape.size() == 2,
                "blocks needs four dimensions, q_positions two");
  const auto dtype = call["query"].element_type();
  check.require(dtype == ffi::DataType::BF16 || dtype == ffi::DataType::F16,
                "query must be bfloat16 or float16");
  if (check.error()) return in;
  const std::int64_t batch = q_shape[0], q_len = q_shape[1], num_q_heads = q_shape[2],
                     head_dim = q_shape[3];
  const std::int64_t kv_len = k_shape[1], num_kv_heads = k_shape[2];
  const std::int64_t num_tiles = list_shape[2], capacity = list_shape[3];
  const auto [scale, soft_cap, block_size, tile_size, group_tokens, group_heads, is_causal, seed] =
      attributes;
  check.require(head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256,
                "head_dim must be 64, 96, 128 or 256");
  check.require(block_size == 16 || block_size == 32 || block_size == 64 || block_size == 128,
                "kv_block_size must be 16, 32, 64 or 128");
  check.require(num_kv_heads > 0 && num_q_heads % num_kv_heads == 0,
                "num_kv_heads must divide num_q_heads");
  check.require(tile_size > 0 && group_tokens > 0 && group_heads > 0,
                "tile_size and row groups must be positive");
  if (check.error()) return in;
  const std::int64_t group_size = num_q_heads / num_kv_heads;
  check.require(num_tiles == (q_len + tile_size - 1) / tile_size,
                "blocks has the wrong number of tiles");
  check.require(tile_size % group_tokens == 0 && group_size % group_heads == 0,
                "row groups must divide a tile");
  const auto& membership = call["membership"];
  const std::int64_t num_words =
      membership.element_count() == 0 ? 0 : membership.dimensions().back();
  const std::int64_t num_groups = tile_size / group_tokens * (group_size / group_heads);
  check.require(num_words == 0 ? num_groups == 1 : 32 * num_words >= num_groups,
                "membership has too few words");
  const auto rows_of = [&](const char* name) { return rows_that_divide(call, name, batch); };
  const std::int64_t plan_batch = rows_of("blocks"), key_batch = rows_of("key");
  check.require(list_shape[1] == 1 || list_shape[1] == num_kv_heads,
                "blocks must have 1 or `num_kv_heads` heads");

  in.shape = {.batch = static_cast<int>(batch),
              .q_len = static_cast<int>(q_len),
              .kv_len = static_cast<int>(kv_len),
              .num_q_heads = static_cast<int>(num_q_heads),
              .num_kv_heads = static_cast<int>(num_kv_heads),
              .key_batch = static_cast<int>(key_batch),
              .kv_block_size = block_size};
  in.plan = {
      .blocks =
          call.get<std::int32_t>("blocks", kInt, {plan_batch, list_shape[1], num_tiles, capacity}),
      .counts = call.get<std::int32_t>("counts", kInt, {plan_batch, list_shape[1], num_tiles}),
      .membership =
          call.option<std::uint32_t>("membership", ffi::DataType::U32,
                                     {plan_batch, list_shape[1], num_tiles, capacity, num_words}),
      .plan_batch = static_cast<int>(plan_batch),
      .plan_heads = static_cast<int>(list_shape[1]),
      .num_tiles = static_cast<int>(num_tiles),
      .capacity = static_cast<int>(capacity),
      .num_words = static_cast<int>(num_words),
      .tile_size = tile_size,
      .row_group_tokens = group_tokens,
      .row_group_heads = group_heads};
  const auto rows = [&](const char* name) { return static_cast<int>(rows_of(name)); };
  const auto option = [&](const char* name, std::int64_t size) {
    return call.option<std::int32_t>(name, kInt, {rows_of(name), size});
  };
  in.mask = {
      .q_positions = call.get<std::int32_t>("q_positions", kInt, {rows_of("q_positions"), q_len}),
      .kv_positions = option("kv_positions", kv_len),
      .q_segments = call.option<std::int32_t>("q_segments", kInt, {batch, q_len}),
      .kv_segments = call.option<std::int32_t>("kv_segments", kInt, {batch, kv_len}),
      .window_left = option("window_left", num_q_heads),
      .window_right = option("window_right", num_q_heads),
      .num_sinks = option("num_sinks", num_q_heads),
      .position_batch = rows("q_positions"),
      .kv_position_batch = rows("kv_positions"),
      .window_left_batch = rows("window_left"),
      .window_right_batch = rows("window_right"),
      .num_sinks_batch = rows("num_sinks"),
      .is_causal = is_causal};
  check.require((in.mask.q_segments == nullptr) == (in.mask.kv_segments == nullptr),
                "segments need both sides");
  in.query = call["query"].untyped_data();
  in.key = call.get<void>("key", dtype, {key_batch, kv_len, num_kv_heads, head_dim});
  in.value = call.get<void>("value", dtype, {key_batch, kv_len, num_kv_heads, head_dim});
  in.key_bias = call.option<float>("key_bias", kFloat, {key_batch, num_kv_heads, kv_len});
  in.scale = scale;
  in.logits_soft_cap = soft_cap;
  return in;
}

// Calls `run<T, kHeadDim, kKeys>()` for the kernel variant of a problem; chunks have at most
// `kMostKeys(head_dim)` keys.
template <class T, int kHeadDim, int kMostKeys, class Run>
void dispatch_block_size(int block_size, Run run) {
  constexpr int kLarge = kMostKeys < 64 ? kMostKeys : 64;
  if (block_size == 16) return run.template operator()<T, kHeadDim, 16>();
  if (block_size == 32) return run.template operator()<T, kHeadDim, 32>();
  run.template operator()<T, kHeadDim, kLarge>();
}

template <class T, int kMostKeysOf256, class Run>
void dispatch_head_dim(int head_dim, int block_size, Run run) {
  if (head_dim == 64) return dispatch_block_size<T, 64, 64>(block_size, run);
  if (head_dim == 96) return dispatch_block_size<T, 96, 64>(block_size, run);
  if (head_dim == 128) return dispatch_block_size<T, 128, 64>(block_size, run);
  dispatch_block_size<T, 256, kMostKeysOf256>(block_size, run);
}

template <int kMostKeysOf256, class Run>
void dispatch(const ffi::AnyBuffer& query, int block_size, Run run) {
  const int head_dim = static_cast<int>(query.dimensions()[3]);
  if (query.element_type() == ffi::DataType::BF16) {
    dispatch_head_dim<ptx::BFloat16, kMostKeysOf256>(head_dim, block_size, run);
  } else {
    dispatch_head_dim<ptx::Float16, kMostKeysOf256>(head_dim, block_size, run);
  }
}

template <class Config, class Params>
void launch(void (*kernel)(Params), unsigned x, const Params& params, const Buffers& buffers,
            std::uint64_t seed) {
  const host_sim::Dim3 grid{x, static_cast<unsigned>(params.in.shape.num_kv_heads),
                            static_cast<unsigned>(params.in.shape.batch)};
  host_sim::launch(grid, {Config::kThreads}, {.seed = seed, .shared_bytes = Config::kSharedBytes},
                   buffers, [&] { kernel(params); });
}

template <class Config>
unsigned num_slices(const AttentionInputs& in) {
  return in.plan.num_tiles * Tile::slices_per_tile(in.shape, in.plan, Config::kRows);
}

const std::vector<const char*> kInputNames = {
    "query",       "key",         "value",        "key_bias",     "blocks",
    "counts",      "membership",  "q_positions",  "kv_positions", "q_segments",
    "kv_segments", "window_left", "window_right", "num_sinks"};

std::vector<const char*> names_of_call(std::vector<const char*> more) {
  std::vector<const char*> names = kInputNames;
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

ffi::Error attention_forward(ffi::RemainingArgs args, ffi::RemainingRets rets, float scale,
                             float logits_soft_cap, std::int32_t kv_block_size,
                             std::int32_t tile_size, std::int32_t row_group_tokens,
                             std::int32_t row_group_heads, bool is_causal, std::int32_t arch,
                             std::int64_t seed) {
  Call call(args, rets, names_of_call({"out", "lse"}), 2);
  call.check.require(arch == 80, "arch must be 80");
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  AttentionForwardParams params{};
  params.in = read_inputs(call, {scale, logits_soft_cap, kv_block_size, tile_size, row_group_tokens,
                                 row_group_heads, is_causal, seed});
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const auto q = call["query"].dimensions();
  params.out = call.get<void>("out", call["query"].element_type(), {q[0], q[1], q[2], q[3]});
  params.lse = call.get<float>("lse", kFloat, {q[0], q[1], q[2]});
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const Buffers buffers = call.buffers();
  try {
    dispatch<32>(call["query"], kv_block_size, [&]<class T, int kHeadDim, int kKeys>() {
      using Config = sm80::ForwardConfig<T, kHeadDim, kKeys>;
      launch<Config>(sm80::attention_forward<Config>, num_slices<Config>(params.in), params,
                     buffers, seed);
    });
  } catch (const host_sim::Error& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

ffi::Error attention_backward(ffi::RemainingArgs args, ffi::RemainingRets rets, float scale,
                              float logits_soft_cap, std::int32_t kv_block_size,
                              std::int32_t tile_size, std::int32_t row_group_tokens,
                              std::int32_t row_group_heads, bool is_causal, std::int32_t arch,
                              std::int64_t seed, std::int32_t num_parts,
                              std::int32_t entries_per_part) {
  Call call(args, rets,
            names_of_call({"d_out", "lse", "delta", "inverse_offsets", "inverse_tiles",
                           "inverse_slots", "inverse_parts", "first_partials", "d_query", "d_key",
                           "d_value", "d_key_bias", "partials"}),
            5);
  call.check.require(arch == 80, "arch must be 80");
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  AttentionBackwardParams params{};
  params.in = read_inputs(call, {scale, logits_soft_cap, kv_block_size, tile_size, row_group_tokens,
                                 row_group_heads, is_causal, seed});
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const auto q = call["query"].dimensions(), k = call["key"].dimensions();
  const auto dtype = call["query"].element_type();
  const PlanParams& plan = params.in.plan;
  const std::int64_t entries = static_cast<std::int64_t>(plan.num_tiles) * plan.capacity;
  const std::int64_t num_kv_blocks = (k[1] + kv_block_size - 1) / kv_block_size;
  params.d_out = call.get<void>("d_out", dtype, {q[0], q[1], q[2], q[3]});
  params.lse = call.get<float>("lse", kFloat, {q[0], q[1], q[2]});
  params.delta = call.get<float>("delta", kFloat, {q[0], q[1], q[2]});
  const auto read_inverse = [&](const char* name, std::int64_t size) {
    return call.get<std::int32_t>(name, kInt, {plan.plan_batch, plan.plan_heads, size});
  };
  const auto partials_shape = call["partials"].dimensions();
  call.check.require(partials_shape.size() == 5, "partials needs five dimensions");
  call.check.require(num_parts >= num_kv_blocks && entries_per_part > 0,
                     "num_parts or entries_per_part is too small");
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const std::int64_t num_partials = partials_shape[2];
  params.inverse = {.offsets = read_inverse("inverse_offsets", num_kv_blocks + 1),
                    .tiles = read_inverse("inverse_tiles", entries),
                    .slots = read_inverse("inverse_slots", entries),
                    .parts = read_inverse("inverse_parts", num_kv_blocks + 1),
                    .first_partials = read_inverse("first_partials", num_kv_blocks),
                    .num_parts = num_parts,
                    .num_partials = static_cast<int>(num_partials),
                    .entries_per_part = entries_per_part};
  params.partials =
      call.get<float>("partials", kFloat, {q[0], k[2], num_partials, kv_block_size, 2 * k[3] + 2});
  params.d_query = call.get<void>("d_query", dtype, {q[0], q[1], q[2], q[3]});
  params.d_key = call.get<void>("d_key", dtype, {q[0], k[1], k[2], k[3]});
  params.d_value = call.get<void>("d_value", dtype, {q[0], k[1], k[2], k[3]});
  params.d_key_bias = call.option<float>("d_key_bias", kFloat, {q[0], k[2], k[1]});
  if (call.check.error()) return ffi::Error::InvalidArgument(*call.check.error());
  const Buffers buffers = call.buffers();
  try {
    dispatch<32>(call["query"], kv_block_size, [&]<class T, int kHeadDim, int kKeys>() {
      using Config = sm80::QueryGradientConfig<T, kHeadDim, kKeys>;
      launch<Config>(sm80::query_gradient<Config>, num_slices<Config>(params.in), params, buffers,
                     seed);
    });
    dispatch<64>(call["query"], kv_block_size, [&]<class T, int kHeadDim, int kKeys>() {
      using sm80::KeyGradient;
      const auto num_chunks =
          static_cast<unsigned>(params.inverse.num_parts) * (kv_block_size / kKeys);
      const auto run = [&]<KeyGradient kWhich>() {
        using Config = sm80::KeyGradientConfig<T, kHeadDim, kKeys, kWhich>;
        launch<Config>(sm80::key_gradient<Config>, num_chunks, params, buffers, seed);
      };
      if constexpr (kHeadDim <= 128) {
        run.template operator()<KeyGradient::kBoth>();
      } else {
        run.template operator()<KeyGradient::kKey>();
        run.template operator()<KeyGradient::kValue>();
      }
      using Config = sm80::SumPartialsConfig<T, kHeadDim>;
      launch<Config>(sm80::sum_partials<Config>, static_cast<unsigned>(num_kv_blocks), params,
                     buffers, seed);
    });
  } catch (const host_sim::Error& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

auto bind() {
  return ffi::Ffi::Bind()
      .RemainingArgs()
      .RemainingRets()
      .Attr<float>("scale")
      .Attr<float>("logits_soft_cap")
      .Attr<std::int32_t>("kv_block_size")
      .Attr<std::int32_t>("tile_size")
      .Attr<std::int32_t>("row_group_tokens")
      .Attr<std::int32_t>("row_group_heads")
      .Attr<bool>("is_causal")
      .Attr<std::int32_t>("arch")
      .Attr<std::int64_t>("seed");
}

}  // namespace
}  // namespace sparse_attn

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_attn_attention_forward, sparse_attn::attention_forward,
                              sparse_attn::bind());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_attn_attention_backward, sparse_attn::attention_backward,
    sparse_attn::bind().Attr<std::int32_t>("num_parts").Attr<std::int32_t>("entries_per_part"));

extern "C" const char* sparse_attn_variants() {
  static const std::string text = [] {
    std::string made;
    for (const char* dtype : {"bfloat16", "float16"})
      for (int head_dim : {64, 96, 128, 256})
        made += std::string(made.empty() ? "[" : ", ") +
                "{\"kernel\": \"attention\", \"arch\": 80, \"dtype\": \"" + dtype +
                "\", \"head_dim\": " + std::to_string(head_dim) +
                ", \"kv_block_sizes\": [16, 32, 64, 128]}";
    return made + "]";
  }();
  return text.c_str();
}
