// Scores units of keys, pools them to blocks and selects the best blocks of each query, for compute
// capability 8.0.
//
// A CTA has the query heads of one list, of some neighbouring tokens; a warp has 32 of these rows,
// against all units of a chunk or a part of them. It walks over the units twice: for the softmax
// denominator (over the coarse units if there are any, which are few), then for the probabilities.
// These are summed over a token's rows in registers, and pooled to blocks in shared memory. When a
// segment of blocks is complete, each warp merges it into the running lists of its tokens. Only the
// lists go to global memory.
#pragma once

#include <algorithm>

#include "common/selection.cuh"
#include "common/tile.cuh"
#include "common/units.cuh"
#include "params.h"
#include "sm80/matrix.cuh"
#include "sm80/score_rows.cuh"

namespace sparse_attn::sm80 {

template <class T_, int kHeadDim_, int kRowWarps_, int kColumnWarps_>
struct SelectionConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kColumnWarps = kColumnWarps_;
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 32 * kRowWarps;
  static constexpr int kUnits = 64;  // of a chunk
  static constexpr int kColumns = kUnits / kColumnWarps;
  // The query's fragments stay in registers; then its place in shared memory is used again.
  static constexpr bool kHoldsQuery = kHeadDim <= 128;
  static constexpr std::uint32_t kQueryBytes = kRows * kRowBytes<kHeadDim>;
  static constexpr std::uint32_t kChunkBytes = kUnits * kRowBytes<kHeadDim>;
  static_assert(kHeadDim % 16 == 0 && kColumns % 16 == 0);
};

// Where a CTA keeps what in shared memory.
template <class Config>
struct SelectionMemory {
  std::uint32_t units = 0;   // two chunks
  std::uint32_t statistics;  // [kRows, kColumnWarps], of the softmax: maximum and sum
  std::uint32_t positions;   // [tile_tokens]
  std::uint32_t states;      // [tile_tokens], of the running lists
  std::uint32_t query;       // [kRows, head_dim]
  std::uint32_t sums;        // [kUnits, sums_pitch], of a chunk: by unit, then by token
  std::uint32_t scores;      // [tile_tokens, scores_pitch], of a segment's blocks
  std::uint32_t ranks;       // [tile_tokens, list_capacity]
  std::uint32_t blocks;      // as ranks
  std::uint64_t bytes;
  int sums_pitch, scores_pitch;  // that spread what a warp reads or writes over the banks

  SPARSE_ATTN_HOST_DEVICE explicit SelectionMemory(const SelectionTiling& tiling) {
    const std::uint32_t tokens = tiling.tile_tokens;
    const std::uint64_t list_bytes = std::uint64_t{4} * tokens * tiling.list_capacity;
    const int table_rows = Config::kRows / (tiling.group_rows < 32 ? tiling.group_rows : 32);
    sums_pitch = table_rows + 4;
    scores_pitch = tiling.segment_blocks | 1;
    statistics = 2 * Config::kChunkBytes;
    positions = statistics + 8 * Config::kRows * Config::kColumnWarps;
    states = positions + 4 * tokens;
    query = (states + RunningTopK::kStateBytes * tokens + 15) / 16 * 16;
    sums = Config::kHoldsQuery ? query : query + Config::kQueryBytes;
    scores = sums + 4 * Config::kUnits * sums_pitch;
    ranks = scores + 4 * tokens * scores_pitch;
    blocks = static_cast<std::uint32_t>(ranks + list_bytes);
    bytes = scores + std::uint64_t{4} * tokens * scores_pitch + 2 * list_bytes;
    if (bytes < query + Config::kQueryBytes) bytes = query + Config::kQueryBytes;
  }
};

// Two stages through which chunks of units pass.
template <class Config>
class UnitRing {
 public:
  __device__ UnitRing(const SelectionParams& p, const SelectionTile& tile, std::uint32_t base)
      : p_(p), tile_(tile), base_(base) {}

