// What a kernel is called with: one struct per entry point, plain data. Shapes stand beside the
// pointers; T is the query's dtype.
#pragma once

#include <cstdint>

namespace sparse_attn {

// The union of the lists of each query tile, as `TilePlan` has it.
struct PlanParams {
  const std::int32_t* blocks;  // [plan_batch, plan_heads, num_tiles, capacity], ascending, then -1
  const std::int32_t* counts;  // [plan_batch, plan_heads, num_tiles]
  const std::uint32_t* membership;  // [plan_batch, plan_heads, num_tiles, capacity, num_words];
                                    // null: all rows chose all
  int plan_batch;                   // 1 or batch
  int plan_heads;                   // 1 or num_kv_heads
  int num_tiles;
  int capacity;
  int num_words;
  int tile_size;         // tokens
  int row_group_tokens;  // rows of a tile that share a list: so many tokens,
  int row_group_heads;   // of so many query heads
};

// What is visible inside of the listed blocks. A null pointer is an option that is off.
struct TokenMaskParams {
  const std::int32_t* q_positions;   // [position_batch, q_len]
  const std::int32_t* kv_positions;  // [kv_len]; null: key j is at position j
  const std::int32_t* q_segments;    // [batch, q_len]
  const std::int32_t* kv_segments;   // [batch, kv_len]
  const std::int32_t* window_left;   // [num_q_heads]
  const std::int32_t* window_right;  // [num_q_heads]
  const std::int32_t* num_sinks;     // [num_q_heads]
  int position_batch;                // 1 or batch
  bool is_causal;
};

struct AttentionShape {
  int batch, q_len, kv_len, num_q_heads, num_kv_heads;
  int kv_block_size;
};

// What forward and backward read.
struct AttentionInputs {
  AttentionShape shape;
  PlanParams plan;
  TokenMaskParams mask;
  const void* query;      // T [batch, q_len, num_q_heads, head_dim]
  const void* key;        // T [batch, kv_len, num_kv_heads, head_dim]
  const void* value;      // T [batch, kv_len, num_kv_heads, head_dim]
  const float* key_bias;  // [batch, num_kv_heads, kv_len] or null
  float scale;
  float logits_soft_cap;  // 0: none
};

struct AttentionForwardParams {
  AttentionInputs in;
  void* out;   // T [batch, q_len, num_q_heads, head_dim]
  float* lse;  // [batch, q_len, num_q_heads], natural logarithm
};

struct AttentionBackwardParams {
  AttentionInputs in;
  const void* d_out;                    // T [batch, q_len, num_q_heads, head_dim]
  const float* lse;                     // [batch, q_len, num_q_heads]
  const float* delta;                   // [batch, q_len, num_q_heads]: sum(out * d_out) - d_lse
  const std::int32_t* inverse_offsets;  // [plan_batch, plan_heads, num_kv_blocks + 1]
  const std::int32_t* inverse_tiles;    // [plan_batch, plan_heads, num_tiles * capacity]
  const std::int32_t* inverse_slots;    // as inverse_tiles
  void* d_query;                        // T, as query
  void* d_key;                          // T, as key
  void* d_value;                        // T, as value
  float* d_key_bias;                    // as key_bias, or null
};

}  // namespace sparse_attn
