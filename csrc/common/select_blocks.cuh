// What the kernels of block selection do with scores, wherever these come from.
//
// A group of threads has the query heads of one list, of some neighbouring tokens. It walks over
// the units twice: for the softmax denominator (over the coarse units if there are any, which are
// few), then for the probabilities. These are summed over a token's rows in registers, and pooled
// to blocks in shared memory. When a segment of blocks is complete, each warp merges it into the
// running lists of its tokens. Only the lists go to global memory. Then the group has other tokens.
//
// `Config` says how the group shares the scores of a chunk of `kUnits` units:
//   kRowWarps, kColumnWarps   warps that have other rows, and other units
//   kLaneRows                 rows of a lane, of its warp's 8 kLaneRows
//   kRows, kColumns           of the group, and of a warp
//   kSumTables                2 if chunks come without a barrier between them, else 1
//   kThreads, kWarps
#pragma once

#include "common/score_rows.cuh"
#include "common/selection.cuh"
#include "common/tile.cuh"
#include "params.h"

namespace sparse_attn {

// What a group keeps in shared memory, from `base` on. The tables of sums may come later than the
// rest, `gap` bytes after it.
template <class Config>
struct TokenMemory {
  std::uint32_t statistics;  // [kRows, kColumnWarps], of the softmax: maximum and sum
  std::uint32_t positions;   // [tile_tokens]
  std::uint32_t states;      // [tile_tokens], of the running lists
  std::uint32_t gap;         // a multiple of 16 if `base` is
  std::uint32_t sums;        // [kSumTables, kUnits, sums_pitch], of a chunk: by unit, then by token
  std::uint32_t scores;      // [tile_tokens, scores_pitch], of a segment's blocks
  std::uint32_t ranks;       // [tile_tokens, list_capacity]
  std::uint32_t blocks;      // as ranks
  std::uint64_t end;
  int sums_pitch, scores_pitch;  // that spread what a warp reads or writes over the banks

  SPARSE_ATTN_HOST_DEVICE TokenMemory(const SelectionTiling& tiling, std::uint32_t base,
                                      std::uint32_t gap_bytes) {
    constexpr int kWarpRows = TokenRows<Config::kLaneRows>::kWarpRows;
    const std::uint32_t tokens = tiling.tile_tokens;
    const std::uint64_t list_bytes = std::uint64_t{4} * tokens * tiling.list_capacity;
    const int table_rows =
        Config::kRows / (tiling.group_rows < kWarpRows ? tiling.group_rows : kWarpRows);
    sums_pitch = table_rows + 4;
    scores_pitch = tiling.segment_blocks | 1;
    statistics = base;
    positions =
        statistics + (Config::kColumnWarps > 1 ? 8 * Config::kRows * Config::kColumnWarps : 0);
    states = positions + 4 * tokens;
    gap = (states + RunningTopK::kStateBytes * tokens + 15) / 16 * 16;
    sums = gap + gap_bytes;
    scores = sums + Config::kSumTables * table_bytes();
    ranks = scores + 4 * tokens * scores_pitch;
    blocks = static_cast<std::uint32_t>(ranks + list_bytes);
    end = scores + std::uint64_t{4} * tokens * scores_pitch + 2 * list_bytes;
  }
  // Of a table of sums.
  SPARSE_ATTN_HOST_DEVICE std::uint32_t table_bytes() const {
    return 4 * Config::kUnits * sums_pitch;
  }
};

// Query heads that share a list are padded to a power of two of rows.
inline int padded_group_rows(const SelectionParams& p) {
  int rows = 1;
  while (rows < p.num_q_heads / p.num_lists) rows *= 2;
  return rows;
}

// Cuts the work so that two CTAs have room on a multiprocessor if `prefers_two`, or at least one.
// `bytes_of` says how much shared memory a CTA needs with a tiling; `segment_blocks` is 0, or how
// many blocks a segment has at most. Without tokens in a tile, nothing fits.
template <class BytesOf>
SelectionTiling selection_tiling(const SelectionParams& p, int rows, int segment_blocks,
                                 int most_bytes, bool prefers_two, BytesOf bytes_of) {
  constexpr int kFewestBlocks = 64, kSpareEntries = 64;
  SelectionTiling tiling{};
  tiling.group_rows = padded_group_rows(p);
  tiling.list_capacity = (p.top_k < p.num_blocks ? p.top_k : p.num_blocks) + kSpareEntries;
  const int largest = segment_blocks > 0 ? segment_blocks : most_bytes / 4;
  const int most_blocks = p.num_blocks < 1 ? 1 : p.num_blocks < largest ? p.num_blocks : largest;
  for (int tokens = rows / tiling.group_rows; tokens > 0; tokens /= 2) {
    tiling.tile_tokens = tokens;
    for (const int room : {prefers_two ? most_bytes / 2 - 1024 : most_bytes, most_bytes}) {
      int blocks = most_blocks;
      while (true) {
        tiling.segment_blocks = blocks;
        if (bytes_of(tiling) <= static_cast<std::uint64_t>(room)) return tiling;
        if (blocks <= kFewestBlocks) break;
        blocks = blocks / 2 > kFewestBlocks ? blocks / 2 : kFewestBlocks;
      }
    }
  }
  tiling.tile_tokens = 0;
  return tiling;
}

// The walks over units of tokens that stand at `earliest` to `latest`.
struct SelectionWalks {
  // The denominator: over the coarse units, and over the fine ones for rows that see no coarse one.
  int coarse_end, coarse_seen_by_all;
  int fallback_end, fallback_seen_by_all;
  // The probabilities, by segments of the blocks before `end_block`.
  int fine_end, fine_seen_by_all;
  int end_block;

