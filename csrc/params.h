// What a kernel is called with: one struct per entry point, plain data. Shapes stand beside the
// pointers; T is the query's dtype.
//
// Arrays whose first axis is named otherwise than `batch` may have fewer rows, a divisor of
// `batch`: batch row b reads row b modulo that number. A mapped axis that only some of the arrays
// have costs no copies of the others.
#pragma once

#include <cstdint>

#include "common/divisor.h"

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
  void* out;                // T [batch, q_len, num_q_heads, head_dim]
  float* lse;               // [batch, q_len, num_q_heads], natural logarithm
  std::int32_t* num_taken;  // scratch: how many pieces of work CTAs have taken
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
  const void* out;     // T [batch, q_len, num_q_heads, head_dim]
  const void* d_out;   // as out
  const float* lse;    // [batch, q_len, num_q_heads]
  const float* d_lse;  // as lse
  InverseParams inverse;
  float* delta;             // scratch, as lse: sum(out * d_out) - d_lse
  float* partials;          // [batch, num_kv_heads, num_partials, kv_block_size, 2 * head_dim + 2]
  void* d_query;            // T, as query
  void* d_key;              // T [batch, kv_len, num_kv_heads, head_dim]
  void* d_value;            // as d_key
  float* d_key_bias;        // [batch, num_kv_heads, kv_len] or null
  std::int32_t* num_taken;  // as that of the forward
};

// Means of keys, by which blocks are scored: unit j is that of the tokens stride * j to
// stride * j + size - 1. There is one for each such run that lies within the keys.
struct UnitParams {
  const void* keys;  // T [unit_batch, count, num_kv_heads, head_dim]
  int count, size;
  Divisor stride;
};

// How the scores of units become those of the blocks that they overlap.
enum class Pooling { kMax, kOverlapSum };
// How the probabilities of the query heads of a list become one. A mean orders as a sum does.
enum class GroupReduction { kSum, kMax };

// How the work is cut; it changes nothing in the results.
struct SelectionTiling {
  int group_rows;      // of a token: a power of two, at least its query heads that share a list
  int tile_tokens;     // a power of two
  int segment_blocks;  // whose scores are held at a time
  int list_capacity;   // of a token's running list; at least the blocks it may keep and 32
};

struct SelectionParams {
  const void* query;              // T [batch, q_len, num_q_heads, head_dim]
  UnitParams fine;                // score the blocks
  UnitParams coarse;              // give the softmax denominator, to queries that see one of them
  const std::int32_t* positions;  // [position_batch, q_len]
  std::int32_t* indices;          // [batch, num_lists, q_len, top_k], ascending, -1 last
  int batch, q_len, num_q_heads, num_kv_heads;
  int num_lists;  // num_kv_heads, or num_q_heads without a reduction over the group
  // An array with fewer rows than the batch is used again from its start: batch % rows.
  int unit_batch, position_batch;
  int num_blocks;
  Divisor block_size;
  int top_k, num_sink_blocks, num_local_blocks;
  float scale;
  bool is_causal;
  Pooling pooling;
  GroupReduction group_reduction;
  SelectionTiling tiling;
  std::int32_t* num_taken;  // scratch: how many pieces of work CTAs have taken
};

// Makes the unions of a `TilePlan`. A tile has `num_groups` row groups, those of `row_group_tokens`
// tokens for each of the `lists_per_head` query heads that have a list of their own.
struct UnionParams {
  const std::int32_t* indices;  // [batch, heads, lists_per_head, num_rows, num_slots]
  std::int32_t* blocks;         // [batch, heads, num_tiles, capacity], ascending, then -1
  std::int32_t* counts;         // [batch, heads, num_tiles]
  std::uint32_t* membership;    // [batch, heads, num_tiles, capacity, num_words], or null
  int batch, heads, num_rows, num_tiles, capacity, num_words, num_kv_blocks;
  int num_groups, tile_size, row_group_tokens;
  int window_blocks;  // that are marked at a time, a multiple of 32
  Divisor lists_per_head, num_slots, q_block_size;
};

// Makes its inverse. A tile's blocks are unique.
struct InversionParams {
  const std::int32_t* blocks;  // [rows, num_tiles, capacity]
  std::int32_t* offsets;       // [rows, num_kv_blocks + 1]
  std::int32_t* tiles;         // [rows, num_tiles * capacity], -1 last
  std::int32_t* slots;         // as tiles
  std::int32_t* cursors;       // [rows, num_parts, num_kv_blocks], scratch
  int rows, num_tiles, num_kv_blocks, num_parts;
  int tiles_per_part;
  int capacity;
};

