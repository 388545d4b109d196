// Block-sparse flash attention, backward, for compute capability 8.0. Probabilities are recomputed
// from the lse.
//
// dQ is query-major: the forward's walk. dK and dV are key-major: a CTA has one chunk of keys
// after the other, 16 per warp, and walks the query tiles that chose its block, by the inverse of
// the plan. All products of that kernel are transposed, S^T = K Q^T, so that each warp sums the
// gradients of its own keys in registers. Blocks that very many tiles chose, as the first, are
// split in parts, whose float32 sums a last kernel adds. No atomics: results do not depend on the
// order of CTAs.
#pragma once

#include "common/inverse.cuh"
#include "common/slices.cuh"
#include "common/tile.cuh"
#include "params.h"
#include "sm80/matrix.cuh"
#include "sm80/pieces.cuh"

namespace sparse_attn::sm80 {

template <class T_, int kHeadDim_, int kKeys_, int kWarps_ = 4>
struct QueryGradientConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;  // of a chunk
  static constexpr int kThreads = 32 * kWarps_;
  static constexpr int kRows = 16 * kWarps_;
  using Ring = KeyRing<kHeadDim, kKeys, kThreads>;
  static constexpr int kTileBytes = kRows * kRowBytes<kHeadDim>;
  static constexpr int kSharedBytes = 2 * kTileBytes + Ring::kBytes + NextPiece::kBytes;
  // Of a multiprocessor; 0 leaves it to ptxas, which would spill a few registers for one
  // more with these.
  static constexpr int kFewestBlocks =
      (kHeadDim == 64 && kKeys == 64) || (kHeadDim == 96 && kKeys == 16) ? 1 : 0;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

// Calls `end_walk` when no more keys are read.
template <class Config, class EndWalk>
__device__ __forceinline__ void differentiate_slice(const AttentionBackwardParams& p,
                                                    const Tile& tile, EndWalk end_walk) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys;
  const AttentionInputs& in = p.in;
  const Chunks<kKeys> chunks(in, tile);
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int rows[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};
  const RowMask masks[2] = {RowMask(in.shape, in.mask, tile, rows[0]),
                            RowMask(in.shape, in.mask, tile, rows[1])};
  float lse[2] = {0, 0}, delta[2] = {0, 0};  // lse in base 2
  for (int half = 0; half < 2; ++half) {
    if (rows[half] >= tile.num_rows) continue;
    lse[half] = ptx::load_global(p.lse + tile.row_offset(in.shape, rows[half])) * kLog2E;
    delta[half] = ptx::load_global(p.delta + tile.row_offset(in.shape, rows[half]));
  }

  const std::uint32_t query = ptx::shared_base(), d_out = query + Config::kTileBytes;
  const typename Config::Ring ring(in, tile, chunks, d_out + Config::kTileBytes);
  const auto row_of = [&](int row) -> std::int64_t {
    return row < tile.num_rows ? tile.row_offset(in.shape, row) : -1;
  };
  copy_rows<kHeadDim, Config::kThreads, Config::kRows>({{in.query, query}, {p.d_out, d_out}},
                                                       row_of);
  ring.fetch(0);

