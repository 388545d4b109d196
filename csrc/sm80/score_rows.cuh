// Scores of 32 query rows of a warp against units of keys, in registers.
//
// `Config` is as `SelectionConfig`.
#pragma once

#include "common/selection.cuh"
#include "common/units.cuh"
#include "sm80/matrix.cuh"
#include "sm80/ptx.cuh"

namespace sparse_attn::sm80 {

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

// The denominators of a lane's rows, after all lanes have added their columns. `table` has a place
// for each row and column warp.
template <class Config>
__device__ __forceinline__ void find_lse(float (&lse)[4], RowStatistics<Config>& statistics,
                                         std::uint32_t table, int first_row, int column_warp) {
  const auto place = [&](int r, int warp) {
    return table + 8 * ((first_row + 8 * r) * Config::kColumnWarps + warp);
  };
  SPARSE_ATTN_UNROLL
  for (int r = 0; r < 4; ++r) {
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

}  // namespace sparse_attn::sm80
