// Bounds on the products of a query with the keys of a block, from the extrema of each channel, and
// the blocks with the largest. The same on every architecture.
//
// Of a channel d, max(q[d] M[d], q[d] m[d]) is max(q[d], 0) M[d] + min(q[d], 0) m[d].
#pragma once

#include "common/ptx.cuh"
#include "common/units.cuh"
#include "params.h"

namespace sparse_attn {

// Which blocks a query keeps, and which compete.
struct BlockLimits {
  int end_of_first, begin_of_last, end_of_last, end_of_scored;

  __device__ BlockLimits(const BoundParams& p, int batch, int token) {
    const std::int64_t row = static_cast<std::int64_t>(batch % p.limit_batch) * p.q_len + token;
    const auto limit = [&](int i) {
      return smaller(larger(ptx::load_global(p.limits + 4 * row + i), 0), p.num_blocks);
    };
    end_of_first = limit(0);
    begin_of_last = larger(limit(1), end_of_first);
    end_of_last = larger(limit(2), begin_of_last);
    end_of_scored = limit(3);
  }
  __device__ bool is_kept(int block) const {
    return block < end_of_first || (block >= begin_of_last && block < end_of_last);
  }
  __device__ int num_kept() const { return end_of_first + end_of_last - begin_of_last; }
  __device__ bool competes(int block) const { return block < end_of_scored && !is_kept(block); }
};

template <class T_, int kHeadDim_>
struct BoundConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = 128;
  static constexpr int kLanes = 4;                       // that share a block
  static constexpr int kPieces = kHeadDim / 8 / kLanes;  // of 16 bytes that a lane has of a row
  static constexpr int kBlocksTogether = kThreads / kLanes;
  static constexpr int kBlocks = 4 * kBlocksTogether;  // of a CTA
  static_assert(kHeadDim % (8 * kLanes) == 0);
};

// The queries of a KV head for one token, in shared memory as float32: of each the positive and the
// negative part.
template <class Config>
class SignedQueries {
 public:
  __device__ SignedQueries(const BoundParams& p, int batch, int kv_head)
      : group_size_(p.num_q_heads / p.num_kv_heads),
        takes_mean_(p.reduction == BoundReduction::kMeanQuery) {
    first_row_ = static_cast<std::int64_t>(batch) * p.q_len * p.num_q_heads + kv_head * group_size_;
    stride_ = p.num_q_heads;
    query_ = static_cast<const typename Config::T*>(p.query);
  }

  __device__ int count() const { return takes_mean_ ? 1 : group_size_; }

  // By all threads. Those of the token before are read.
  __device__ void load(int token) const {
    constexpr int kHeadDim = Config::kHeadDim;
    for (int i = static_cast<int>(threadIdx.x); i < count() * kHeadDim; i += Config::kThreads) {
      const auto* from = query_ + (first_row_ + token * stride_) * kHeadDim + i;
      float x = 0;
      if (takes_mean_) {
        for (int head = 0; head < group_size_; ++head)
          x += ptx::to_float(ptx::load_global(from + head * kHeadDim));
        x /= static_cast<float>(group_size_);
      } else {
        x = ptx::to_float(ptx::load_global(from));
      }
      const int row = i / kHeadDim, column = i % kHeadDim;
      ptx::store_shared(at(row, 0, column), x < 0 ? 0 : x);  // NaN is kept
      ptx::store_shared(at(row, 1, column), x > 0 ? 0 : x);
    }
    ptx::sync_threads();  // all queries are there
  }

  // Where 8 channels of the positive or the negative part start.
  __device__ std::uint32_t at(int row, int sign, int column) const {
    return ptx::shared_base() + 4 * ((2 * row + sign) * Config::kHeadDim + column);
  }

 private:
  int group_size_;
  bool takes_mean_;
  std::int64_t first_row_, stride_;
  const typename Config::T* query_;
};

// A lane's channels of the maxima or minima of a block.
template <class Config>
struct Extrema {
  float x[Config::kPieces][8];

  // `row`: in the array of extrema; negative for zeros.
  __device__ void load(const void* from, std::int64_t row) {
    constexpr int kRowPieces = Config::kHeadDim / 8;
    SPARSE_ATTN_UNROLL
    for (int piece = 0; piece < Config::kPieces; ++piece) {
      ptx::Words4 words = {};
      if (row >= 0) {
        words = ptx::load_global(static_cast<const ptx::Words4*>(from) + row * kRowPieces +
                                 ptx::lane_index() % Config::kLanes + Config::kLanes * piece);
      }
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<std::uint16_t>(words.x[i / 2] >> (i % 2 * 16));
        x[piece][i] = ptx::to_float(typename Config::T{bits});
      }
    }
  }
};