  __device__ SelectionWalks(const SelectionParams& p, int earliest, int latest)
      : coarse_end(num_visible(p.coarse, p.is_causal, latest)),
        coarse_seen_by_all(num_visible(p.coarse, p.is_causal, earliest)),
        fallback_end(0),
        fallback_seen_by_all(0),
        fine_end(num_visible(p.fine, p.is_causal, latest)),
        fine_seen_by_all(num_visible(p.fine, p.is_causal, earliest)),
        end_block(num_scored_blocks(p.fine, p.block_size, fine_end)) {
    if (coarse_seen_by_all > 0) return;
    // Who sees no coarse unit stands before the end of the first.
    const int last = p.coarse.count == 0 ? latest : smaller(latest, p.coarse.size - 2);
    fallback_end = num_visible(p.fine, p.is_causal, last);
    if (p.coarse.count == 0) fallback_seen_by_all = fine_seen_by_all;
  }

  template <class Config>
  __device__ Segment segment(const SelectionParams& p, int first_block) const {
    return segment_from<Config::kUnits>(p, first_block, end_block, fine_end);
  }
};

// By a warp, which finds the first and the last position of the tokens.
template <class PositionAt>
__device__ __forceinline__ SelectionWalks walks_of(const SelectionParams& p, int num_tokens,
                                                   PositionAt position_at) {
  int earliest = INT32_MAX, latest = INT32_MIN;
  for (int slot = ptx::lane_index(); slot < num_tokens; slot += 32) {
    const int position = position_at(slot);
    earliest = smaller(earliest, position);
    latest = larger(latest, position);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    earliest = smaller(earliest, ptx::shuffle_xor(earliest, distance));
    latest = larger(latest, ptx::shuffle_xor(latest, distance));
  }
  return SelectionWalks(p, earliest, latest);
}

// One thread's part in the work of a group; `thread` is its number there, and `barrier` the
// group's.
template <class Config>
class TokenGroup {
 public:
  using Rows = TokenRows<Config::kLaneRows>;

  __device__ TokenGroup(const SelectionParams& p, const SelectionTile& tile,
                        const TokenMemory<Config>& memory, int thread, int barrier)
      : rows(p.tiling.group_rows),
        p_(p),
        tile_(tile),
        memory_(memory),
        lists_{memory.states, memory.ranks, memory.blocks},
        thread_(thread),
        barrier_(barrier),
        warp_(ptx::shuffle(thread / 32, 0)) {}

