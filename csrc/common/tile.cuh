// A query tile: which rows it has, which blocks it lists, and what each row may see of them.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace sparse_attn {

// A tile's rows are (token, query head of the group), token-major. A kernel computes on a slice of
// `kRows` of them at a time; `row` counts within the slice. Offsets are 64-bit: q_len * num_q_heads
// * head_dim may exceed 2^31.
struct Tile {
  int batch, kv_head, index;
  int group_size;
  int first_row;  // of the slice, in the tile
  int num_rows;   // of the slice, those of tokens before q_len; may be negative
  int first_token;

  __device__ Tile(const AttentionShape& shape, const PlanParams& plan, int rows_per_slice,
                  int batch, int kv_head, int slice)
      : batch(batch), kv_head(kv_head), group_size(shape.num_q_heads / shape.num_kv_heads) {
    const int slices = slices_per_tile(shape, plan, rows_per_slice);
    index = slice / slices;
    first_row = slice % slices * rows_per_slice;
    first_token = index * plan.tile_size;
    const int tokens = shape.q_len - first_token;
    const int rows = (tokens < plan.tile_size ? tokens : plan.tile_size) * group_size - first_row;
    num_rows = rows < rows_per_slice ? rows : rows_per_slice;
  }

  __host__ __device__ static int slices_per_tile(const AttentionShape& shape,
                                                 const PlanParams& plan, int rows_per_slice) {
    const int rows = plan.tile_size * (shape.num_q_heads / shape.num_kv_heads);
    return (rows + rows_per_slice - 1) / rows_per_slice;
  }

  // So many rows of the slice from `row` on, where it has as many.
  __device__ Tile part(int row, int rows) const {
    Tile part = *this;
    part.first_row += row;
    part.num_rows = num_rows - row < rows ? num_rows - row : rows;
    return part;
  }

  __device__ int token(int row) const { return first_token + (first_row + row) / group_size; }
  __device__ int q_head(int row) const {
    return kv_head * group_size + (first_row + row) % group_size;
  }
  // Of a row in [batch, q_len, num_q_heads].
  __device__ std::int64_t row_offset(const AttentionShape& shape, int row) const {
    return (static_cast<std::int64_t>(batch) * shape.q_len + token(row)) * shape.num_q_heads +
           q_head(row);
  }
  // Of a key in [batch, kv_len, num_kv_heads].
  __device__ std::int64_t key_offset(const AttentionShape& shape, int key) const {
    return (static_cast<std::int64_t>(batch % shape.key_batch) * shape.kv_len + key) *
               shape.num_kv_heads +
           kv_head;
  }
  // Of the tile's list in [plan_batch, plan_heads, num_tiles].
  __device__ std::int64_t list_offset(const PlanParams& plan) const {
    const int b = batch % plan.plan_batch, h = plan.plan_heads == 1 ? 0 : kv_head;
    return (static_cast<std::int64_t>(b) * plan.plan_heads + h) * plan.num_tiles + index;
  }
};

// How much of a set of keys is visible. Only kSome needs a look at each key.
enum class Visible { kNone, kSome, kAll };

// What decides, for one row, which keys it sees. A row beyond the tile's sees none.
struct RowMask {
  int is_row;  // and, in a table of rows, has chosen the block at hand
  int position = 0, segment = 0, num_sinks = 0;
  int first = INT32_MIN, last = INT32_MAX;  // of the window

  __device__ RowMask() : is_row(0) {}
  __device__ RowMask(const AttentionShape& shape, const TokenMaskParams& mask, const Tile& tile,
                     int row)
      : is_row(row < tile.num_rows) {
    if (!is_row) return;
    const int token = tile.token(row), head = tile.q_head(row);
    const std::int64_t batch = tile.batch % mask.position_batch;
    position = ptx::load_global(mask.q_positions + batch * shape.q_len + token);
    if (mask.q_segments != nullptr) {
      segment = ptx::load_global(mask.q_segments +
                                 static_cast<std::int64_t>(tile.batch) * shape.q_len + token);
    }
    const auto option = [&](const std::int32_t* of, int rows) {
      return ptx::load_global(of + tile.batch % rows * shape.num_q_heads + head);
    };
    // Positions and windows are at most 2^30: no sum of two overflows.
    if (mask.window_left != nullptr)
      first = position - option(mask.window_left, mask.window_left_batch);
    if (mask.window_right != nullptr)
      last = position + option(mask.window_right, mask.window_right_batch);
    if (mask.num_sinks != nullptr) num_sinks = option(mask.num_sinks, mask.num_sinks_batch);
  }

  // Whether the row may see a key of a block that it chose.
  __device__ bool sees(const TokenMaskParams& mask, int key_position, int key_segment) const {
    if (mask.is_causal && key_position > position) return false;
    if (mask.q_segments != nullptr && key_segment != segment) return false;
    const bool is_near = key_position >= first && key_position <= last;
    return is_near || (mask.num_sinks != nullptr && key_position < num_sinks);
  }