  Sums<kHeadDim> d_query = {};
  for (int chunk = 0; chunk < chunks.count(); ++chunk) {
    ring.fetch(chunk + 1);
    ptx::copy_wait<1>();
    ptx::sync_threads();  // every thread's copies of this chunk are there
    const int first_key = chunks.first_key(chunk);
    bool sees[2];
    const Visible visible =
        visible_of_chunk<kKeys>(in, tile, masks, rows, chunks.slot(chunk), first_key, sees);
    if (visible != Visible::kNone) {
      const std::uint32_t own_rows = 16 * warp * kRowBytes<kHeadDim>;
      Sums<kKeys> scores = {}, d_probs = {};
      multiply_transposed<T, kHeadDim, kKeys>(scores, query + own_rows, ring.key(chunk));
      multiply_transposed<T, kHeadDim, kKeys>(d_probs, d_out + own_rows, ring.value(chunk));
      // The gradient of a scaled product.
      const auto d_score = [&](const Logit& x, int column, int place) {
        const int half = place / 2;
        return ptx::exp2_approx(x.base2 - lse[half]) * (d_probs[column][place] - delta[half]) *
               x.slope;
      };
      std::uint32_t keep[kKeys / 8];
      if (visible == Visible::kAll) {
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kKeys / 8; ++column) {
          keep[column] = ~0u;
          SPARSE_ATTN_UNROLL
          for (int place = 0; place < 4; ++place) {
            const float d = d_score(logit(in, scores[column][place], 0), column, place);
            scores[column][place] = sees[place / 2] ? d : 0;
          }
        }
      } else {
        std::uint32_t seen[kKeys / 8];  // bit 2 half + i
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kKeys / 8; ++column) {
          seen[column] = 0;
          SPARSE_ATTN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const KeyMask key(in, tile.batch, tile.kv_head,
                              first_key + 8 * column + lane % 4 * 2 + i);
            SPARSE_ATTN_UNROLL
            for (int half = 0; half < 2; ++half) {
              const int place = 2 * half + i;
              const Logit x = logit(in, scores[column][place], key.bias);
              const bool is_visible = key.is_key && sees[half] && x.base2 != -INFINITY &&
                                      masks[half].sees(in.mask, key.position, key.segment);
              seen[column] |= static_cast<std::uint32_t>(is_visible) << place;
              scores[column][place] = is_visible ? d_score(x, column, place) : 0;
            }
          }
        }
        wanted_by_any<kKeys>(keep, [&](int column, int i) { return (seen[column] >> i & 5) != 0; });
      }
      multiply_registers<T, kHeadDim, kKeys>(d_query, scores, keep, ring.key(chunk));
    }
    ptx::sync_threads();  // the stage may be written again
  }
  ptx::copy_wait<0>();
  end_walk();
  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (rows[half] < tile.num_rows) {
      store_row<T, kHeadDim>(p.d_query, tile.row_offset(in.shape, rows[half]), d_query, half,
                             in.scale);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kFewestBlocks)
    query_gradient(const __grid_constant__ AttentionBackwardParams p) {
  const Slices slices(p.in, p.num_taken, Config::kRows);
  NextPiece next(ptx::shared_base() + 2 * Config::kTileBytes + Config::Ring::kBytes);
  for (int slice = Slices::first(); slices.has(slice); slice = next.share())
    differentiate_slice<Config>(p, slices.tile(slice), [&] { next.take(slices); });
}

// Which gradients a CTA sums: both, if the registers hold them.
enum class KeyGradient { kBoth, kKey, kValue };

template <class T_, int kHeadDim_, int kKeys_, KeyGradient kWhich_>
struct KeyGradientConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;  // of a chunk; 16 per warp
  static constexpr bool kHasKey = kWhich_ != KeyGradient::kValue;
  static constexpr bool kHasValue = kWhich_ != KeyGradient::kKey;
  static constexpr int kThreads = 2 * kKeys;
  static constexpr int kRows = 64;  // of a query tile
  static constexpr int kPart = 32;  // rows that are computed on at a time
  static constexpr int kStages = kHeadDim > 128 ? 1 : 2;
  static constexpr int kRowWords = 8;  // of the table of rows
  static constexpr int kChunkBytes = kKeys * kRowBytes<kHeadDim>;
  static constexpr int kTileBytes = kRows * kRowBytes<kHeadDim>;
  static constexpr int kTableBytes = kRows * kRowWords * 4;
  static constexpr int kStageBytes = 2 * kTileBytes + kTableBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = 2 * kChunkBytes + kRingBytes + NextPiece::kBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

// A row of a query tile as the key-major kernel needs it, in shared memory.
struct TableRow {
  RowMask mask;
  float lse, delta;  // lse in base 2

  __device__ void store(std::uint32_t to) const {
    const int words[6] = {mask.is_row,    mask.position, mask.segment,
                          mask.num_sinks, mask.first,    mask.last};
    for (int i = 0; i < 6; ++i) ptx::store_shared(to + 4 * i, words[i]);
    ptx::store_shared(to + 24, lse);
    ptx::store_shared(to + 28, delta);
  }
  __device__ static TableRow load(std::uint32_t from) {
    TableRow row;
    int* const words[6] = {&row.mask.is_row,    &row.mask.position, &row.mask.segment,
                           &row.mask.num_sinks, &row.mask.first,    &row.mask.last};
    for (int i = 0; i < 6; ++i) *words[i] = ptx::load_shared<int>(from + 4 * i);
    row.lse = ptx::load_shared<float>(from + 24);
    row.delta = ptx::load_shared<float>(from + 28);
    return row;
  }
};