  // Starts with the units [first, end). All threads have read all chunks but the last.
  __device__ void start(const UnitParams& units, int first, int end) {
    units_ = &units;
    first_ = first;
    end_ = end;
    fetch();
  }

  // Calls `use(first unit, address)` for each chunk; units beyond the end are 0 in it.
  template <class Use>
  __device__ void for_each(Use use) {
    while (first_ < end_) {
      ptx::copy_wait<0>();
      ptx::sync_threads();  // all copies of this chunk are there, and the chunk before has been
                            // read
      const int first = first_;
      const std::uint32_t chunk = address();
      first_ += Config::kUnits;
      stage_ ^= 1;
      fetch();
      use(first, chunk);
    }
  }

 private:
  __device__ std::uint32_t address() const { return base_ + stage_ * Config::kChunkBytes; }
  __device__ void fetch() {
    if (first_ >= end_) return;
    const std::int64_t batch = tile_.batch % p_.unit_batch, stride = p_.num_kv_heads;
    const std::int64_t first_row = (batch * units_->count + first_) * stride + tile_.kv_head;
    const int count = end_ - first_;
    copy_rows<Config::kHeadDim, Config::kThreads, Config::kUnits>(
        {{units_->keys, address()}},
        [&](int i) -> std::int64_t { return i < count ? first_row + i * stride : -1; });
    ptx::copy_commit();
  }

  const SelectionParams& p_;
  const SelectionTile& tile_;
  std::uint32_t base_;
  const UnitParams* units_ = nullptr;
  int first_ = 0, end_ = 0;
  std::uint32_t stage_ = 0;
};

