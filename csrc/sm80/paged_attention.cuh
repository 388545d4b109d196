// Attention of a few query tokens over selected blocks of keys that lie in pages, as in decoding.
//
// A CTA has the rows of one list, query heads times query tokens, and one split of the list's keys.
// It looks up where these lie, run by run, and they come by cp.async through a ring of stages. With
// few rows the four warps have different keys of a chunk, with more they have different rows. In
// the end the warps' sums are added, and go to the result, or to that of the split, which
// `merge_splits` adds to those of the others. No atomics: results do not depend on the order of
// CTAs.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/paged.cuh"
#include "common/tile.cuh"
#include "params.h"
#include "sm80/attention_forward.cuh"
#include "sm80/matrix.cuh"

namespace sparse_attn::sm80 {

template <class T_, int kHeadDim_, int kRowWarps_, int kStages_>
struct PagedAttentionConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kKeyWarps = 4 / kRowWarps;
  static constexpr int kThreads = 32 * kRowWarps * kKeyWarps;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kKeys = kRowWarps > 1 ? 32 : 64;  // of a chunk
  // What a warp computes on at a time.
  struct WarpTile {
    static constexpr int kHeadDim = kHeadDim_, kKeys = PagedAttentionConfig::kKeys / kKeyWarps;
  };
  static constexpr int kRuns = kKeys / kRunKeys;

  // Where the keys lie is looked up for so many chunks at a time.
  static constexpr int kWindowChunks = 32;
  static constexpr int kWindowRuns = kWindowChunks * kRuns;
  static constexpr int kQueryBytes = kRows * kRowBytes<kHeadDim>;
  static constexpr int kChunkBytes = kKeys * kRowBytes<kHeadDim>;
  static constexpr int kRingBytes = kStages * 2 * kChunkBytes;
  static constexpr int kTableBytes = 2 * kWindowRuns * static_cast<int>(sizeof(Run));
  static constexpr int kSharedBytes = kQueryBytes + kRingBytes + kTableBytes;

  // When no more keys are read, the place of query and ring has the sums of the warps: of each row
  // the maximum and the sum of its softmax, and a row that takes 8 floats more than its elements,
  // so that what a warp writes together lies in different banks.
  static constexpr int kPitch = kHeadDim + 8;
  static constexpr int kStatisticsBytes = kKeyWarps * kRows * 8;
  static constexpr int kSumsBytes = kKeyWarps * kRows * kPitch * 4;
  static_assert(WarpTile::kKeys % kRunKeys == 0 && 2 <= kStages && kStages <= kWindowChunks);
  static_assert(kStatisticsBytes + kSumsBytes <= kQueryBytes + kRingBytes);
};

struct alignas(16) Quad {
  float x[4];
};

// The sums of the warps that share rows, in shared memory.
template <class Config>
class WarpSums {
 public:
  struct alignas(8) Statistics {
    float maximum, sum;  // the maximum in base 2
  };

  __device__ explicit WarpSums(std::uint32_t base) : base_(base) {}

  // Of the 16 rows of a warp.
  template <class Accumulator>
  __device__ void store(const Accumulator& accumulator, int key_warp, int first_row) const {
    const int lane = ptx::lane_index();
    SPARSE_ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = key_warp * Config::kRows + first_row + lane / 4 + 8 * half;
      float sum = accumulator.sum[half];
      sum += ptx::shuffle_xor(sum, 1);
      sum += ptx::shuffle_xor(sum, 2);
      if (lane % 4 == 0)
        ptx::store_shared(base_ + 8 * row, Statistics{accumulator.maximum[half], sum});
      const std::uint32_t to = sums() + 4 * (row * Config::kPitch + lane % 4 * 2);
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < Config::kHeadDim / 8; ++column) {
        const auto& x = accumulator.out[column];
        ptx::store_shared(to + 32 * column, Pair{x[2 * half], x[2 * half + 1]});
      }
    }
  }

  // Of all warps together.
  __device__ Statistics statistics(int row) const {
    Statistics all = {-INFINITY, 0};
    SPARSE_ATTN_UNROLL
    for (int warp = 0; warp < Config::kKeyWarps; ++warp)
      all.maximum = fmaxf(all.maximum, of_warp(warp, row).maximum);
    SPARSE_ATTN_UNROLL
    for (int warp = 0; warp < Config::kKeyWarps; ++warp)
      all.sum += of_warp(warp, row).sum * factor(warp, row, all.maximum);
    return all;
  }

  // Four elements of the sum of all warps, times `scale`.
  __device__ void add(float (&x)[4], int row, int column, float maximum, float scale) const {
    SPARSE_ATTN_UNROLL
    for (int warp = 0; warp < Config::kKeyWarps; ++warp) {
      const int place = (warp * Config::kRows + row) * Config::kPitch + column;
      const Quad sums_of_warp = ptx::load_shared<Quad>(sums() + 4 * place);
      const float weight = factor(warp, row, maximum) * scale;
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 4; ++i) x[i] += sums_of_warp.x[i] * weight;
    }
  }

 private:
  struct alignas(8) Pair {
    float low, high;
  };

  __device__ std::uint32_t sums() const { return base_ + Config::kStatisticsBytes; }
  __device__ Statistics of_warp(int warp, int row) const {
    return ptx::load_shared<Statistics>(base_ + 8 * (warp * Config::kRows + row));
  }
  __device__ float factor(int warp, int row, float maximum) const {
    return ptx::exp2_approx(of_warp(warp, row).maximum - (maximum == -INFINITY ? 0 : maximum));
  }

  std::uint32_t base_;
};

