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

#include "common/tile.cuh"
#include "common/top_k.cuh"
#include "common/units.cuh"
#include "params.h"
#include "sm80/matrix.cuh"

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

// Which rows of a tile belong to which token. A lane has the rows g, g + 8, g + 16 and g + 24 of
// its warp's 32, where g = lane / 4: they are of one token as far as possible, then come the lanes
// whose g differs in its low bits, and in groups of 64 rows a second warp.
struct TokenRows {
  int in_lane, lanes, warps;  // rows of a token in a lane, such lanes in a warp, and such warps
  int per_warp;               // tokens of a warp

  __device__ explicit TokenRows(int group_rows)
      : in_lane(smaller(group_rows, 4)),
        lanes(smaller(larger(group_rows / 4, 1), 8)),
        warps(larger(group_rows / 32, 1)),
        per_warp(larger(32 / group_rows, 1)) {}

  // In the table of sums, which has a row for each token of each warp.
  __device__ int table_row(int row) const {
    return row / 32 * per_warp + row % 8 / lanes + 8 / lanes * (row % 32 / 8 / in_lane);
  }
  __device__ int slot(int row) const { return table_row(row) / warps; }
  // Of the rows of a token.
  __device__ int head(int row) const {
    return row % 32 / 8 % in_lane + in_lane * (row % 8 % lanes) + 32 * (row / 32 % warps);
  }
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
  std::uint32_t bytes;
  int sums_pitch, scores_pitch;  // that spread what a warp reads or writes over the banks

  SPARSE_ATTN_HOST_DEVICE explicit SelectionMemory(const SelectionTiling& tiling) {
    const std::uint32_t tokens = tiling.tile_tokens;
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
    blocks = ranks + 4 * tokens * tiling.list_capacity;
    bytes = blocks + 4 * tokens * tiling.list_capacity;
    if (bytes < query + Config::kQueryBytes) bytes = query + Config::kQueryBytes;
  }
};

// The query rows of a CTA: `num_tokens` neighbouring tokens, with the `group_size` query heads that
// share list `list`.
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
    const auto row_of = [&](int i) -> std::int64_t {
      const int unit = first_ + i;
      if (unit >= end_) return -1;
      const std::int64_t batch = tile_.batch % p_.unit_batch;
      return (batch * units_->count + unit) * p_.num_kv_heads + tile_.kv_head;
    };
    copy_rows<Config::kHeadDim, Config::kThreads>(address(), units_->keys, Config::kUnits, row_of);
    ptx::copy_commit();
  }

  const SelectionParams& p_;
  const SelectionTile& tile_;
  std::uint32_t base_;
  const UnitParams* units_ = nullptr;
  int first_ = 0, end_ = 0;
  std::uint32_t stage_ = 0;
};

// Of a warp's 32 rows: element [r / 2][c][2 (r % 2) + i] is row 8 r + lane / 4, column 8 c + 2
// (lane % 4) + i.
template <class Config>
using Scores = float[2][Config::kColumns / 8][4];

// Calls `use(element, r, column)` for each element of a lane.
template <class Config, class Use>
__device__ __forceinline__ void for_each_score(Scores<Config>& scores, Use use) {
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < 4; ++r) {
    SPARSE_ATTN_UNROLL
    for (int c = 0; c < Config::kColumns / 8; ++c) {
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        use(scores[r / 2][c][2 * (r % 2) + i], r, 8 * c + ptx::lane_index() % 4 * 2 + i);
      }
    }
  }
}

// A warp's 32 rows of the query as the first operand of a product.
template <class Config>
class QueryRows {
 public:
  __device__ explicit QueryRows(std::uint32_t rows)
      : lane_row_(rows + ptx::lane_index() % 16 * kRowBytes<Config::kHeadDim> +
                  ptx::lane_index() / 16 * 16) {
    if constexpr (Config::kHoldsQuery) {
      SPARSE_ATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        SPARSE_ATTN_UNROLL
        for (int k = 0; k < kSteps; ++k) held_[half][k] = load(half, k);
      }
    }
  }

  // scores += rows units^T.
  __device__ void multiply(Scores<Config>& scores, std::uint32_t units) const {
    constexpr int kBytes = kRowBytes<Config::kHeadDim>;
    const int lane = ptx::lane_index();
    const std::uint32_t lane_unit = units + (lane / 16 * 8 + lane % 8) * kBytes + lane / 8 % 2 * 16;
    SPARSE_ATTN_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const ptx::Fragment4 rows[2] = {fragment(0, k), fragment(1, k)};
      SPARSE_ATTN_UNROLL
      for (int n = 0; n < Config::kColumns; n += 16) {
        const ptx::Fragment4 y = ptx::load_matrix(lane_unit + n * kBytes + 32 * k);
        SPARSE_ATTN_UNROLL
        for (int half = 0; half < 2; ++half) {
          ptx::multiply_add<T>(scores[half][n / 8], rows[half].x, {y.x[0], y.x[1]});
          ptx::multiply_add<T>(scores[half][n / 8 + 1], rows[half].x, {y.x[2], y.x[3]});
        }
      }
    }
  }

 private:
  using T = typename Config::T;
  static constexpr int kSteps = Config::kHeadDim / 16;

  __device__ ptx::Fragment4 load(int half, int k) const {
    return ptx::load_matrix(lane_row_ + 16 * half * kRowBytes<Config::kHeadDim> + 32 * k);
  }
  __device__ ptx::Fragment4 fragment(int half, int k) const {
    if constexpr (Config::kHoldsQuery) return held_[half][k];
    return load(half, k);
  }

  std::uint32_t lane_row_;
  ptx::Fragment4 held_[2][Config::kHoldsQuery ? kSteps : 1];
};