  const Rows rows;

  __device__ bool is_row(int row) const {
    return rows.slot(row) < tile_.num_tokens && rows.head(row) < tile_.group_size;
  }
  __device__ int row_warp() const { return warp_ % Config::kRowWarps; }
  __device__ int first_column() const { return warp_ / Config::kRowWarps * Config::kColumns; }
  // Of a lane's rows; the others follow at 8, 16 and so on.
  __device__ int first_row() const { return Rows::kWarpRows * row_warp() + ptx::lane_index() / 4; }
  // Once `start` is done and a barrier after it.
  __device__ int position_at(int slot) const {
    return ptx::load_shared<int>(memory_.positions + 4 * slot);
  }

  // Stores positions and empty lists.
  __device__ void start() const {
    for (int slot = thread_; slot < tile_.num_tokens; slot += Config::kThreads) {
      const int position = load_position(p_, tile_, slot);
      ptx::store_shared(memory_.positions + 4 * slot, position);
      lists_.clear(p_, slot, ForcedBlocks(p_, position));
    }
  }

  // `units.start(of, first, end)` starts a walk over the units [first, end) of `of`, and
  // `units.for_each(use)` calls `use(first, scores)` for each chunk of it, with the products of
  // this thread's rows and columns; what is beyond `end` is not looked at.
  template <class Units>
  __device__ void select(const SelectionWalks& walks, Units& units) const {
    const Limits limits(*this);
    const float no_shift[Config::kLaneRows] = {};
    RowStatistics<Config> statistics;
    units.start(p_.coarse, 0, walks.coarse_end);
    units.for_each([&](int first, UnitScores<Config>& scores) {
      make_logits(scores, first, no_shift, limits.coarse, walks.coarse_seen_by_all);
      statistics.add(scores);
    });
    units.start(p_.fine, 0, walks.fallback_end);
    units.for_each([&](int first, UnitScores<Config>& scores) {
      make_logits(scores, first, no_shift, limits.fallback, walks.fallback_seen_by_all);
      statistics.add(scores);
    });
    float lse[Config::kLaneRows];
    find_lse<Config>(lse, statistics, memory_.statistics, first_row(), warp_ / Config::kRowWarps,
                     barrier_);
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < Config::kLaneRows; ++r) {
      // Rows that are none add nothing to a token's sum.
      if (!is_row(first_row() + 8 * r)) lse[r] = INFINITY;
    }

    std::uint32_t table = memory_.sums;
    const std::uint32_t own_sums =
        4 * (rows.table_row(first_row()) + first_column() * memory_.sums_pitch);
    Segment segment = walks.segment<Config>(p_, 0);
    units.start(p_.fine, segment.first_unit, segment.end_unit);
    while (segment.first_block < walks.end_block) {
      units.for_each([&](int first, UnitScores<Config>& scores) {
        make_logits(scores, first, lse, limits.fine, walks.fine_seen_by_all);
        for_each_score<Config>(scores, [&](float& x, int, int) { x = ptx::exp2_approx(x); });
        if (p_.group_reduction == GroupReduction::kMax) {
          reduce_rows<Config, true>(scores, rows, table + own_sums, memory_.sums_pitch);
        } else {
          reduce_rows<Config, false>(scores, rows, table + own_sums, memory_.sums_pitch);
        }
        ptx::sync_barrier(barrier_, Config::kThreads);  // the sums of this chunk are there
        pool_chunk(segment, first, table);
        // Of two tables, the other one has been read: all threads have come past this barrier.
        if constexpr (Config::kSumTables == 2)
          table = 2 * memory_.sums + memory_.table_bytes() - table;
      });
      ptx::sync_barrier(barrier_, Config::kThreads);  // the scores of this segment are there
      const Segment next = walks.segment<Config>(p_, segment.end_block);
      units.start(p_.fine, next.first_unit, next.end_unit);
      for (int slot = warp_; slot < tile_.num_tokens; slot += Config::kWarps) {
        take_segment(p_, lists_, slot, position_at(slot), segment, scores_of(slot));
      }
      segment = next;
    }
  }