// Where a row's result goes: to the arrays of all keys, or of a split.
template <class T>
class PagedResults {
 public:
  __device__ PagedResults(const PagedAttentionParams& p, const PagedTile& tile, int split)
      : p_(p), tile_(tile) {
    const std::int64_t part = static_cast<std::int64_t>(tile.batch) * p.num_splits + split;
    first_row_ = part * p.q_len * p.num_q_heads;
  }

  // Four neighbouring elements.
  __device__ void store(int row, int column, const float (&x)[4]) const {
    const std::int64_t place = row_of(row) * p_.head_dim + column;
    if (p_.num_splits > 1) {
      ptx::store_global(reinterpret_cast<Quad*>(p_.partial_out + place),
                        Quad{x[0], x[1], x[2], x[3]});
    } else {
      ptx::store_global(reinterpret_cast<Halves*>(static_cast<T*>(p_.out) + place),
                        Halves{ptx::pack<T>(x[0], x[1]), ptx::pack<T>(x[2], x[3])});
    }
  }
  __device__ void store_lse(int row, float lse_log2) const {
    if (p_.num_splits > 1) {
      ptx::store_global(p_.partial_lse_log2 + row_of(row), lse_log2);
    } else {
      ptx::store_global(p_.lse + row_of(row), lse_log2 * kLn2);
    }
  }

 private:
  struct alignas(8) Halves {
    std::uint32_t low, high;
  };

  __device__ std::int64_t row_of(int row) const { return first_row_ + tile_.row_offset(p_, row); }

