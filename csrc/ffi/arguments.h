// What the custom calls of attention are given: arrays and attributes, checked as they come from
// outside of Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "launchers.h"
#include "xla/ffi/api/ffi.h"

namespace sparse_attn {

namespace ffi = xla::ffi;

inline std::string shape_text(ffi::Span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Keeps the first error.
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
    if (error_ || x.element_type() == expected) return;
    std::ostringstream text;
    text << name << " has dtype " << x.element_type() << "; needed is " << expected;
    error_ = text.str();
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

// The arguments and results of a call, by position, with the names that errors give them.
class Call {
 public:
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, std::vector<const char*> names,
       std::size_t num_results)
      : names_(std::move(names)) {
    const std::size_t num_args = names_.size() - num_results;
    if (args.size() != num_args || rets.size() != num_results) {
      check.fail(std::to_string(args.size()) + " arguments and " + std::to_string(rets.size()) +
                 " results; needed are " + std::to_string(num_args) + " and " +
                 std::to_string(num_results));
      return;
    }
    for (std::size_t i = 0; i < args.size(); ++i) arrays_.push_back(*args.get<ffi::AnyBuffer>(i));
    num_args_ = arrays_.size();
    for (std::size_t i = 0; i < rets.size(); ++i) arrays_.push_back(**rets.get<ffi::AnyBuffer>(i));
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      const auto shape = arrays_[i].dimensions();
      if (std::any_of(shape.begin(), shape.end(), [](auto size) { return size > INT32_MAX; })) {
        check.fail(std::string(names_[i]) + " has shape " + shape_text(shape) +
                   "; a dimension is at most 2147483647");
      }
    }
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

  // The dtype of the array that a variant of the kernels is chosen by, after a check.
  ffi::DataType input_dtype(const std::string& name) {
    const auto dtype = (*this)[name].element_type();
    check.require(dtype == ffi::DataType::BF16 || dtype == ffi::DataType::F16,
                  (name + " must be bfloat16 or float16").c_str());
    return dtype;
  }
  // The same, as the kernels name it.
  Dtype kernel_dtype(const std::string& name) const {
    return (*this)[name].element_type() == ffi::DataType::BF16 ? Dtype::kBFloat16 : Dtype::kFloat16;
  }

#if SPARSE_ATTN_HOST_SIM
  // What a launch may touch. Results start as NaN.
  std::vector<host_sim::Buffer> buffers() const {
    std::vector<host_sim::Buffer> all;
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      const bool is_result = i >= num_args_;
      all.push_back({arrays_[i].untyped_data(), arrays_[i].size_bytes(), is_result, names_[i]});
      if (is_result)
        std::memset(arrays_[i].untyped_data(), host_sim::kPoison, arrays_[i].size_bytes());
    }
    return all;
  }
#endif

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
  std::int64_t seed;  // the order in which a simulated grid runs
  std::int32_t arch;  // of the kernels
};

// The leading axis of an array that may have fewer rows than the batch; 1 for an option that is
// off.
inline std::int64_t rows_that_divide(Call& call, const std::string& name, std::int64_t batch) {
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
inline AttentionInputs read_inputs(Call& call, const Attributes& attributes) {
  AttentionInputs in{};
  Checker& check = call.check;
  const auto q_shape = call["query"].dimensions(), k_shape = call["key"].dimensions();
  const auto list_shape = call["blocks"].dimensions(),
             position_shape = call["q_positions"].dimensions();
  check.require(q_shape.size() == 4 && k_shape.size() == 4, "query and key need four dimensions");
  check.require(list_shape.size() == 4 && position_shape.size() == 2,
                "blocks needs four dimensions, q_positions two");
  const auto dtype = call.input_dtype("query");
  if (check.error()) return in;
  const std::int64_t batch = q_shape[0], q_len = q_shape[1], num_q_heads = q_shape[2],
                     head_dim = q_shape[3];
  const std::int64_t kv_len = k_shape[1], num_kv_heads = k_shape[2];
  const std::int64_t num_tiles = list_shape[2], capacity = list_shape[3];
  const auto [scale, soft_cap, block_size, tile_size, group_tokens, group_heads, is_causal, seed,
              arch] = attributes;
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
  check.require(membership.element_count() == 0 || membership.dimensions().size() == 5,
                "membership needs five dimensions");
  if (check.error()) return in;
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

inline const std::vector<const char*> kInputNames = {
    "query",       "key",         "value",        "key_bias",     "blocks",
    "counts",      "membership",  "q_positions",  "kv_positions", "q_segments",
    "kv_segments", "window_left", "window_right", "num_sinks"};

inline std::vector<const char*> names_of_call(std::vector<const char*> more) {
  std::vector<const char*> names = kInputNames;
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

}  // namespace sparse_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sparse_attn::Attributes,
                                      ::xla::ffi::StructMember<float>("scale"),
                                      ::xla::ffi::StructMember<float>("logits_soft_cap"),
                                      ::xla::ffi::StructMember<std::int32_t>("kv_block_size"),
                                      ::xla::ffi::StructMember<std::int32_t>("tile_size"),
                                      ::xla::ffi::StructMember<std::int32_t>("row_group_tokens"),
                                      ::xla::ffi::StructMember<std::int32_t>("row_group_heads"),
                                      ::xla::ffi::StructMember<bool>("is_causal"),
                                      ::xla::ffi::StructMember<std::int64_t>("seed"),
                                      ::xla::ffi::StructMember<std::int32_t>("arch"));