// The bound of one query for the block whose extrema four lanes have; all of them get it.
template <class Config>
__device__ __forceinline__ float bound_of(const SignedQueries<Config>& queries, int row,
                                          const Extrema<Config>& maximum,
                                          const Extrema<Config>& minimum) {
  float sum = 0;
  SPARSE_ATTN_UNROLL
  for (int piece = 0; piece < Config::kPieces; ++piece) {
    const int column = 8 * (ptx::lane_index() % Config::kLanes + Config::kLanes * piece);
    SPARSE_ATTN_UNROLL
    for (int i = 0; i < 8; i += 4) {
      const auto positive = ptx::load_shared<ptx::Words4>(queries.at(row, 0, column + i)),
                 negative = ptx::load_shared<ptx::Words4>(queries.at(row, 1, column + i));
      SPARSE_ATTN_UNROLL
      for (int j = 0; j < 4; ++j) {
        sum += ptx::float_of(positive.x[j]) * maximum.x[piece][i + j];
        sum += ptx::float_of(negative.x[j]) * minimum.x[piece][i + j];
      }
    }
  }
  sum += ptx::shuffle_xor(sum, 1);
  sum += ptx::shuffle_xor(sum, 2);
  return sum;
}

// Of a block in [extrema_batch or num_pages, num_blocks or page_rows, num_kv_heads]; negative if it
// is in no page.
__device__ __forceinline__ std::int64_t extrema_row(const BoundParams& p, int batch, int kv_head,
                                                    int block) {
  std::int64_t row = static_cast<std::int64_t>(batch % p.extrema_batch) * p.num_blocks + block;
  if (p.page_table != nullptr) {
    const int page = ptx::load_global(
        p.page_table + static_cast<std::int64_t>(batch % p.table_batch) * p.max_pages +
        block / p.page_rows);
    if (page < 0 || page >= p.num_pages) return -1;
    row = static_cast<std::int64_t>(page) * p.page_rows + block % p.page_rows;
  }
  return row * p.num_kv_heads + kv_head;
}

// A CTA has the query heads of a KV head, and some blocks. Blocks that do not compete get no score.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    block_bounds(const __grid_constant__ BoundParams p) {
  const int batch = static_cast<int>(blockIdx.z), kv_head = static_cast<int>(blockIdx.y),
            first_block = static_cast<int>(blockIdx.x) * Config::kBlocks;
  const SignedQueries<Config> queries(p, batch, kv_head);
  const int lists = p.num_lists / p.num_kv_heads;  // of the KV head
  const bool has_group = lists == 1, takes_mean = p.reduction == BoundReduction::kMean;
  for (int token = 0; token < p.q_len; ++token) {
    const int end = BlockLimits(p, batch, token).end_of_scored;
    if (first_block >= end) continue;
    queries.load(token);
    const std::int64_t list_row =
        (static_cast<std::int64_t>(batch) * p.num_lists + kv_head * lists) * p.q_len + token;
    const auto store = [&](int list, int block, float score) {
      if (block >= end || ptx::lane_index() % Config::kLanes != 0) return;
      const std::int64_t row = list_row + static_cast<std::int64_t>(list) * p.q_len;
      ptx::store_global(p.scores + row * p.num_blocks + block, score);
    };
    for (int i = 0; i < Config::kBlocks; i += Config::kBlocksTogether) {
      const int block = first_block + i + static_cast<int>(threadIdx.x) / Config::kLanes;
      const std::int64_t row = block < end ? extrema_row(p, batch, kv_head, block) : -1;
      Extrema<Config> maximum, minimum;
      maximum.load(p.maximum, row);
      minimum.load(p.minimum, row);
      float all = takes_mean ? 0 : -INFINITY;
      for (int head = 0; head < queries.count(); ++head) {
        float bound = bound_of(queries, head, maximum, minimum);
        if (row < 0) bound = -INFINITY;
        if (!has_group) store(head, block, bound);
        if (takes_mean) {
          all += bound;
        } else if (bound > all || bound != bound) {
          all = bound;
        }
      }
      if (has_group) {
        store(0, block, takes_mean ? all / static_cast<float>(queries.count()) : all);
      }
    }
    ptx::sync_threads();  // the queries are read
  }
}