// Adds the sums of a chunk of units to the scores of a segment. Neighbouring threads have
// neighbouring tokens.
template <class Config>
__device__ __forceinline__ void pool_chunk(const SelectionParams& p,
                                           const SelectionMemory<Config>& memory,
                                           const TokenRows& rows, const Segment& segment,
                                           int first) {
  const int thread = static_cast<int>(threadIdx.x), tokens = p.tiling.tile_tokens;
  const int log_tokens = ptx::highest_bit(tokens), slot = thread & (tokens - 1);
  const std::uint32_t sums = ptx::shared_base() + memory.sums + 4 * slot * rows.warps,
                      scores = ptx::shared_base() + memory.scores + 4 * slot * memory.scores_pitch;
  const auto sum_at = [&](int unit, int warp) {
    return ptx::load_shared<float>(sums + 4 * ((unit - first) * memory.sums_pitch + warp));
  };
  const auto pool = [&](auto sum_of) {
    pool_units(p, segment, thread >> log_tokens, Config::kThreads >> log_tokens, first,
               smaller(first + Config::kUnits, segment.end_unit), scores, sum_of);
  };
  if (rows.warps == 1) {
    pool([&](int unit) { return sum_at(unit, 0); });
  } else if (p.group_reduction == GroupReduction::kMax) {
    pool([&](int unit) { return reduce<true>(sum_at(unit, 0), sum_at(unit, 1)); });
  } else {
    pool([&](int unit) { return reduce<false>(sum_at(unit, 0), sum_at(unit, 1)); });
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2)
    selection(const __grid_constant__ SelectionParams p) {
  constexpr int kRows = Config::kRows;
  const SelectionTile tile(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                           // Later tiles see more units: they go first.
                           static_cast<int>(gridDim.x - 1 - blockIdx.x));
  const SelectionMemory<Config> memory(p.tiling);
  const TokenRows rows(p.tiling.group_rows);
  const std::uint32_t base = ptx::shared_base();
  const TokenLists lists = {base + memory.states, base + memory.ranks, base + memory.blocks};
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int row_warp = warp % Config::kRowWarps, column_warp = warp / Config::kRowWarps;
  const int first_row = 32 * row_warp + lane / 4;  // of a lane's; the others follow at 8, 16, 24
  const auto is_row = [&](int row) {
    return rows.slot(row) < tile.num_tokens && rows.head(row) < tile.group_size;
  };

  copy_rows<Config::kHeadDim, Config::kThreads, kRows>(
      {{p.query, base + memory.query}}, [&](int row) -> std::int64_t {
        return is_row(row) ? tile.query_row(p, rows.slot(row), rows.head(row)) : -1;
      });
  ptx::copy_commit();
  const auto position_at = [&](int slot) {
    return ptx::load_shared<int>(base + memory.positions + 4 * slot);
  };
  for (int slot = static_cast<int>(threadIdx.x); slot < tile.num_tokens; slot += Config::kThreads) {
    const std::int64_t row = tile.batch % p.position_batch;
    const int position = ptx::load_global(p.positions + row * p.q_len + tile.first_token + slot);
    ptx::store_shared(base + memory.positions + 4 * slot, position);
    lists.clear(p, slot, ForcedBlocks(p, position));
  }
  ptx::copy_wait<0>();
  ptx::sync_threads();  // query, positions and states are there

  const QueryRows<Config> query(base + memory.query + 32 * row_warp * kRowBytes<Config::kHeadDim>);
  int earliest = INT32_MAX, latest = INT32_MIN;
  for (int slot = lane; slot < tile.num_tokens; slot += 32) {
    earliest = smaller(earliest, position_at(slot));
    latest = larger(latest, position_at(slot));
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    earliest = smaller(earliest, ptx::shuffle_xor(earliest, distance));
    latest = larger(latest, ptx::shuffle_xor(latest, distance));
  }
  int fine_limit[4], coarse_limit[4], fallback_limit[4];
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < 4; ++r) {
    fine_limit[r] = coarse_limit[r] = 0;
    if (const int row = first_row + 8 * r; is_row(row)) {
      const int position = position_at(rows.slot(row));
      fine_limit[r] = num_visible(p.fine, p.is_causal, position);
      coarse_limit[r] = num_visible(p.coarse, p.is_causal, position);
    }
    fallback_limit[r] = coarse_limit[r] > 0 ? 0 : fine_limit[r];
  }

  UnitRing<Config> ring(p, tile, base + memory.units);
  const float factor = p.scale * kLog2E;
  // Logits in base 2 less `shift`; -inf beyond a row's limit. The first `all_see` have none there.
  const auto logits_of = [&](Scores<Config>& scores, int first, std::uint32_t chunk,
                             const float (&shift)[4], const int (&limit)[4], int all_see) {
    const int first_column = column_warp * Config::kColumns;
    query.multiply(scores, chunk + first_column * kRowBytes<Config::kHeadDim>);
    for_each_score<Config>(scores, [&](float& x, int r, int) { x = x * factor - shift[r]; });
    if (first + Config::kUnits <= all_see) return;
    for_each_score<Config>(scores, [&](float& x, int r, int column) {
      if (first + first_column + column >= limit[r]) x = -INFINITY;
    });
  };

  // The denominator: over the coarse units, and over the fine ones for rows that see no coarse one.
  RowStatistics<Config> statistics;
  const float no_shift[4] = {0, 0, 0, 0};
  const int coarse_seen_by_all = num_visible(p.coarse, p.is_causal, earliest);
  ring.start(p.coarse, 0, num_visible(p.coarse, p.is_causal, latest));
  ring.for_each([&](int first, std::uint32_t chunk) {
    Scores<Config> scores = {};
    logits_of(scores, first, chunk, no_shift, coarse_limit, coarse_seen_by_all);
    statistics.add(scores);
  });
  if (coarse_seen_by_all == 0) {
    // Who sees no coarse unit stands before the end of the first.
    const int last = p.coarse.count == 0 ? latest : smaller(latest, p.coarse.size - 2);
    const int fallback_seen_by_all =
        p.coarse.count == 0 ? num_visible(p.fine, p.is_causal, earliest) : 0;
    ring.start(p.fine, 0, num_visible(p.fine, p.is_causal, last));
    ring.for_each([&](int first, std::uint32_t chunk) {
      Scores<Config> scores = {};
      logits_of(scores, first, chunk, no_shift, fallback_limit, fallback_seen_by_all);
      statistics.add(scores);
    });
  }
  float lse[4];
  find_lse<Config>(lse, statistics, base + memory.statistics, first_row, column_warp);
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < 4; ++r) {
    // Rows that are none add nothing to a token's sum.
    if (!is_row(first_row + 8 * r)) lse[r] = INFINITY;
  }

  const int fine_seen_by_all = num_visible(p.fine, p.is_causal, earliest);
  const int fine_seen_by_any = num_visible(p.fine, p.is_causal, latest);
  const int end_block = num_scored_blocks(p.fine, p.block_size, fine_seen_by_any);
  const std::uint32_t own_sums =
      base + memory.sums +
      4 * (rows.table_row(first_row) + column_warp * Config::kColumns * memory.sums_pitch);
  const auto start_segment = [&](int first_block) {
    const auto segment = segment_from<Config::kUnits>(p, first_block, end_block, fine_seen_by_any);
    ring.start(p.fine, segment.first_unit, segment.end_unit);
    return segment;
  };
  Segment segment = start_segment(0);
  while (segment.first_block < end_block) {
    ring.for_each([&](int first, std::uint32_t chunk) {
      Scores<Config> scores = {};
      logits_of(scores, first, chunk, lse, fine_limit, fine_seen_by_all);
      for_each_score<Config>(scores, [&](float& x, int, int) { x = ptx::exp2_approx(x); });
      if (p.group_reduction == GroupReduction::kMax) {
        reduce_rows<Config, true>(scores, rows, own_sums, memory.sums_pitch);
      } else {
        reduce_rows<Config, false>(scores, rows, own_sums, memory.sums_pitch);
      }
      ptx::sync_threads();  // the sums of this chunk are there
      pool_chunk(p, memory, rows, segment, first);
    });
    ptx::sync_threads();  // the scores of this segment are there
    const Segment next = start_segment(segment.end_block);
    for (int slot = warp; slot < tile.num_tokens; slot += Config::kWarps) {
      take_segment(p, lists, slot, position_at(slot), segment,
                   base + memory.scores + 4 * slot * memory.scores_pitch);
    }
    segment = next;
  }
  for (int slot = warp; slot < tile.num_tokens; slot += Config::kWarps)
    write_list(p, lists, tile, slot, position_at(slot));
}

