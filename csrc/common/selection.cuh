// Block selection as far as it is the same on every architecture: scores of units become scores of
// blocks, and those become lists.
#pragma once

#include "common/ptx.cuh"
#include "common/top_k.cuh"
#include "common/units.cuh"
#include "common/work_queue.cuh"
#include "params.h"

namespace sparse_attn {

// Query rows that are computed on together: `num_tokens` neighbouring tokens, with the `group_size`
// query heads that share list `list`. There may be none, or fewer.
struct SelectionTile {
  int batch, list, kv_head, group_size;
  int first_token, num_tokens;

  __device__ SelectionTile(const SelectionParams& p, int batch, int list, int index)
      : batch(batch),
        list(list),
        kv_head(list / (p.num_lists / p.num_kv_heads)),
        group_size(p.num_q_heads / p.num_lists),
        first_token(index * p.tiling.tile_tokens),
        num_tokens(smaller(p.q_len - first_token, p.tiling.tile_tokens)) {}

  // In [batch, q_len, num_q_heads].
  __device__ std::int64_t query_row(const SelectionParams& p, int slot, int head) const {
    return (static_cast<std::int64_t>(batch) * p.q_len + first_token + slot) * p.num_q_heads +
           list * group_size + head;
  }
  // In [batch, num_lists, q_len].
  __device__ std::int64_t list_row(const SelectionParams& p, int slot) const {
    return (static_cast<std::int64_t>(batch) * p.num_lists + list) * p.q_len + first_token + slot;
  }
};

// The work of selection. A piece is `tiles_per_piece` tiles that follow each other, which a CTA
// computes on at the same time.
class SelectionTiles : public WorkQueue {
 public:
  static constexpr const char* kKind =
      "tiles of queries (batch * lists * q_len / tokens of a tile)";

  __device__ SelectionTiles(const SelectionParams& p, int tiles_per_piece)
      : WorkQueue(p.num_taken, count(p, tiles_per_piece)), p_(p), tiles_(tiles_per_piece) {}

  __host__ __device__ static std::int64_t count(const SelectionParams& p, int tiles_per_piece) {
    return static_cast<std::int64_t>(p.batch) * p.num_lists * per_list(p, tiles_per_piece);
  }

  // Of a piece. All pieces of a list follow each other, because they share units; later ones first,
  // as they see more of them.
  __device__ SelectionTile tile(int piece, int index = 0) const {
    const int pieces = per_list(p_, tiles_), row = piece / pieces;
    return SelectionTile(p_, row / p_.num_lists, row % p_.num_lists,
                         (pieces - 1 - piece % pieces) * tiles_ + index);
  }

 private:
  __host__ __device__ static int per_list(const SelectionParams& p, int tiles_per_piece) {
    const std::uint32_t tokens = tiles_per_piece * p.tiling.tile_tokens, q_len = p.q_len;
    return static_cast<int>((q_len + tokens - 1) / tokens);
  }