  // After `select`, when no more units are read. What `start` stores is read until all threads have
  // done so.
  __device__ void write_lists() const {
    for (int slot = warp_; slot < tile_.num_tokens; slot += Config::kWarps)
      write_list(p_, lists_, tile_, slot, position_at(slot));
  }

 private:
  // How many units each row of a lane sees.
  struct Limits {
    int fine[Config::kLaneRows], coarse[Config::kLaneRows], fallback[Config::kLaneRows];

    __device__ explicit Limits(const TokenGroup& group) {
      const SelectionParams& p = group.p_;
      SPARSE_ATTN_UNROLL
      for (int r = 0; r < Config::kLaneRows; ++r) {
        fine[r] = coarse[r] = 0;
        if (const int row = group.first_row() + 8 * r; group.is_row(row)) {
          const int position = group.position_at(group.rows.slot(row));
          fine[r] = num_visible(p.fine, p.is_causal, position);
          coarse[r] = num_visible(p.coarse, p.is_causal, position);
        }
        fallback[r] = coarse[r] > 0 ? 0 : fine[r];
      }
    }
  };

  __device__ std::uint32_t scores_of(int slot) const {
    return memory_.scores + 4 * slot * memory_.scores_pitch;
  }

  // Products become logits in base 2 less `shift`; -inf beyond a row's limit. The first `all_see`
  // units have none there.
  __device__ void make_logits(UnitScores<Config>& scores, int first,
                              const float (&shift)[Config::kLaneRows],
                              const int (&limit)[Config::kLaneRows], int all_see) const {
    const float factor = p_.scale * kLog2E;
    for_each_score<Config>(scores, [&](float& x, int r, int) { x = x * factor - shift[r]; });
    if (first + Config::kUnits <= all_see) return;
    for_each_score<Config>(scores, [&](float& x, int r, int column) {
      if (first + first_column() + column >= limit[r]) x = -INFINITY;
    });
  }

  // Adds the sums of a chunk of units to the scores of a segment. Neighbouring threads have
  // neighbouring tokens.
  __device__ void pool_chunk(const Segment& segment, int first, std::uint32_t table) const {
    const int tokens = p_.tiling.tile_tokens, log_tokens = ptx::highest_bit(tokens),
              slot = thread_ & (tokens - 1);
    const std::uint32_t sums = table + 4 * slot * rows.warps;
    const auto sum_at = [&](int unit, int warp) {
      return ptx::load_shared<float>(sums + 4 * ((unit - first) * memory_.sums_pitch + warp));
    };
    const auto pool = [&](auto sum_of) {
      pool_units(p_, segment, thread_ >> log_tokens, Config::kThreads >> log_tokens, first,
                 smaller(first + Config::kUnits, segment.end_unit), scores_of(slot), sum_of);
    };
    if (rows.warps == 1) {
      pool([&](int unit) { return sum_at(unit, 0); });
    } else if (p_.group_reduction == GroupReduction::kMax) {
      pool([&](int unit) { return reduced<true>(sum_at, unit); });
    } else {
      pool([&](int unit) { return reduced<false>(sum_at, unit); });
    }
  }
  // Over the warps that share a token.
  template <bool kMax, class SumAt>
  __device__ float reduced(const SumAt& sum_at, int unit) const {
    float all = sum_at(unit, 0);
    for (int warp = 1; warp < rows.warps; ++warp) all = reduce<kMax>(all, sum_at(unit, warp));
    return all;
  }

  const SelectionParams& p_;
  const SelectionTile& tile_;
  const TokenMemory<Config>& memory_;
  TokenLists lists_;
  int thread_, barrier_, warp_;
};

}  // namespace sparse_attn