// The running softmax of a lane's four rows over its own columns.
template <class Config>
struct RowStatistics {
  float maximum[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  float sum[4] = {0, 0, 0, 0};

  // scores: logits in base 2, -inf where hidden.
  __device__ void add(Scores<Config>& scores) {
    float largest[4] = {maximum[0], maximum[1], maximum[2], maximum[3]};
    for_each_score<Config>(scores, [&](float x, int r, int) { largest[r] = fmaxf(largest[r], x); });
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < 4; ++r) rescale(r, largest[r]);
    for_each_score<Config>(
        scores, [&](float x, int r, int) { sum[r] += ptx::exp2_approx(x - shift(maximum[r])); });
  }
  __device__ void merge(int r, float other_maximum, float other_sum) {
    rescale(r, fmaxf(maximum[r], other_maximum));
    sum[r] += other_sum * ptx::exp2_approx(other_maximum - shift(maximum[r]));
  }
  // Base 2; 0 for a row that saw nothing.
  __device__ float lse(int r) const {
    return sum[r] == 0 ? 0 : maximum[r] + ptx::log2_approx(sum[r]);
  }

 private:
  // The maximum of a row that has seen nothing is -inf, and -inf - -inf is NaN.
  static __device__ float shift(float x) { return x == -INFINITY ? 0 : x; }
  __device__ void rescale(int r, float largest) {
    sum[r] *= ptx::exp2_approx(maximum[r] - shift(largest));
    maximum[r] = largest;
  }
};

// One of two probabilities, or both: the larger of two that are not negative is that with the
// larger bits, and NaN is larger than all.
template <bool kMax>
__device__ __forceinline__ float reduce(float a, float b) {
  if constexpr (!kMax) return a + b;
  return ptx::bits_of(a) > ptx::bits_of(b) ? a : b;
}

// Reduces the probabilities of each token's rows, as far as they are in this warp, and writes them
// to `to`, the place of the lane's first row and the warp's first column in the table of sums.
template <class Config, bool kMax>
__device__ __forceinline__ void reduce_rows(Scores<Config>& scores, const TokenRows& rows,
                                            std::uint32_t to, int pitch) {
  constexpr int kPairs = Config::kColumns / 8;
  // Rows r and r + distance of a lane.
  const auto join = [&](int r, int distance) {
    SPARSE_ATTN_UNROLL
    for (int c = 0; c < kPairs; ++c) {
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int other = r + distance;
        float& x = scores[r / 2][c][2 * (r % 2) + i];
        x = reduce<kMax>(x, scores[other / 2][c][2 * (other % 2) + i]);
      }
    }
  };
  if (rows.in_lane >= 2) {
    join(0, 1);
    join(2, 1);
  }
  if (rows.in_lane == 4) join(0, 2);
  SPARSE_ATTN_UNROLL
  for (int others = 1; others < 8; others *= 2) {
    if (others >= rows.lanes) break;
    SPARSE_ATTN_UNROLL
    for (int c = 0; c < kPairs; ++c) {
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        float& x = scores[0][c][i];
        x = reduce<kMax>(x, ptx::shuffle_xor(x, 4 * others));
      }
    }
  }
  // All lanes of a token have its sums now. Both numbers are powers of two.
  const int other_lanes = rows.lanes - 1, other_rows = rows.in_lane - 1;
  const int lane = ptx::lane_index();
  if ((lane / 4 & other_lanes) != 0) return;
  to += 4 * (lane % 4 * 2) * pitch;
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < 4; ++r) {
    if ((r & other_rows) != 0) continue;
    SPARSE_ATTN_UNROLL
    for (int c = 0; c < kPairs; ++c) {
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 2; ++i)
        ptx::store_shared(to + 4 * (8 * c + i) * pitch, scores[r / 2][c][2 * (r % 2) + i]);
    }
    to +=
        4 * 8;  // where a lane has rows of several tokens, all its rows are of other tokens' lanes
  }
}