  const SelectionParams& p_;
  int tiles_;
};

// Where a token stands among the keys.
__device__ __forceinline__ int load_position(const SelectionParams& p, const SelectionTile& tile,
                                             int slot) {
  const std::int64_t row = tile.batch % p.position_batch;
  return ptx::load_global(p.positions + row * p.q_len + tile.first_token + slot);
}

// Blocks whose scores are held together, and the units that they overlap as far as any query of the
// tile sees them.
struct Segment {
  int first_block, end_block, first_unit, end_unit;
};

// The segment that starts with `first`, of the blocks before `end`: as many as there is room for,
// but not so many that the last chunk of `kUnits` units would be all but empty.
template <int kUnits>
__device__ __forceinline__ Segment segment_from(const SelectionParams& p, int first, int end,
                                                int num_units) {
  if (first >= end) return {end, end, 0, 0};
  const int first_unit = UnitRange(p.fine, p.block_size, first).first;
  const auto end_unit = [&](int block) { return UnitRange(p.fine, p.block_size, block - 1).end; };
  int stop = smaller(end - first, p.tiling.segment_blocks) + first;
  if (stop < end) {
    const int chunks = (end_unit(stop) - first_unit) / kUnits;
    const int fitting = p.block_size.divide((first_unit + chunks * kUnits) * p.fine.stride.value);
    if (fitting > first) stop = smaller(stop, fitting);
  }
  return {first, stop, first_unit, smaller(end_unit(stop), num_units)};
}

// The sum or the larger of two numbers that are not negative. The larger has the larger bits, and
// NaN is larger than all.
template <bool kMax>
__device__ __forceinline__ float reduce(float a, float b) {
  if constexpr (!kMax) return a + b;
  return ptx::bits_of(a) > ptx::bits_of(b) ? a : b;
}

// Adds the units [first, end) of a chunk to the scores of those blocks of a segment that they
// overlap. `sum_of(unit)` is the token's sum over its rows, and `scores` has a score for each
// block. A thread has one token, and each `step`-th block from `begin` on. A score of overlaps is
// larger than its definition by the stride: the order is the same.
template <class SumOf>
__device__ __forceinline__ void pool_units(const SelectionParams& p, const Segment& segment,
                                           int begin, int step, int first, int end,
                                           std::uint32_t scores, SumOf sum_of) {
  const bool takes_max = p.pooling == Pooling::kMax;
  const int stop = smaller(segment.end_block, BlockRange(p.fine, p.block_size, end - 1).end);
  begin += larger(segment.first_block, BlockRange(p.fine, p.block_size, first).first);
  for (int block = begin; block < stop; block += step) {
    const UnitRange units(p.fine, p.block_size, block);
    const int from = larger(units.first, first), to = smaller(units.end, end);
    if (from >= to) continue;
    const std::uint32_t score = scores + 4 * (block - segment.first_block);
    float value = from == units.first ? 0 : ptx::load_shared<float>(score);
    for (int unit = from; unit < to; ++unit) {
      const float x = sum_of(unit);
      value = takes_max ? reduce<true>(value, x)
                        : value + x * static_cast<float>(
                                          num_shared_tokens(p.fine, p.block_size, unit, block));
    }
    ptx::store_shared(score, value);
  }
}

// Running lists of the tokens of a tile, in shared memory.
struct TokenLists {
  std::uint32_t states;         // [tile_tokens]
  std::uint32_t ranks, blocks;  // [tile_tokens, list_capacity]

  // To be called once per token, by any thread.
  __device__ void clear(const SelectionParams& p, int slot, const ForcedBlocks& forced) const {
    RunningTopK::store_empty(state(slot), p.top_k - forced.count());
  }
  // For one warp.
  __device__ RunningTopK of(const SelectionParams& p, int slot, const ForcedBlocks& forced) const {
    const std::uint32_t place = 4 * slot * p.tiling.list_capacity;
    return RunningTopK(state(slot), ranks + place, blocks + place, p.tiling.list_capacity,
                       p.top_k - forced.count());
  }

 private:
  __device__ std::uint32_t state(int slot) const {
    return states + RunningTopK::kStateBytes * slot;
  }
};

// A warp merges the scores of a segment into the list of a token at `position`.
__device__ __forceinline__ void take_segment(const SelectionParams& p, const TokenLists& lists,
                                             int slot, int position, const Segment& segment,
                                             std::uint32_t scores) {
  const ForcedBlocks forced(p, position);
  const int visible = num_visible(p.fine, p.is_causal, position);
  const int end = smaller(segment.end_block, num_scored_blocks(p.fine, p.block_size, visible));
  const bool has_gaps = p.fine.stride.value > p.fine.size;  // some blocks may have no unit
  RunningTopK list = lists.of(p, slot, forced);
  for (int base = segment.first_block; base < end; base += 32) {
    const int block = base + ptx::lane_index();
    bool is_candidate = block < end && !forced.has(block);
    if (has_gaps && is_candidate) {
      const UnitRange units(p.fine, p.block_size, block);
      is_candidate = units.first < units.end;
    }
    const float score =
        is_candidate ? ptx::load_shared<float>(scores + 4 * (block - segment.first_block)) : 0;
    list.push(is_candidate ? rank_of(score) : 0, block);
  }
  list.store_state();
}

// A warp writes a token's list: the sinks, what was chosen before and after the local blocks, and
// these.
__device__ __forceinline__ void write_list(const SelectionParams& p, const TokenLists& lists,
                                           const SelectionTile& tile, int slot, int position) {
  const ForcedBlocks forced(p, position);
  RunningTopK list = lists.of(p, slot, forced);
  list.prune();
  const int before = forced.num_sinks + list.count_below(forced.local_begin);
  const int num_local = forced.local_end - forced.local_begin;
  std::int32_t* to = p.indices + tile.list_row(p, slot) * p.top_k;
  for (int i = ptx::lane_index(); i < p.top_k; i += 32) {
    int block = -1;
    if (i < forced.num_sinks) {
      block = i;
    } else if (i < before) {
      block = list.block_at(i - forced.num_sinks);
    } else if (i < before + num_local) {
      block = forced.local_begin + i - before;
    } else if (i < forced.count() + list.count()) {
      block = list.block_at(i - forced.count());
    }
    ptx::store_global(to + i, block);
  }
}

}  // namespace sparse_attn
