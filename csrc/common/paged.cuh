// Where the keys of a list of blocks lie in pages, and which of them a query row sees.
#pragma once

#include "common/ptx.cuh"
#include "common/units.cuh"
#include "params.h"

namespace sparse_attn {

// Keys that follow each other in a block and in a page. The sizes of both are multiples of it.
constexpr int kRunKeys = 16;

struct alignas(8) Run {
  int place;      // in the pages, in runs; negative if there is no such run
  int first_key;  // in the sequence
};

// The rows of a CTA: (query token, query head) that read one list, token-major, up to `rows` of
// them from `first_row` on.
struct PagedTile {
  int batch, list;  // in [list_heads or num_kv_heads, list_rows]
  int kv_head, heads_per_list, first_head, first_token;
  int first_row, num_rows;

  __device__ PagedTile(const PagedAttentionParams& p, int batch, int list, int index, int rows)
      : batch(batch), list(list) {
    const int head = list / p.list_rows;
    kv_head = head / (num_heads(p) / p.num_kv_heads);
    heads_per_list = p.num_q_heads / num_heads(p);
    first_head = head * heads_per_list;
    const int tokens = p.q_len / p.list_rows;
    first_token = list % p.list_rows * tokens;
    first_row = index * rows;
    num_rows = smaller(tokens * heads_per_list - first_row, rows);
  }

  // Of lists. A list that all heads share is one for each KV head.
  SPARSE_ATTN_HOST_DEVICE static int num_heads(const PagedAttentionParams& p) {
    return p.list_heads == 1 ? p.num_kv_heads : p.list_heads;
  }
  SPARSE_ATTN_HOST_DEVICE static int rows_per_list(const PagedAttentionParams& p) {
    return p.q_len / p.list_rows * (p.num_q_heads / num_heads(p));
  }

  __device__ int token(int row) const { return first_token + (first_row + row) / heads_per_list; }
  __device__ int q_head(int row) const { return first_head + (first_row + row) % heads_per_list; }
  // Of a row in [q_len, num_q_heads].
  __device__ std::int64_t row_offset(const PagedAttentionParams& p, int row) const {
    return static_cast<std::int64_t>(token(row)) * p.num_q_heads + q_head(row);
  }
};

// The keys of a part of a list, run by run. Parts are equal to within a block, and to within 64
// keys of blocks that are a multiple of it.
class PagedKeys {
 public:
  __device__ PagedKeys(const PagedAttentionParams& p, const PagedTile& tile, int split)
      : p_(p),
        seq_len_(larger(ptx::load_global(p.seq_lens + tile.batch % p.length_batch), 0)),
        num_keys_(smaller(seq_len_, p.max_pages * p.page_size)),
        runs_per_block_(p.block_size / kRunKeys),
        pages_(p.page_table + static_cast<std::int64_t>(tile.batch % p.table_batch) * p.max_pages) {
    const int lists = p.list_heads * p.list_rows,
              list = p.list_heads == 1 ? tile.list % p.list_rows : tile.list;
    blocks_ = p.blocks +
              (static_cast<std::int64_t>(tile.batch % p.list_batch) * lists + list) * p.num_slots;
    const int count = ptx::load_global(
        p.counts + static_cast<std::int64_t>(tile.batch % p.count_batch) * lists + list);
    // No list has more blocks than a sequence.
    const int most = (p.max_pages * p.page_size - 1) / p.block_size + 1;
    const int unit = runs_per_block_ % 4 == 0 ? 4 : runs_per_block_,
              num_units =
                  smaller(larger(count, 0), smaller(p.num_slots, most)) * (runs_per_block_ / unit);
    const int shortest = num_units / p.num_splits, num_longer = num_units % p.num_splits;
    first_run_ = (split * shortest + smaller(split, num_longer)) * unit;
    num_runs_ = (shortest + (split < num_longer ? 1 : 0)) * unit;
  }

  __device__ int num_runs() const { return num_runs_; }
  __device__ int seq_len() const { return seq_len_; }
  // One that does not exist beyond the last, and for a block or page that does not.
  __device__ Run run(int i) const {
    const Run none = {-1, 0};
    if (i >= num_runs_) return none;
    const int slot = (first_run_ + i) / runs_per_block_,
              in_block = (first_run_ + i) % runs_per_block_ * kRunKeys;
    const std::int64_t block = ptx::load_global(blocks_ + slot);
    const std::int64_t first = block * p_.block_size + in_block;
    if (block < 0 || first >= num_keys_) return none;
    const int first_key = static_cast<int>(first);
    const int page = ptx::load_global(pages_ + first_key / p_.page_size);
    if (page < 0 || page >= p_.num_pages) return none;
    return {(page * p_.page_size + first_key % p_.page_size) / kRunKeys, first_key};
  }
  __device__ bool has(const Run& run, int i) const {
    return run.place >= 0 && run.first_key + i < num_keys_;
  }
  // Of key i of a run in [num_pages * page_size, num_kv_heads].
  __device__ std::int64_t row(const Run& run, int i, int kv_head) const {
    return (static_cast<std::int64_t>(run.place) * kRunKeys + i) * p_.num_kv_heads + kv_head;
  }

 private:
  const PagedAttentionParams& p_;
  int seq_len_, num_keys_, runs_per_block_;
  const std::int32_t *pages_, *blocks_;
  int first_run_, num_runs_;
};

// Which keys a row sees. A row beyond the tile's sees none.
struct PagedRowMask {
  int first = 0, last = -1, num_sinks = 0;

  // Lengths and windows are at most 2^30: no difference of two overflows.
  __device__ PagedRowMask(const PagedAttentionParams& p, const PagedTile& tile, int row,
                          int seq_len) {
    if (row >= tile.num_rows) return;
    last = seq_len - p.q_len + tile.token(row);
    const int head = tile.q_head(row);
    const auto option = [&](const std::int32_t* of, int rows) {
      return ptx::load_global(of + tile.batch % rows * p.num_q_heads + head);
    };
    if (p.window_left != nullptr) first = last - option(p.window_left, p.window_batch);
    if (p.num_sinks != nullptr) num_sinks = option(p.num_sinks, p.sinks_batch);
  }

  __device__ bool sees(int key) const { return key <= last && (key >= first || key < num_sinks); }
};

}  // namespace sparse_attn
