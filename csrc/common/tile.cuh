// A query tile: which rows it has, which blocks it lists, and what each row may see of them.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

#if SPARSE_ATTN_HOST_SIM
#define SPARSE_ATTN_UNROLL
#else
#define SPARSE_ATTN_UNROLL _Pragma("unroll")
#endif

namespace sparse_attn {

// Rows are (token, query head of the group), token-major. Offsets are 64-bit: q_len * num_q_heads *
// head_dim may exceed 2^31.
struct Tile {
  int batch, kv_head, index;
  int group_size;
  int first_token;
  int num_rows;  // those of tokens before q_len

  __device__ Tile(const AttentionShape& shape, const PlanParams& plan, int batch, int kv_head,
                  int index)
      : batch(batch),
        kv_head(kv_head),
        index(index),
        group_size(shape.num_q_heads / shape.num_kv_heads),
        first_token(index * plan.tile_size) {
    const int tokens = shape.q_len - first_token;
    num_rows = (tokens < plan.tile_size ? tokens : plan.tile_size) * group_size;
  }

  __device__ int token(int row) const { return first_token + row / group_size; }
  __device__ int q_head(int row) const { return kv_head * group_size + row % group_size; }
  // Of a row in [batch, q_len, num_q_heads].
  __device__ std::int64_t row_offset(const AttentionShape& shape, int row) const {
    return (static_cast<std::int64_t>(batch) * shape.q_len + token(row)) * shape.num_q_heads +
           q_head(row);
  }
  // Of a key in [batch, kv_len, num_kv_heads].
  __device__ std::int64_t key_offset(const AttentionShape& shape, int key) const {
    return (static_cast<std::int64_t>(batch) * shape.kv_len + key) * shape.num_kv_heads + kv_head;
  }
  // Of the tile's list in [plan_batch, plan_heads, num_tiles].
  __device__ std::int64_t list_offset(const PlanParams& plan) const {
    const int b = plan.plan_batch == 1 ? 0 : batch, h = plan.plan_heads == 1 ? 0 : kv_head;
    return (static_cast<std::int64_t>(b) * plan.plan_heads + h) * plan.num_tiles + index;
  }
};

// What decides, for one row, which keys it sees. A row beyond the tile's sees none.
class RowMask {
 public:
  __device__ RowMask(const AttentionShape& shape, const PlanParams& plan,
                     const TokenMaskParams& mask, const Tile& tile, int row)
      : is_row_(row < tile.num_rows) {
    if (!is_row_) return;
    const int token = tile.token(row), head = tile.q_head(row);
    const std::int64_t batch = mask.position_batch == 1 ? 0 : tile.batch;
    position_ = ptx::load_global(mask.q_positions + batch * shape.q_len + token);
    if (mask.q_segments != nullptr) {
      segment_ = ptx::load_global(mask.q_segments +
                                  static_cast<std::int64_t>(tile.batch) * shape.q_len + token);
    }
    // Differences are taken in 64 bits: a window may be as large as int32.
    if (mask.window_left != nullptr)
      first_ = std::int64_t{position_} - ptx::load_global(mask.window_left + head);
    if (mask.window_right != nullptr)
      last_ = std::int64_t{position_} + ptx::load_global(mask.window_right + head);
    if (mask.num_sinks != nullptr) num_sinks_ = ptx::load_global(mask.num_sinks + head);
    const int head_groups = tile.group_size / plan.row_group_heads;
    group_ = row / tile.group_size / plan.row_group_tokens * head_groups +
             row % tile.group_size / plan.row_group_heads;
  }

  // Whether the row chose the block in a slot of its tile's list.
  __device__ bool chose(const PlanParams& plan, std::int64_t slot_offset) const {
    if (!is_row_ || plan.membership == nullptr) return is_row_;
    return ptx::load_global(plan.membership + slot_offset * plan.num_words + group_ / 32) >>
               (group_ % 32) &
           1;
  }

  // Whether the row may see a key, kv_len aside, of a block that it chose.
  __device__ bool sees(const TokenMaskParams& mask, int key_position, int key_segment) const {
    if (mask.is_causal && key_position > position_) return false;
    if (mask.q_segments != nullptr && key_segment != segment_) return false;
    const bool is_near = key_position >= first_ && key_position <= last_;
    return is_near || (mask.num_sinks != nullptr && key_position < num_sinks_);
  }

 private:
  bool is_row_;
  int position_ = 0, segment_ = 0, num_sinks_ = 0, group_ = 0;
  std::int64_t first_ = INT64_MIN, last_ = INT64_MAX;
};

}  // namespace sparse_attn