  // What `sees` says of all keys from `first_key` to `last_key` together, if their indices tell.
  __device__ Visible sees_keys(const AttentionInputs& in, int first_key, int last_key) const {
    if (in.mask.q_segments != nullptr || in.mask.kv_positions != nullptr) return Visible::kSome;
    const bool is_all_past = !in.mask.is_causal || last_key <= position,
               is_all_future = in.mask.is_causal && first_key > position,
               is_all_near = first_key >= first && last_key <= last,
               is_all_far = last_key < first || first_key > last,
               has_sinks = in.mask.num_sinks != nullptr,
               is_all_sink = has_sinks && last_key < num_sinks,
               is_no_sink = !has_sinks || first_key >= num_sinks;
    if (is_all_future || (is_all_far && is_no_sink)) return Visible::kNone;
    const bool is_plain = last_key < in.shape.kv_len && in.key_bias == nullptr;
    return is_plain && is_all_past && (is_all_near || is_all_sink) ? Visible::kAll : Visible::kSome;
  }
};

// Whether a row of the tile chose the block in a slot of its list.
__device__ __forceinline__ bool chose(const PlanParams& plan, const Tile& tile, int row,
                                      std::int64_t slot_offset) {
  if (row >= tile.num_rows || plan.membership == nullptr) return row < tile.num_rows;
  const int head_groups = tile.group_size / plan.row_group_heads;
  const int token = (tile.first_row + row) / tile.group_size,
            head = (tile.first_row + row) % tile.group_size;
  const int group = token / plan.row_group_tokens * head_groups + head / plan.row_group_heads;
  return ptx::load_global(plan.membership + slot_offset * plan.num_words + group / 32) >>
             (group % 32) &
         1;
}

// What a key brings to the mask and to its logits.
struct KeyMask {
  bool is_key;
  int position = 0, segment = 0;
  float bias = 0;

  __device__ KeyMask(const AttentionInputs& in, int batch, int kv_head, int key)
      : is_key(key < in.shape.kv_len), position(key) {
    if (!is_key) return;
    const std::int64_t kv_len = in.shape.kv_len;
    if (in.mask.kv_positions != nullptr) {
      position =
          ptx::load_global(in.mask.kv_positions + batch % in.mask.kv_position_batch * kv_len + key);
    }
    if (in.mask.kv_segments != nullptr)
      segment = ptx::load_global(in.mask.kv_segments + batch * kv_len + key);
    const std::int64_t head_row =
        (static_cast<std::int64_t>(batch % in.shape.key_batch) * in.shape.num_kv_heads + kv_head) *
        kv_len;
    if (in.key_bias != nullptr) bias = ptx::load_global(in.key_bias + head_row + key);
  }
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A logit in base 2, before the mask, and the derivative of the natural one with respect to the
// scaled product.
struct Logit {
  float base2, slope;
};

__device__ __forceinline__ Logit logit(const AttentionInputs& in, float product, float bias) {
  float x = product * in.scale, slope = 1;
  if (in.logits_soft_cap != 0) {
    // tanh y = 1 - 2 / (exp(2 y) + 1), exact to 2^-22 or so, and kernels have it for every score.
    const float y = x * ptx::reciprocal_approx(in.logits_soft_cap);
    const float capped = 1 - 2 * ptx::reciprocal_approx(ptx::exp2_approx(2 * kLog2E * y) + 1);
    x = capped * in.logits_soft_cap;
    slope = 1 - capped * capped;
  }
  return {(x + bias) * kLog2E, slope};
}

// The chunks of keys that a tile walks: parts of `kKeys` keys of each block of its list.
template <int kKeys>
class Chunks {
 public:
  __device__ Chunks(const AttentionInputs& in, const Tile& tile)
      : blocks_(in.plan.blocks),
        first_slot_(tile.list_offset(in.plan) * in.plan.capacity),
        block_size_(in.shape.kv_block_size),
        kv_len_(in.shape.kv_len) {
    const int count = ptx::load_global(in.plan.counts + tile.list_offset(in.plan));
    count_ = (count < in.plan.capacity ? count : in.plan.capacity) * (block_size_ / kKeys);
  }
  __device__ int count() const { return count_; }
  // In [plan_batch, plan_heads, num_tiles, capacity].
  __device__ std::int64_t slot(int chunk) const {
    return first_slot_ + chunk / (block_size_ / kKeys);
  }
  // -1 if the list names a block that does not exist.
  __device__ int first_key(int chunk) const {
    const std::int64_t block = ptx::load_global(blocks_ + slot(chunk));
    const std::int64_t first = block * block_size_ + chunk % (block_size_ / kKeys) * kKeys;
    return block < 0 || first >= kv_len_ ? -1 : static_cast<int>(first);
  }

 private:
  const std::int32_t* blocks_;
  std::int64_t first_slot_;
  int block_size_, kv_len_, count_;
};

}  // namespace sparse_attn