// Blocks whose scores are held together, and the units that they overlap as far as any query of the
// tile sees them.
struct Segment {
  int first_block, end_block, first_unit, end_unit;
};

// The segment that starts with `first`, of the blocks before `end`: as many as there is room for,
// but not so many that the last chunk of units would be all but empty.
template <class Config>
__device__ __forceinline__ Segment segment_from(const SelectionParams& p, int first, int end,
                                                int num_units) {
  if (first >= end) return {end, end, 0, 0};
  const int first_unit = UnitRange(p.fine, p.block_size, first).first;
  const auto end_unit = [&](int block) { return UnitRange(p.fine, p.block_size, block - 1).end; };
  int stop = smaller(end - first, p.tiling.segment_blocks) + first;
  if (stop < end) {
    const int chunks = (end_unit(stop) - first_unit) / Config::kUnits;
    const int fitting =
        p.block_size.divide((first_unit + chunks * Config::kUnits) * p.fine.stride.value);
    if (fitting > first) stop = smaller(stop, fitting);
  }
  return {first, stop, first_unit, smaller(end_unit(stop), num_units)};
}

// Adds the units [first, end) of a chunk to the scores of those blocks of a segment that they
// overlap. `sum_of(unit)` is the token's sum. A thread has one token, and each `step`-th block from
// `begin` on. A score of overlaps is larger than its definition by the stride: the order is the
// same.
template <class Config, class SumOf>
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

// The running list of a token.
template <class Config>
__device__ __forceinline__ RunningTopK list_of(const SelectionParams& p,
                                               const SelectionMemory<Config>& memory, int slot,
                                               const ForcedBlocks& forced) {
  const std::uint32_t base = ptx::shared_base();
  const std::uint32_t list = 4 * slot * p.tiling.list_capacity;
  return RunningTopK(base + memory.states + RunningTopK::kStateBytes * slot,
                     base + memory.ranks + list, base + memory.blocks + list,
                     p.tiling.list_capacity, p.top_k - forced.count());
}