// Attention of the last tokens of sequences over selected blocks of keys that lie in pages.
struct PagedAttentionParams {
  const void* query;               // T [batch, q_len, num_q_heads, head_dim]
  const void* key_pages;           // T [num_pages, page_size, num_kv_heads, head_dim]
  const void* value_pages;         // as key_pages
  const std::int32_t* page_table;  // [table_batch, max_pages], the pages of a sequence in order
  const std::int32_t* seq_lens;    // [length_batch], tokens, the queries included
  const std::int32_t* blocks;  // [list_batch, list_heads, list_rows, num_slots], of the sequence;
                               // unique, and before the slots that are empty
  const std::int32_t* counts;  // [count_batch, list_heads, list_rows], of slots that are not empty
  const std::int32_t* window_left;  // [window_batch, num_q_heads] or null
  const std::int32_t* num_sinks;    // [sinks_batch, num_q_heads] or null
  // Of each split; null if there is one.
  float* partial_out;       // [batch, num_splits, q_len, num_q_heads, head_dim]
  float* partial_lse_log2;  // [batch, num_splits, q_len, num_q_heads], in base 2
  void* out;                // T [batch, q_len, num_q_heads, head_dim]
  float* lse;               // [batch, q_len, num_q_heads], natural logarithm
  int batch, q_len, num_q_heads, num_kv_heads, head_dim;
  int num_pages, page_size, max_pages;
  int list_heads;  // 1, num_kv_heads or num_q_heads
  int list_rows;   // lists of a head: 1 for all query tokens, or q_len
  int num_slots, block_size, num_splits;
  // An array with fewer rows than the batch is used again from its start: batch % rows.
  int table_batch, length_batch, list_batch, count_batch, window_batch, sinks_batch;
  float scale;
  float logits_soft_cap;  // 0: none
};

// How the bounds of the query heads of a list become one: their maximum, their mean, or the bound
// of the mean of the queries.
enum class BoundReduction { kMax, kMean, kMeanQuery };

// Selects blocks by bounds on the products of a query with their keys.
struct BoundParams {
  const void* query;    // T [batch, q_len, num_q_heads, head_dim]
  const void* maximum;  // T [extrema_batch, num_blocks, num_kv_heads, head_dim], of the keys of
                        // each block; or in pages [num_pages, page_rows, num_kv_heads, head_dim]
  const void* minimum;  // as maximum
  const std::int32_t* page_table;  // [table_batch, max_pages]: block b of a sequence is row
                                   // b % page_rows of page b / page_rows; null if not in pages
  const std::int32_t* limits;      // [limit_batch, q_len, 4]: kept are the blocks before the first
                               // number and those from the second to before the third, no more than
                               // top_k; of the others, those before the fourth compete
  float* scores;          // [batch, num_lists, q_len, num_blocks], scratch
  std::int32_t* indices;  // [batch, num_lists, q_len, top_k], ascending, -1 last
  int batch, q_len, num_q_heads, num_kv_heads;
  int num_lists;  // num_kv_heads, or num_q_heads without a reduction
  int num_blocks, num_pages, page_rows, max_pages;
  // An array with fewer rows than the batch is used again from its start: batch % rows.
  int extrema_batch, table_batch, limit_batch;
  int top_k;
  BoundReduction reduction;
};

// Finds the extrema of each channel of the keys in some blocks.
struct ExtremaParams {
  const void* keys;                // T [key_batch, kv_len, num_kv_heads, head_dim], or in pages
                                   // [num_pages, page_size, num_kv_heads, head_dim]
  const std::int32_t* page_table;  // [table_batch, max_pages], the pages of a sequence in order;
                                   // null if not in pages
  const std::int32_t* blocks;      // [block_batch, num_blocks], of the sequence
  const std::int32_t* lengths;     // [length_batch]: of the tokens before
  void* maximum;  // T [batch, num_blocks, num_kv_heads, head_dim], -inf of no token
  void* minimum;  // as maximum, inf of no token
  int batch, num_blocks, block_size;
  int row_pieces;  // of 16 bytes, of the KV heads of a token
  int num_pages, page_size, max_pages;
  int kv_len;
  // An array with fewer rows than the batch is used again from its start: batch % rows.
  int key_batch, table_batch, block_batch, length_batch;
};

}  // namespace sparse_attn
