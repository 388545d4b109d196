// Scores of a warp's query rows against units of keys, in registers, as products leave them there.
//
// `Config` is as in select_blocks.cuh: a lane has `kLaneRows` rows of its warp's, 2 or 4, and some
// columns of each.
#pragma once

#include "common/selection.cuh"
#include "common/units.cuh"

namespace sparse_attn {

// Which rows belong to which token. A lane has the rows g, g + 8 and so on of its warp's, where g =
// lane / 4: they are of one token as far as possible, then come the lanes whose g differs in its
// low bits, and then other warps.
template <int kLaneRows>
struct TokenRows {
  static constexpr int kWarpRows = 8 * kLaneRows;
  int in_lane, lanes, warps;  // rows of a token in a lane, such lanes in a warp, and such warps
  int per_warp;               // tokens of a warp

  __device__ explicit TokenRows(int group_rows)
      : in_lane(smaller(group_rows, kLaneRows)),
        lanes(smaller(larger(group_rows / kLaneRows, 1), 8)),
        warps(larger(group_rows / kWarpRows, 1)),
        per_warp(larger(kWarpRows / group_rows, 1)) {}

  // In the table of sums, which has a row for each token of each warp.
  __device__ int table_row(int row) const {
    return row / kWarpRows * per_warp + row % 8 / lanes +
           8 / lanes * (row % kWarpRows / 8 / in_lane);
  }
  __device__ int slot(int row) const { return table_row(row) / warps; }
  // Of the rows of a token.
  __device__ int head(int row) const {
    return row % kWarpRows / 8 % in_lane + in_lane * (row % 8 % lanes) +
           kWarpRows * (row / kWarpRows % warps);
  }
};

// Element [r / 2][c][2 (r % 2) + i] is row 8 r + lane / 4, column 8 c + 2 (lane % 4) + i.
template <class Config>
using UnitScores = float[Config::kLaneRows / 2][Config::kColumns / 8][4];

// Calls `use(element, r, column)` for each element of a lane.
template <class Config, class Use>
__device__ __forceinline__ void for_each_score(UnitScores<Config>& scores, Use use) {
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < Config::kLaneRows; ++r) {
    SPARSE_ATTN_UNROLL
    for (int c = 0; c < Config::kColumns / 8; ++c) {
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        use(scores[r / 2][c][2 * (r % 2) + i], r, 8 * c + ptx::lane_index() % 4 * 2 + i);
      }
    }
  }
}

// The running softmax of a lane's rows over its own columns.
template <class Config>
struct RowStatistics {
  float maximum[Config::kLaneRows], sum[Config::kLaneRows] = {};

  __device__ RowStatistics() {
    SPARSE_ATTN_UNROLL
    for (float& x : maximum) x = -INFINITY;
  }

  // scores: logits in base 2, -inf where hidden.
  __device__ void add(UnitScores<Config>& scores) {
    float largest[Config::kLaneRows];
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < Config::kLaneRows; ++r) largest[r] = maximum[r];
    for_each_score<Config>(scores, [&](float x, int r, int) { largest[r] = fmaxf(largest[r], x); });
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < Config::kLaneRows; ++r) rescale(r, largest[r]);
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

// The denominators of a lane's rows, after all lanes have added their columns. `table` has a place
// for each row and column warp. `barrier`: of the group of threads.
template <class Config>
__device__ __forceinline__ void find_lse(float (&lse)[Config::kLaneRows],
                                         RowStatistics<Config>& statistics, std::uint32_t table,
                                         int first_row, int column_warp, int barrier) {
  const auto place = [&](int r, int warp) {
    return table + 8 * ((first_row + 8 * r) * Config::kColumnWarps + warp);
  };
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < Config::kLaneRows; ++r) {
    SPARSE_ATTN_UNROLL
    for (int distance = 1; distance < 4; distance *= 2) {
      const float maximum = ptx::shuffle_xor(statistics.maximum[r], distance);
      const float sum = ptx::shuffle_xor(statistics.sum[r], distance);
      statistics.merge(r, maximum, sum);
    }
    lse[r] = statistics.lse(r);
    if (Config::kColumnWarps > 1 && ptx::lane_index() % 4 == 0) {
      ptx::store_shared(place(r, column_warp), statistics.maximum[r]);
      ptx::store_shared(place(r, column_warp) + 4, statistics.sum[r]);
    }
  }
  if constexpr (Config::kColumnWarps > 1) {
    // The statistics of all column warps are there.
    ptx::sync_barrier(barrier, Config::kThreads);
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < Config::kLaneRows; ++r) {
      // In the same order by all, so that all get the same.
      RowStatistics<Config> all;
      for (int other = 0; other < Config::kColumnWarps; ++other) {
        all.merge(r, ptx::load_shared<float>(place(r, other)),
                  ptx::load_shared<float>(place(r, other) + 4));
      }
      lse[r] = all.lse(r);
    }
  }
}

// Reduces the probabilities of each token's rows, as far as they are in this warp, and writes them
// to `to`, the place of the lane's first row and the warp's first column in the table of sums.
template <class Config, bool kMax>
__device__ __forceinline__ void reduce_rows(UnitScores<Config>& scores,
                                            const TokenRows<Config::kLaneRows>& rows,
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
  SPARSE_ATTN_UNROLL
  for (int distance = 1; distance < Config::kLaneRows; distance *= 2) {
    if (distance >= rows.in_lane) break;
    SPARSE_ATTN_UNROLL
    for (int r = 0; r < Config::kLaneRows; r += 2 * distance) join(r, distance);
  }
  // The lanes of a token add up its values together: each time, two of them exchange halves of what
  // both have, and go on with one half each. All of a token's rows are in row 0 of a lane then.
  const int lane = ptx::lane_index();
  int first = 0;  // of the values that the lane still has
  const auto value = [&](int v) -> float& { return scores[0][v / 2][v % 2]; };
  SPARSE_ATTN_UNROLL
  for (int others = 1; others < 8; others *= 2) {
    if (others >= rows.lanes) break;
    const int kept = kPairs / others;
    const bool has_high = (lane / 4 & others) != 0;
    SPARSE_ATTN_UNROLL
    for (int v = 0; v < kept; ++v) {
      const float low = value(v), high = value(v + kept);
      value(v) =
          reduce<kMax>(has_high ? high : low, ptx::shuffle_xor(has_high ? low : high, 4 * others));
    }
    if (has_high) first += kept;
  }
  to += 4 * (lane % 4 * 2) * pitch;
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < Config::kLaneRows; ++r) {
    if (r % rows.in_lane != 0) continue;
    SPARSE_ATTN_UNROLL
    for (int v = 0; v < 2 * kPairs; ++v) {
      if (v * rows.lanes >= 2 * kPairs) break;
      const int column = 8 * ((first + v) / 2) + (first + v) % 2;
      ptx::store_shared(to + 4 * column * pitch, scores[r / 2][v / 2][2 * (r % 2) + v % 2]);
    }
    to += 4 * 8;  // where a lane has rows of several tokens, other lanes have none of them
  }
}

}  // namespace sparse_attn