// Calls `end_walk` when no more rows are read.
template <class Config, class EndWalk>
__device__ __forceinline__ void differentiate_chunk(const AttentionBackwardParams& p,
                                                    const KeyChunks::Chunk& chunk,
                                                    EndWalk end_walk) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys, kPart = Config::kPart;
  const AttentionInputs& in = p.in;
  const int kv_head = chunk.kv_head, batch = chunk.batch;
  const InverseList list(in, p.inverse, batch, kv_head, chunk.part);
  if (!list.exists()) {
    end_walk();
    return;
  }
  const int first_key = list.block() * in.shape.kv_block_size + chunk.first_key;
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int warp_key = first_key + 16 * warp;
  const int keys[2] = {warp_key + lane / 4, warp_key + lane / 4 + 8};
  const KeyMask key_masks[2] = {KeyMask(in, batch, kv_head, keys[0]),
                                KeyMask(in, batch, kv_head, keys[1])};
  const int slices = Tile::slices_per_tile(in.shape, in.plan, Config::kRows);
  const std::int64_t num_steps = list.count() * slices;

  const std::uint32_t key = ptx::shared_base(), value = key + Config::kChunkBytes,
                      ring = value + Config::kChunkBytes;
  const auto stage_of = [&](std::int64_t step) {
    return ring + static_cast<std::uint32_t>(step % Config::kStages) * Config::kStageBytes;
  };
  // Rows of a slice of a tile: queries, gradients of the outputs, and the table.
  const auto fetch = [&](std::int64_t step) {
    const InverseList::Entry entry = list.at(step / slices);
    const bool exists = entry.tile >= 0;
    const Tile tile(in.shape, in.plan, Config::kRows, batch, kv_head,
                    (exists ? entry.tile : 0) * slices + static_cast<int>(step % slices));
    const std::uint32_t stage = stage_of(step);
    const auto row_of = [&](int row) -> std::int64_t {
      return exists && row < tile.num_rows ? tile.row_offset(in.shape, row) : -1;
    };
    copy_rows<kHeadDim, Config::kThreads, Config::kRows>(
        {{in.query, stage}, {p.d_out, stage + Config::kTileBytes}}, row_of);
    for (int row = static_cast<int>(threadIdx.x); row < Config::kRows; row += Config::kThreads) {
      TableRow table_row{RowMask(), 0, 0};
      if (row_of(row) >= 0) {
        table_row.mask = RowMask(in.shape, in.mask, tile, row);
        table_row.mask.is_row =
            chose(in.plan, tile, row, tile.list_offset(in.plan) * in.plan.capacity + entry.slot);
        table_row.lse = ptx::load_global(p.lse + row_of(row)) * kLog2E;
        table_row.delta = ptx::load_global(p.delta + row_of(row));
      }
      table_row.store(stage + 2 * Config::kTileBytes + 4 * Config::kRowWords * row);
    }
  };

  const auto key_row_of = [&](int i) -> std::int64_t {
    if (first_key + i >= in.shape.kv_len) return -1;
    return key_row(in.shape, batch % in.shape.key_batch, kv_head, first_key + i);
  };
  copy_rows<kHeadDim, Config::kThreads, kKeys>({{in.key, key}, {in.value, value}}, key_row_of);
  if (Config::kStages > 1 && num_steps > 0) fetch(0);
  ptx::copy_commit();

  // Those of keys beyond kv_len are not stored.
  Sums<kHeadDim> d_key = {}, d_value = {};
  float d_bias[2] = {0, 0};
  for (std::int64_t step = 0; step < num_steps; ++step) {
    const std::int64_t next = step + Config::kStages - 1;
    if (next < num_steps) fetch(next);
    ptx::copy_commit();
    ptx::copy_wait<Config::kStages - 1>();
    ptx::sync_threads();  // every thread's copies and rows of this tile are there
    const std::uint32_t stage = stage_of(step), own_keys = 16 * warp * kRowBytes<kHeadDim>;
    const auto table_row = [&](int row) {
      return TableRow::load(stage + 2 * Config::kTileBytes + 4 * Config::kRowWords * row);
    };
    for (int part = 0; part < Config::kRows; part += kPart) {
      static_assert(kPart == 32, "a row per lane");
      const RowMask lane_mask = table_row(part + lane).mask;
      const Visible lane_sees =
          lane_mask.is_row ? lane_mask.sees_keys(in, warp_key, warp_key + 15) : Visible::kNone;
      // Bit i: row i of the part sees all of the warp's keys, or only some.
      const std::uint32_t sees_all = ptx::ballot(lane_sees == Visible::kAll),
                          sees_some = ptx::ballot(lane_sees == Visible::kSome);
      if ((sees_all | sees_some) == 0) continue;

      const std::uint32_t query = stage + part * kRowBytes<kHeadDim>,
                          d_out = query + Config::kTileBytes;
      Sums<kPart> probs = {}, d_logits = {};
      multiply_transposed<T, kHeadDim, kPart>(probs, key + own_keys, query);
      if constexpr (Config::kHasKey) {
        multiply_transposed<T, kHeadDim, kPart>(d_logits, value + own_keys, d_out);
      }
      // Turns a product into a probability, and what its gradient comes from into that gradient.
      const auto differentiate = [&](const TableRow& row, const Logit& x, bool is_visible,
                                     int column, int place) {
        const float prob = is_visible ? ptx::exp2_approx(x.base2 - row.lse) : 0;
        const float d_logit = is_visible ? prob * (d_logits[column][place] - row.delta) : 0;
        probs[column][place] = prob;
        d_bias[place / 2] += d_logit;
        d_logits[column][place] = is_visible ? d_logit * x.slope : 0;
      };
      std::uint32_t keep[kPart / 8];
      if (sees_some == 0) {
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kPart / 8; ++column) {
          const int first_row = 8 * column + lane % 4 * 2;
          const std::uint32_t pair = sees_all >> first_row & 3;
          keep[column] = (pair & 1 ? 0xffffu : 0u) | (pair & 2 ? 0xffff0000u : 0u);
          SPARSE_ATTN_UNROLL
          for (int place = 0; place < 4; ++place) {
            const TableRow row = table_row(part + first_row + place % 2);
            const bool is_visible = (pair >> place % 2 & 1) != 0;
            differentiate(row, logit(in, probs[column][place], 0), is_visible, column, place);
          }
        }
      } else {
        std::uint32_t seen[kPart / 8];  // bit 2 half + i
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kPart / 8; ++column) {
          seen[column] = 0;
          SPARSE_ATTN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const TableRow row = table_row(part + 8 * column + lane % 4 * 2 + i);
            SPARSE_ATTN_UNROLL
            for (int half = 0; half < 2; ++half) {
              const int place = 2 * half + i;
              const KeyMask& mask = key_masks[half];
              const Logit x = logit(in, probs[column][place], mask.bias);
              const bool is_visible = row.mask.is_row && x.base2 != -INFINITY &&
                                      row.mask.sees(in.mask, mask.position, mask.segment);
              seen[column] |= static_cast<std::uint32_t>(is_visible) << place;
              differentiate(row, x, is_visible, column, place);
            }
          }
        }
        wanted_by_any<kPart>(keep, [&](int column, int i) { return (seen[column] >> i & 5) != 0; });
      }
      if constexpr (Config::kHasValue)
        multiply_registers<T, kHeadDim, kPart>(d_value, probs, keep, d_out);
      if constexpr (Config::kHasKey)
        multiply_registers<T, kHeadDim, kPart>(d_key, d_logits, keep, query);
    }
    ptx::sync_threads();  // the stage may be written again
  }
  ptx::copy_wait<0>();
  end_walk();

  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float bias_sum = d_bias[half];
    bias_sum += ptx::shuffle_xor(bias_sum, 1);
    bias_sum += ptx::shuffle_xor(bias_sum, 2);
    if (keys[half] >= in.shape.kv_len) continue;
    if (list.is_whole()) {
      const std::int64_t row = key_row(in.shape, batch, kv_head, keys[half]);
      if constexpr (Config::kHasValue) store_row<T, kHeadDim>(p.d_value, row, d_value, half, 1.0f);
      if constexpr (Config::kHasKey) {
        store_row<T, kHeadDim>(p.d_key, row, d_key, half, in.scale);
        if (p.d_key_bias != nullptr && lane % 4 == 0)
          ptx::store_global(p.d_key_bias + bias_offset(in.shape, batch, kv_head, keys[half]),
                            bias_sum);
      }
    } else {
      float* to =
          p.partials + list.partial_row(in.shape, p.inverse, keys[half]) * kPartialWidth<kHeadDim>;
      const auto store = [&](const Sums<kHeadDim>& sums, int first) {
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kHeadDim / 8; ++column) {
          for (int i = 0; i < 2; ++i) {
            ptx::store_global(to + first + 8 * column + lane % 4 * 2 + i,
                              sums[column][2 * half + i]);
          }
        }
      };
      if constexpr (Config::kHasKey) {
        store(d_key, 0);
        if (lane % 4 == 0) ptx::store_global(to + 2 * kHeadDim, bias_sum);
      }
      if constexpr (Config::kHasValue) store(d_value, kHeadDim);
    }
  }
}

// Without the 1, ptxas spills registers for one more block per multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    key_gradient(const __grid_constant__ AttentionBackwardParams p) {
  const KeyChunks chunks(p, Config::kKeys);
  NextPiece next(ptx::shared_base() + 2 * Config::kChunkBytes + Config::kRingBytes);
  for (int piece = KeyChunks::first(); chunks.has(piece); piece = next.share())
    differentiate_chunk<Config>(p, chunks.chunk(piece), [&] { next.take(chunks); });
}

}  // namespace sparse_attn::sm80