// Merges the scores of a segment into the running list of a token.
template <class Config>
__device__ __forceinline__ void take_segment(const SelectionParams& p,
                                             const SelectionMemory<Config>& memory, int slot,
                                             int position, const Segment& segment) {
  const ForcedBlocks forced(p, position);
  const int visible = num_visible(p.fine, p.is_causal, position);
  const int end = smaller(segment.end_block, num_scored_blocks(p.fine, p.block_size, visible));
  const bool has_gaps = p.fine.stride.value > p.fine.size;  // some blocks may have no unit
  RunningTopK list = list_of(p, memory, slot, forced);
  const std::uint32_t scores = ptx::shared_base() + memory.scores + 4 * slot * memory.scores_pitch;
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

// Writes a token's list: the sinks, what was chosen before and after the local blocks, and these.
template <class Config>
__device__ __forceinline__ void write_list(const SelectionParams& p,
                                           const SelectionMemory<Config>& memory,
                                           const SelectionTile& tile, int slot, int position) {
  const ForcedBlocks forced(p, position);
  RunningTopK list = list_of(p, memory, slot, forced);
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
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int row_warp = warp % Config::kRowWarps, column_warp = warp / Config::kRowWarps;
  const int first_row = 32 * row_warp + lane / 4;  // of a lane's; the others follow at 8, 16, 24
  const auto is_row = [&](int row) {
    return rows.slot(row) < tile.num_tokens && rows.head(row) < tile.group_size;
  };

  copy_rows<Config::kHeadDim, Config::kThreads>(
      base + memory.query, p.query, kRows, [&](int row) -> std::int64_t {
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
    RunningTopK::store_empty(base + memory.states + RunningTopK::kStateBytes * slot,
                             p.top_k - ForcedBlocks(p, position).count());
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
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < 4; ++r) {
    SPARSE_ATTN_UNROLL
    for (int distance = 1; distance < 4; distance *= 2) {
      const float maximum = ptx::shuffle_xor(statistics.maximum[r], distance);
      const float sum = ptx::shuffle_xor(statistics.sum[r], distance);
      statistics.merge(r, maximum, sum);
    }
    if constexpr (Config::kColumnWarps == 1) lse[r] = statistics.lse(r);
  }
  if constexpr (Config::kColumnWarps > 1) {
    const auto place = [&](int r, int warp) {
      return base + memory.statistics + 8 * ((first_row + 8 * r) * Config::kColumnWarps + warp);
    };
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (lane % 4 != 0) continue;
      ptx::store_shared(place(r, column_warp), statistics.maximum[r]);
      ptx::store_shared(place(r, column_warp) + 4, statistics.sum[r]);
    }
    ptx::sync_threads();  // the statistics of all column warps are there
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < 4; ++r) {
      // In the same order by all, so that all get the same.
      RowStatistics<Config> all;
      for (int other = 0; other < Config::kColumnWarps; ++other) {
        all.merge(r, ptx::load_shared<float>(place(r, other)),
                  ptx::load_shared<float>(place(r, other) + 4));
      }
      lse[r] = all.lse(r);
    }
  }
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < 4; ++r) {
    // Rows that are none add nothing to a token's sum.
    if (!is_row(first_row + 8 * r)) lse[r] = INFINITY;
  }

  const int fine_seen_by_all = num_visible(p.fine, p.is_causal, earliest);
  const int fine_seen_by_any = num_visible(p.fine, p.is_causal, latest);
  const int end_block = num_scored_blocks(p.fine, p.block_size, fine_seen_by_any);
  const std::uint32_t sums = base + memory.sums;
  const std::uint32_t own_sums =
      sums + 4 * (rows.table_row(first_row) + column_warp * Config::kColumns * memory.sums_pitch);
  // In pooling, neighbouring threads have neighbouring tokens.
  const int thread = static_cast<int>(threadIdx.x), tokens = p.tiling.tile_tokens;
  const int pooled_slot = thread % tokens, first_pooled = thread / tokens,
            pooled_step = Config::kThreads / tokens;
  const auto pool = [&](const Segment& segment, int first) {
    const int end = smaller(first + Config::kUnits, segment.end_unit);
    const std::uint32_t scores = base + memory.scores + 4 * pooled_slot * memory.scores_pitch;
    const std::uint32_t own = sums + 4 * pooled_slot * rows.warps;
    const auto sum_at = [&](int unit, int row) {
      return ptx::load_shared<float>(own + 4 * ((unit - first) * memory.sums_pitch + row));
    };
    const auto pool_with = [&](auto sum_of) {
      pool_units<Config>(p, segment, first_pooled, pooled_step, first, end, scores, sum_of);
    };
    if (rows.warps == 1) {
      pool_with([&](int unit) { return sum_at(unit, 0); });
    } else if (p.group_reduction == GroupReduction::kMax) {
      pool_with([&](int unit) { return reduce<true>(sum_at(unit, 0), sum_at(unit, 1)); });
    } else {
      pool_with([&](int unit) { return reduce<false>(sum_at(unit, 0), sum_at(unit, 1)); });
    }
  };
  const auto start_segment = [&](int first_block) {
    const auto segment = segment_from<Config>(p, first_block, end_block, fine_seen_by_any);
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
      pool(segment, first);
    });
    ptx::sync_threads();  // the scores of this segment are there
    const Segment next = start_segment(segment.end_block);
    for (int slot = warp; slot < tile.num_tokens; slot += Config::kWarps)
      take_segment(p, memory, slot, position_at(slot), segment);
    segment = next;
  }
  for (int slot = warp; slot < tile.num_tokens; slot += Config::kWarps)
    write_list(p, memory, tile, slot, position_at(slot));
}

// Query heads that share a list are padded to a power of two of rows.
inline int selection_group_rows(const SelectionParams& p) {
  int rows = 1;
  while (rows < p.num_q_heads / p.num_lists) rows *= 2;
  return rows;
}

// Cuts the work so that two CTAs have room on a multiprocessor, or at least one. `segment_blocks`
// is 0 for as many as there is room for. Without tokens in a tile, nothing fits.
template <class Config>
SelectionTiling selection_tiling(const SelectionParams& p, int segment_blocks) {
  constexpr int kFewestBlocks = 64, kSpareEntries = 64;
  SelectionTiling tiling{};
  tiling.group_rows = selection_group_rows(p);
  tiling.list_capacity = std::min(p.top_k, p.num_blocks) + kSpareEntries;
  for (int tokens = Config::kRows / tiling.group_rows; tokens > 0; tokens /= 2) {
    tiling.tile_tokens = tokens;
    for (const std::uint32_t room : {kMostSharedBytes / 2 - 1024, kMostSharedBytes}) {
      tiling.segment_blocks = segment_blocks > 0 ? segment_blocks : std::max(p.num_blocks, 1);
      while (true) {
        if (SelectionMemory<Config>(tiling).bytes <= room) return tiling;
        if (segment_blocks > 0 || tiling.segment_blocks <= kFewestBlocks) break;
        tiling.segment_blocks = std::max(kFewestBlocks, tiling.segment_blocks / 2);
      }
    }
  }
  tiling.tile_tokens = 0;
  return tiling;
}

}  // namespace sparse_attn::sm80
