// Block-sparse flash attention, backward, for compute capability 8.0. Probabilities are recomputed
// from the lse.
//
// dQ is query-major: the forward's walk. dK and dV are key-major: a CTA has a chunk of keys, 16 per
// warp, and walks the query tiles that chose its block, by the inverse of the plan. All products of
// that kernel are transposed, S^T = K Q^T, so that each warp sums the gradients of its own keys in
// registers. No atomics: results do not depend on the order of CTAs.
#pragma once

#include "common/tile.cuh"
#include "params.h"
#include "sm80/matrix.cuh"

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
  static constexpr int kSharedBytes = 2 * kTileBytes + Ring::kBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    query_gradient(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys;
  const AttentionInputs& in = p.in;
  const Tile tile(in.shape, in.plan, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                  in.plan.num_tiles - 1 - static_cast<int>(blockIdx.x));
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
  copy_rows<kHeadDim, Config::kThreads>(query, in.query, Config::kRows, row_of);
  copy_rows<kHeadDim, Config::kThreads>(d_out, p.d_out, Config::kRows, row_of);
  ring.fetch(0);

  Sums<kHeadDim> d_query = {};
  for (int chunk = 0; chunk < chunks.count(); ++chunk) {
    ring.fetch(chunk + 1);
    ptx::copy_wait<1>();
    ptx::sync_threads();  // every thread's copies of this chunk are there
    const int first_key = chunks.first_key(chunk);
    if (first_key >= 0) {
      const std::uint32_t own_rows = 16 * warp * kRowBytes<kHeadDim>;
      Sums<kKeys> scores = {}, d_probs = {};
      multiply_transposed<T, kHeadDim, kKeys>(scores, query + own_rows, ring.key(chunk));
      multiply_transposed<T, kHeadDim, kKeys>(d_probs, d_out + own_rows, ring.value(chunk));
      const bool is_chosen[2] = {chose(in.plan, tile, rows[0], chunks.slot(chunk)),
                                 chose(in.plan, tile, rows[1], chunks.slot(chunk))};
      std::uint32_t visible[kKeys / 8];  // bit 2 half + i
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < kKeys / 8; ++column) {
        visible[column] = 0;
        SPARSE_ATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const KeyMask key(in, tile.batch, tile.kv_head,
                            first_key + 8 * column + lane % 4 * 2 + i);
          SPARSE_ATTN_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int place = 2 * half + i;
            const Logit x = logit(in, scores[column][place], key.bias);
            const bool is_visible = key.is_key && is_chosen[half] && x.base2 != -INFINITY &&
                                    masks[half].sees(in.mask, key.position, key.segment);
            visible[column] |= static_cast<std::uint32_t>(is_visible) << place;
            const float d_logit =
                ptx::exp2_approx(x.base2 - lse[half]) * (d_probs[column][place] - delta[half]);
            scores[column][place] = is_visible ? d_logit * x.slope : 0;
          }
        }
      }
      std::uint32_t keep[kKeys / 8];
      wanted_by_any<kKeys>(keep,
                           [&](int column, int i) { return (visible[column] >> i & 5) != 0; });
      multiply_registers<T, kHeadDim, kKeys>(d_query, scores, keep, ring.key(chunk));
    }
    ptx::sync_threads();  // the stage may be written again
  }
  ptx::copy_wait<0>();
  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (rows[half] < tile.num_rows) {
      store_row<T, kHeadDim>(p.d_query, tile.row_offset(in.shape, rows[half]), d_query, half,
                             in.scale);
    }
  }
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
  static constexpr int kSharedBytes = 2 * kChunkBytes + kStages * kStageBytes;
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

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    key_gradient(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys, kPart = Config::kPart;
  const AttentionInputs& in = p.in;
  const int kv_head = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
  const int first_key = static_cast<int>(blockIdx.x) * kKeys;
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int keys[2] = {first_key + 16 * warp + lane / 4, first_key + 16 * warp + lane / 4 + 8};
  const KeyMask key_masks[2] = {KeyMask(in, batch, kv_head, keys[0]),
                                KeyMask(in, batch, kv_head, keys[1])};

  // The block's list of (tile, slot).
  const int plan_batch = in.plan.plan_batch == 1 ? 0 : batch,
            plan_head = in.plan.plan_heads == 1 ? 0 : kv_head;
  const std::int64_t plan_row =
      static_cast<std::int64_t>(plan_batch) * in.plan.plan_heads + plan_head;
  const int num_kv_blocks = (in.shape.kv_len + in.shape.kv_block_size - 1) / in.shape.kv_block_size;
  const std::int64_t capacity = static_cast<std::int64_t>(in.plan.num_tiles) * in.plan.capacity;
  const std::int32_t* offsets =
      p.inverse_offsets + plan_row * (num_kv_blocks + 1) + first_key / in.shape.kv_block_size;
  const std::int64_t begin = ptx::load_global(offsets), end = ptx::load_global(offsets + 1);
  const std::int64_t first_entry = begin < 0 ? 0 : begin,
                     last_entry = end < capacity ? end : capacity;
  // Negative if the plan names a tile or slot that does not exist.
  const auto tile_at = [&](std::int64_t entry) {
    const int index = ptx::load_global(p.inverse_tiles + plan_row * capacity + entry);
    const int slot = ptx::load_global(p.inverse_slots + plan_row * capacity + entry);
    const bool exists =
        index >= 0 && index < in.plan.num_tiles && slot >= 0 && slot < in.plan.capacity;
    return exists ? index : -1;
  };

  const std::uint32_t key = ptx::shared_base(), value = key + Config::kChunkBytes,
                      ring = value + Config::kChunkBytes;
  const auto stage_of = [&](std::int64_t entry) {
    return ring + static_cast<std::uint32_t>((entry - first_entry) % Config::kStages) *
                      Config::kStageBytes;
  };
  // Rows of a tile: queries, gradients of the outputs, and the table.
  const auto fetch = [&](std::int64_t entry) {
    const int index = tile_at(entry);
    const Tile tile(in.shape, in.plan, batch, kv_head, index < 0 ? 0 : index);
    const std::uint32_t stage = stage_of(entry);
    const auto row_of = [&](int row) -> std::int64_t {
      return index >= 0 && row < tile.num_rows ? tile.row_offset(in.shape, row) : -1;
    };
    copy_rows<kHeadDim, Config::kThreads>(stage, in.query, Config::kRows, row_of);
    copy_rows<kHeadDim, Config::kThreads>(stage + Config::kTileBytes, p.d_out, Config::kRows,
                                          row_of);
    for (int row = static_cast<int>(threadIdx.x); row < Config::kRows; row += Config::kThreads) {
      TableRow entry_row{RowMask(), 0, 0};
      if (row_of(row) >= 0) {
        const int slot = ptx::load_global(p.inverse_slots + plan_row * capacity + entry);
        entry_row.mask = RowMask(in.shape, in.mask, tile, row);
        entry_row.mask.is_row =
            chose(in.plan, tile, row, tile.list_offset(in.plan) * in.plan.capacity + slot);
        entry_row.lse = ptx::load_global(p.lse + row_of(row)) * kLog2E;
        entry_row.delta = ptx::load_global(p.delta + row_of(row));
      }
      entry_row.store(stage + 2 * Config::kTileBytes + 4 * Config::kRowWords * row);
    }
  };

  const auto key_row_of = [&](int i) -> std::int64_t {
    if (first_key + i >= in.shape.kv_len) return -1;
    return (static_cast<std::int64_t>(batch) * in.shape.kv_len + first_key + i) *
               in.shape.num_kv_heads +
           kv_head;
  };
  copy_rows<kHeadDim, Config::kThreads>(key, in.key, kKeys, key_row_of);
  copy_rows<kHeadDim, Config::kThreads>(value, in.value, kKeys, key_row_of);
  if (Config::kStages > 1 && first_entry < last_entry) fetch(first_entry);
  ptx::copy_commit();

  // Those of keys beyond kv_len are not stored.
  Sums<kHeadDim> d_key = {}, d_value = {};
  float d_bias[2] = {0, 0};
  for (std::int64_t entry = first_entry; entry < last_entry; ++entry) {
    const std::int64_t next = entry + Config::kStages - 1;
    if (next < last_entry) fetch(next);
    ptx::copy_commit();
    ptx::copy_wait<Config::kStages - 1>();
    ptx::sync_threads();  // every thread's copies and rows of this tile are there
    const std::uint32_t stage = stage_of(entry), own_keys = 16 * warp * kRowBytes<kHeadDim>;
    for (int part = 0; part < Config::kRows; part += kPart) {
      const std::uint32_t query = stage + part * kRowBytes<kHeadDim>,
                          d_out = query + Config::kTileBytes;
      Sums<kPart> probs = {}, d_logits = {};
      multiply_transposed<T, kHeadDim, kPart>(probs, key + own_keys, query);
      if constexpr (Config::kHasKey) {
        multiply_transposed<T, kHeadDim, kPart>(d_logits, value + own_keys, d_out);
      }
      std::uint32_t visible[kPart / 8];  // bit 2 half + i
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < kPart / 8; ++column) {
        visible[column] = 0;
        SPARSE_ATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int row = part + 8 * column + lane % 4 * 2 + i;
          const auto row_data =
              TableRow::load(stage + 2 * Config::kTileBytes + 4 * Config::kRowWords * row);
          SPARSE_ATTN_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int place = 2 * half + i;
            const KeyMask& mask = key_masks[half];
            const Logit x = logit(in, probs[column][place], mask.bias);
            const bool is_visible = row_data.mask.is_row && x.base2 != -INFINITY &&
                                    row_data.mask.sees(in.mask, mask.position, mask.segment);
            visible[column] |= static_cast<std::uint32_t>(is_visible) << place;
            const float prob = is_visible ? ptx::exp2_approx(x.base2 - row_data.lse) : 0;
            const float d_logit =
                is_visible ? prob * (d_logits[column][place] - row_data.delta) : 0;
            probs[column][place] = prob;
            d_bias[half] += d_logit;
            d_logits[column][place] = is_visible ? d_logit * x.slope : 0;
          }
        }
      }
      std::uint32_t keep[kPart / 8];
      wanted_by_any<kPart>(keep,
                           [&](int column, int i) { return (visible[column] >> i & 5) != 0; });
      if constexpr (Config::kHasValue)
        multiply_registers<T, kHeadDim, kPart>(d_value, probs, keep, d_out);
      if constexpr (Config::kHasKey)
        multiply_registers<T, kHeadDim, kPart>(d_key, d_logits, keep, query);
    }
    ptx::sync_threads();  // the stage may be written again
  }
  ptx::copy_wait<0>();

  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = d_bias[half];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    if (keys[half] >= in.shape.kv_len) continue;
    const std::int64_t row = key_row_of(keys[half] - first_key);
    if constexpr (Config::kHasValue) store_row<T, kHeadDim>(p.d_value, row, d_value, half, 1.0f);
    if constexpr (Config::kHasKey) {
      store_row<T, kHeadDim>(p.d_key, row, d_key, half, in.scale);
      if (p.d_key_bias != nullptr && lane % 4 == 0) {
        const std::int64_t head_row =
            static_cast<std::int64_t>(batch) * in.shape.num_kv_heads + kv_head;
        ptx::store_global(p.d_key_bias + head_row * in.shape.kv_len + keys[half], sum);
      }
    }
  }
}

}  // namespace sparse_attn::sm80