struct HighestConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr std::uint32_t kSharedBytes = 2 * 2 * 4 * kWarps;
};

// Sums over the threads of a CTA. Of two places the one is written while the other may be read.
template <class Config>
class CtaSums {
 public:
  // Of each warp, by all its lanes. Calls alternate between the places.
  __device__ void store(int a, int b) {
    place_ ^= 8 * Config::kWarps;
    if (ptx::lane_index() == 0) {
      ptx::store_shared(address(0, ptx::warp_index()), a);
      ptx::store_shared(address(1, ptx::warp_index()), b);
    }
    ptx::sync_threads();  // all sums are there
  }
  // Of the first warps, after `store`.
  __device__ int sum(int which, int warps) const {
    int all = 0;
    for (int warp = 0; warp < warps; ++warp) all += ptx::load_shared<int>(address(which, warp));
    return all;
  }

 private:
  __device__ std::uint32_t address(int which, int warp) const {
    return ptx::shared_base() + place_ + 4 * (which * Config::kWarps + warp);
  }
  std::uint32_t place_ = 0;
};

// A CTA makes one list. The rank that as many blocks reach as there is room for is found by
// bisection on its bits; blocks above it are listed, and of those at it the first.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    list_highest(const __grid_constant__ BoundParams p) {
  const int batch = static_cast<int>(blockIdx.z), list = static_cast<int>(blockIdx.y),
            token = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x),
            warp = ptx::warp_index();
  const std::uint32_t lower_lanes = (1u << ptx::lane_index()) - 1;
  const BlockLimits limits(p, batch, token);
  const std::int64_t row =
      (static_cast<std::int64_t>(batch) * p.num_lists + list) * p.q_len + token;
  const float* scores = p.scores + row * p.num_blocks;
  std::int32_t* indices = p.indices + row * p.top_k;
  // In the order of the scores; 0 for blocks that are not chosen whatever the others are.
  const auto rank_at = [&](int block) -> std::uint32_t {
    if (!limits.competes(block)) return 0;
    constexpr std::uint32_t kSign = 1u << 31;
    const float score = ptx::load_global(scores + block);
    const std::uint32_t bits = ptx::bits_of(score);
    if (!(score > -INFINITY)) return 0;           // NaN too
    return bits <= kSign ? bits | kSign : ~bits;  // the two zeros are equal
  };
  CtaSums<Config> sums;
  const auto num_reaching = [&](std::uint32_t rank) {
    int count = 0;
    for (int base = 0; base < limits.end_of_scored; base += Config::kThreads)
      count += ptx::count_bits(ptx::ballot(rank_at(base + thread) >= rank));
    sums.store(count, 0);
    return sums.sum(0, Config::kWarps);
  };

  const int room = larger(p.top_k - limits.num_kept(), 0);
  std::uint32_t threshold = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const std::uint32_t raised = threshold | 1u << bit;
    const int reaching = num_reaching(raised);
    if (reaching >= room) threshold = raised;
    if (reaching == room) break;
  }
  // Of the blocks at the threshold, so many are listed. No rank is the largest number there is.
  const int num_level = room - num_reaching(threshold + 1);

  const int end = larger(limits.end_of_scored, larger(limits.end_of_first, limits.end_of_last));
  int num_listed = 0, num_at_level = 0;  // of the blocks before, but for those at the threshold
  for (int base = 0; base < end; base += Config::kThreads) {
    const int block = base + thread;
    const std::uint32_t rank = rank_at(block);
    const bool is_certain = (block < end && limits.is_kept(block)) || rank > threshold,
               is_level = rank != 0 && rank == threshold;
    const std::uint32_t certain = ptx::ballot(is_certain), level = ptx::ballot(is_level);
    sums.store(ptx::count_bits(certain), ptx::count_bits(level));
    const int level_before =
        num_at_level + sums.sum(1, warp) + ptx::count_bits(level & lower_lanes);
    if (is_certain || (is_level && level_before < num_level)) {
      const int place = num_listed + sums.sum(0, warp) + ptx::count_bits(certain & lower_lanes) +
                        smaller(level_before, num_level);
      if (place < p.top_k) ptx::store_global(indices + place, block);
    }
    num_listed += sums.sum(0, Config::kWarps);
    num_at_level += sums.sum(1, Config::kWarps);
  }
  for (int i = num_listed + smaller(num_at_level, num_level) + thread; i < p.top_k;
       i += Config::kThreads) {
    ptx::store_global(indices + i, -1);
  }
}

}  // namespace sparse_attn
