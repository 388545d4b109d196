// Scores units of keys, pools them to blocks and selects the best blocks of each query, for compute
// capability 8.0 (common/select_blocks.cuh). A CTA is one group of threads, which has one tile of
// queries after the other; a warp has 32 of its rows, against all units of a chunk or a part of
// them.
#pragma once

#include "common/select_blocks.cuh"
#include "params.h"
#include "sm80/matrix.cuh"
#include "sm80/pieces.cuh"
#include "sm80/ptx.cuh"

namespace sparse_attn::sm80 {

template <class T_, int kHeadDim_, int kRowWarps_, int kColumnWarps_>
struct SelectionConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kColumnWarps = kColumnWarps_;
  static constexpr int kLaneRows = 4;
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 32 * kRowWarps;
  static constexpr int kSumTables = 1;
  static constexpr int kUnits = 64;  // of a chunk
  static constexpr int kColumns = kUnits / kColumnWarps;
  // Of a multiprocessor. Shared memory may leave room for a third one if chunks are small, and
  // ptxas would take a few registers too many.
  static constexpr int kFewestBlocks = kHeadDim == 64 && kRowWarps == 2 ? 3 : 2;
  // The query's fragments stay in registers; then its place in shared memory is used again.
  static constexpr bool kHoldsQuery = kHeadDim <= 128;
  static constexpr std::uint32_t kQueryBytes = kRows * kRowBytes<kHeadDim>;
  static constexpr std::uint32_t kChunkBytes = kUnits * kRowBytes<kHeadDim>;
  static_assert(kHeadDim % 16 == 0 && kColumns % 16 == 0);
};

// Where a CTA keeps what in shared memory: two chunks of units, the number of the next tile, then
// what the tokens need, in which the query has its place.
template <class Config>
struct SelectionMemory {
  std::uint32_t units, next;
  TokenMemory<Config> tokens;
  std::uint64_t bytes;

  // Offsets from `base`, which is also added to the bytes.
  SPARSE_ATTN_HOST_DEVICE explicit SelectionMemory(const SelectionTiling& tiling,
                                                   std::uint32_t base = 0)
      : units(base),
        next(units + 2 * Config::kChunkBytes),
        tokens(tiling, next + NextPiece::kBytes, Config::kHoldsQuery ? 0 : Config::kQueryBytes),
        bytes(tokens.end) {
    if (bytes < query() + Config::kQueryBytes) bytes = query() + Config::kQueryBytes;
  }
  SPARSE_ATTN_HOST_DEVICE std::uint32_t query() const { return tokens.gap; }  // [kRows, head_dim]
};

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
  __device__ void multiply(UnitScores<Config>& scores, std::uint32_t units) const {
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

// Two stages through which chunks of units pass, and the products of a warp's rows with them.
template <class Config>
class UnitRing {
 public:
  __device__ UnitRing(const SelectionParams& p, const SelectionTile& tile,
                      const QueryRows<Config>& query, std::uint32_t base, int first_column)
      : p_(p), tile_(tile), query_(query), base_(base), first_column_(first_column) {}

  // Starts with the units [first, end). All threads have read all chunks but the last.
  __device__ void start(const UnitParams& units, int first, int end) {
    units_ = &units;
    first_ = first;
    end_ = end;
    fetch();
  }

  // Calls `use(first unit, products)` for each chunk; units beyond the end are 0 in it.
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
      UnitScores<Config> scores = {};
      query_.multiply(scores, chunk + first_column_ * kRowBytes<Config::kHeadDim>);
      use(first, scores);
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
  const QueryRows<Config>& query_;
  std::uint32_t base_;
  int first_column_;
  const UnitParams* units_ = nullptr;
  int first_ = 0, end_ = 0;
  std::uint32_t stage_ = 0;
};

// All threads have left the tile before. Calls `end_walk` when no more units are read.
template <class Config, class EndWalk>
__device__ __forceinline__ void select_of_tile(const SelectionParams& p, const SelectionTile& tile,
                                               EndWalk end_walk) {
  const SelectionMemory<Config> memory(p.tiling, ptx::computed_here(ptx::shared_base()));
  const TokenGroup<Config> group(p, tile, memory.tokens, static_cast<int>(threadIdx.x), 0);
  copy_rows<Config::kHeadDim, Config::kThreads, Config::kRows>(
      {{p.query, memory.query()}}, [&](int row) -> std::int64_t {
        const int slot = group.rows.slot(row), head = group.rows.head(row);
        return group.is_row(row) ? tile.query_row(p, slot, head) : -1;
      });
  ptx::copy_commit();
  group.start();
  ptx::copy_wait<0>();
  ptx::sync_threads();  // query, positions and states are there

  const auto walks =
      walks_of(p, tile.num_tokens, [&](int slot) { return group.position_at(slot); });
  const QueryRows<Config> query(memory.query() +
                                32 * group.row_warp() * kRowBytes<Config::kHeadDim>);
  UnitRing<Config> ring(p, tile, query, memory.units, group.first_column());
  group.select(walks, ring);
  end_walk();
  group.write_lists();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kFewestBlocks)
    selection(const __grid_constant__ SelectionParams p) {
  const SelectionTiles tiles(p, 1);
  NextPiece next(SelectionMemory<Config>(p.tiling, ptx::shared_base()).next);
  for (int piece = SelectionTiles::first(); tiles.has(piece); piece = next.share())
    select_of_tile<Config>(p, tiles.tile(piece), [&] { next.take(tiles); });
}

// The tiling of which two CTAs have room on a multiprocessor, or at least one.
template <class Config>
SelectionTiling tiling_for(const SelectionParams& p, int segment_blocks) {
  return selection_tiling(
      p, Config::kRows, segment_blocks, kMostSharedBytes, true,
      [](const SelectionTiling& tiling) { return SelectionMemory<Config>(tiling).bytes; });
}

}  // namespace sparse_attn::sm80