  const PagedAttentionParams& p_;
  const PagedTile& tile_;
  std::int64_t first_row_;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    paged_attention(const __grid_constant__ PagedAttentionParams p) {
  using T = typename Config::T;
  using WarpTile = typename Config::WarpTile;
  constexpr int kHeadDim = Config::kHeadDim, kStages = Config::kStages, kKeys = Config::kKeys,
                kRuns = Config::kRuns;
  const PagedTile tile(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                       static_cast<int>(blockIdx.x) / p.num_splits, Config::kRows);
  const int split = static_cast<int>(blockIdx.x) % p.num_splits;
  const PagedResults<T> results(p, tile, split);
  const PagedKeys keys(p, tile, split);
  const int num_chunks = (keys.num_runs() + kRuns - 1) / kRuns;
  if (num_chunks == 0 && p.num_splits > 1) {
    for (int row = static_cast<int>(threadIdx.x); row < tile.num_rows; row += Config::kThreads)
      results.store_lse(row, -INFINITY);
    return;
  }

  const std::uint32_t query = ptx::shared_base(), ring = query + Config::kQueryBytes,
                      table = ring + Config::kRingBytes;
  copy_rows<kHeadDim, Config::kThreads, Config::kRows>(
      {{p.query, query}}, [&](int row) -> std::int64_t {
        const std::int64_t first = static_cast<std::int64_t>(tile.batch) * p.q_len * p.num_q_heads;
        return row < tile.num_rows ? first + tile.row_offset(p, row) : -1;
      });
  const auto run_address = [&](int run) {
    return table + run % (2 * Config::kWindowRuns) * static_cast<int>(sizeof(Run));
  };
  const auto look_up = [&](int window) {
    for (int i = static_cast<int>(threadIdx.x); i < Config::kWindowRuns; i += Config::kThreads) {
      const int run = window * Config::kWindowRuns + i;
      ptx::store_shared(run_address(run), keys.run(run));
    }
  };
  const auto run_at = [&](int chunk, int key) {
    return ptx::load_shared<Run>(run_address(chunk * kRuns + key / kRunKeys));
  };
  const auto stage_of = [&](int chunk) { return ring + chunk % kStages * 2 * Config::kChunkBytes; };
  const auto fetch = [&](int chunk) {
    if (chunk < num_chunks) {
      const std::uint32_t stage = stage_of(chunk);
      copy_rows<kHeadDim, Config::kThreads, kKeys>(
          {{p.key_pages, stage}, {p.value_pages, stage + Config::kChunkBytes}},
          [&](int key) -> std::int64_t {
            const Run run = run_at(chunk, key);
            const int i = key % kRunKeys;
            return keys.has(run, i) ? keys.row(run, i, tile.kv_head) : -1;
          });
    }
    ptx::copy_commit();
  };
  look_up(0);
  ptx::sync_threads();  // the first window of the table is there
  for (int chunk = 0; chunk < kStages - 1; ++chunk) fetch(chunk);

  const int lane = ptx::lane_index(), row_warp = ptx::warp_index() % Config::kRowWarps,
            key_warp = ptx::warp_index() / Config::kRowWarps,
            warp_key = key_warp * WarpTile::kKeys;  // of a chunk
  const std::uint32_t warp_query = query + 16 * row_warp * kRowBytes<kHeadDim>;
  const PagedRowMask masks[2] = {
      PagedRowMask(p, tile, 16 * row_warp + lane / 4, keys.seq_len()),
      PagedRowMask(p, tile, 16 * row_warp + lane / 4 + 8, keys.seq_len())};
  AttentionInputs in{};  // as far as `logit` reads it
  in.scale = p.scale;
  in.logits_soft_cap = p.logits_soft_cap;
  Accumulator<WarpTile> accumulator;
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    ptx::copy_wait<kStages - 2>();
    // Every thread's copies of this chunk are there. The chunk before is read, and so is its window
    // of the table.
    ptx::sync_threads();
    if (chunk % Config::kWindowChunks == 0) look_up(chunk / Config::kWindowChunks + 1);
    fetch(chunk + kStages - 1);
    const std::uint32_t key = stage_of(chunk) + warp_key * kRowBytes<kHeadDim>;
    Sums<WarpTile::kKeys> scores = {};
    multiply_transposed<T, kHeadDim, WarpTile::kKeys>(scores, warp_query, key);
    SPARSE_ATTN_UNROLL
    for (int column = 0; column < WarpTile::kKeys / 8; ++column) {
      const Run run = run_at(chunk, warp_key + 8 * column);
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int in_run = 8 * column % kRunKeys + lane % 4 * 2 + i;
        SPARSE_ATTN_UNROLL
        for (int half = 0; half < 2; ++half) {
          float& score = scores[column][2 * half + i];
          const bool is_visible = keys.has(run, in_run) && masks[half].sees(run.first_key + in_run);
          score = is_visible ? logit(in, score, 0).base2 : -INFINITY;
        }
      }
    }
    std::uint32_t keep[WarpTile::kKeys / 8];
    wanted_by_any<WarpTile::kKeys>(keep, [&](int column, int i) {
      return scores[column][i] != -INFINITY || scores[column][2 + i] != -INFINITY;
    });
    accumulator.rescale(scores);
    multiply_registers<T, kHeadDim, WarpTile::kKeys>(accumulator.out, scores, keep,
                                                     key + Config::kChunkBytes);
  }
  ptx::copy_wait<0>();
  ptx::sync_threads();  // query and ring are read

  const WarpSums<Config> sums(query);
  sums.store(accumulator, key_warp, 16 * row_warp);
  ptx::sync_threads();  // all sums are there
  constexpr int kQuads = kHeadDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < tile.num_rows * kQuads; i += Config::kThreads) {
    const int row = i / kQuads, column = i % kQuads * 4;
    const auto [maximum, sum] = sums.statistics(row);
    float x[4] = {};
    sums.add(x, row, column, maximum, sum == 0 ? 0 : 1 / sum);
    results.store(row, column, x);
    if (column == 0) results.store_lse(row, sum == 0 ? -INFINITY : maximum + ptx::log2_approx(sum));
  }
}

// ---- On the host.

// As many stages, from 2 to 4, as let two CTAs share a multiprocessor, whose CTAs may have
// `kBytes`; if two have no room, as many as one has room for. 1 KB of each is reserved.
template <template <class, int, int, int> class Config, class T, int kHeadDim, int kRowWarps,
          int kBytes>
constexpr int stages_for() {
  constexpr int kLeast = Config<T, kHeadDim, kRowWarps, 2>::kSharedBytes,
                kStage = Config<T, kHeadDim, kRowWarps, 3>::kSharedBytes - kLeast;
  constexpr int kOfTwo = (kBytes - 1024) / 2;
  constexpr int kRoom = kLeast <= kOfTwo ? kOfTwo : kBytes;
  return std::min(2 + (kRoom - kLeast) / kStage, 4);
}

template <template <class, int, int, int> class Config, class T, int kHeadDim, int kBytes>
Status launch_paged(const PagedAttentionParams& p, const LaunchContext& context) {
  const auto run = [&]<int kRowWarps>() {
    using Of = Config<T, kHeadDim, kRowWarps, stages_for<Config, T, kHeadDim, kRowWarps, kBytes>()>;
    static_assert(Of::kSharedBytes <= kBytes);
    const std::int64_t rows = PagedTile::rows_per_list(p),
                       lists = std::int64_t{PagedTile::num_heads(p)} * p.list_rows;
    const Grid grid = {(rows + Of::kRows - 1) / Of::kRows * p.num_splits, lists, p.batch};
    return launch<Of>(paged_attention<Of>, grid, p, context);
  };
  return PagedTile::rows_per_list(p) <= 16 ? run.template operator()<1>()
                                           : run.template operator()<4>();
}

}  // namespace sparse_attn::sm80