// Query heads that share a list are padded to a power of two of rows.
inline int selection_group_rows(const SelectionParams& p) {
  int rows = 1;
  while (rows < p.num_q_heads / p.num_lists) rows *= 2;
  return rows;
}

// Cuts the work so that two CTAs have room on a multiprocessor, or at least one. `segment_blocks`
// is 0, or how many blocks a segment has at most. Without tokens in a tile, nothing fits.
template <class Config>
SelectionTiling selection_tiling(const SelectionParams& p, int segment_blocks) {
  constexpr int kFewestBlocks = 64, kSpareEntries = 64;
  SelectionTiling tiling{};
  tiling.group_rows = selection_group_rows(p);
  tiling.list_capacity = std::min(p.top_k, p.num_blocks) + kSpareEntries;
  const int most_blocks = std::clamp(p.num_blocks, 1, kMostSharedBytes / 4);
  for (int tokens = Config::kRows / tiling.group_rows; tokens > 0; tokens /= 2) {
    tiling.tile_tokens = tokens;
    for (const int room : {kMostSharedBytes / 2 - 1024, kMostSharedBytes}) {
      int blocks = segment_blocks > 0 ? std::min(segment_blocks, most_blocks) : most_blocks;
      while (true) {
        tiling.segment_blocks = blocks;
        if (SelectionMemory<Config>(tiling).bytes <= static_cast<std::uint64_t>(room))
          return tiling;
        if (blocks <= kFewestBlocks) break;
        blocks = std::max(kFewestBlocks, blocks / 2);
      }
    }
  }
  tiling.tile_tokens = 0;
  return tiling;
}

}  // namespace sparse_attn::sm80
