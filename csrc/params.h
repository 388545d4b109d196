// What a kernel is called with: one struct per entry point, plain data. Shapes stand beside the
// pointers; T is the query's dtype.
//
// Arrays whose first axis is named otherwise than `batch` may have fewer rows, a divisor of
// `batch`: batch row b reads row b modulo that number. A mapped axis that only some of the arrays
// have costs no copies of the others.
#pragma once

#include <cstdint>

namespace sparse_attn {

// The union of the lists of each query tile, as `TilePlan` has it.
struct PlanParams {
  const std::int32_t* blocks;  // [plan_batch, plan_heads, num_tiles, capacity], ascending, then -1
  const std::int32_t* counts;  // [plan_batch, plan_heads, num_tiles]
  const std::uint32_t* membership;  // [plan_batch, plan_heads, num_tiles, capacity, num_words];
                                    // null: all rows chose all
  int plan_batch;
  int plan_heads;  // 1 or num_kv_heads
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
  const std::int32_t* kv_positions;  // [kv_position_batch, kv_len]; null: key j is at position j
  const std::int32_t* q_segments;    // [batch, q_len]
  const std::int32_t* kv_segments;   // [batch, kv_len]
  const std::int32_t* window_left;   // [window_left_batch, num_q_heads]
  const std::int32_t* window_right;  // [window_right_batch, num_q_heads]
  const std::int32_t* num_sinks;     // [num_sinks_batch, num_q_heads]
  int position_batch, kv_position_batch;
  int window_left_batch, window_right_batch, num_sinks_batch;
  bool is_causal;
};

struct AttentionShape {
  int batch, q_len, kv_len, num_q_heads, num_kv_heads;
  int key_batch;
  int kv_block_size;
};

// What forward and backward read.
struct AttentionInputs {
  AttentionShape shape;
  PlanParams plan;
  TokenMaskParams mask;
  const void* query;      // T [batch, q_len, num_q_heads, head_dim]
  const void* key;        // T [key_batch, kv_len, num_kv_heads, head_dim]
  const void* value;      // T [key_batch, kv_len, num_kv_heads, head_dim]
  const float* key_bias;  // [key_batch, num_kv_heads, kv_len] or null
  float scale;
  float logits_soft_cap;  // 0: none
};

struct AttentionForwardParams {
  AttentionInputs in;
  void* out;   // T [batch, q_len, num_q_heads, head_dim]
  float* lse;  // [batch, q_len, num_q_heads], natural logarithm
};

// For each KV block the tiles that chose it, as `TilePlan` has it, and how long lists are split.
struct InverseParams {
  const std::int32_t* offsets;  // [plan_batch, plan_heads, num_kv_blocks + 1]
  const std::int32_t* tiles;    // [plan_batch, plan_heads, num_tiles * capacity]
  const std::int32_t* slots;    // as tiles
  const std::int32_t* parts;    // [plan_batch, plan_heads, num_kv_blocks + 1], where the parts
                                // of each block start; one block has at least one
  const std::int32_t* first_partials;  // [plan_batch, plan_heads, num_kv_blocks], for blocks of
                                       // several parts: where their sums start in `partials`
  int num_partials;
};

struct AttentionBackwardParams {
  AttentionInputs in;
  const void* d_out;   // T [batch, q_len, num_q_heads, head_dim]
  const float* lse;    // [batch, q_len, num_q_heads]
  const float* delta;  // [batch, q_len, num_q_heads]: sum(out * d_out) - d_lse
  InverseParams inverse;
  float* partials;    // [batch, num_kv_heads, num_partials, kv_block_size, 2 * head_dim + 2]
  void* d_query;      // T, as query
  void* d_key;        // T [batch, kv_len, num_kv_heads, head_dim]
  void* d_value;      // as d_key
  float* d_key_bias;  // [batch, num_kv_heads, kv_len] or null
};

}  // namespace sparse_attn
