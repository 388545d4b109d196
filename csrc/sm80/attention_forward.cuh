// Block-sparse flash attention, forward, for compute capability 8.0.
//
// A CTA has one query tile: its rows are the tile's tokens times the query heads of one KV head, 16
// per warp. It walks the tile's union list. Keys and values of a chunk (a block, or a part of a
// large one) come by cp.async into one of two stages while the other is computed on. Scores stay in
// registers; rows that did not choose a block, and keys that the token mask hides, get -inf.
#pragma once

#include "common/tile.cuh"
#include "params.h"
#include "sm80/ptx.cuh"

namespace sparse_attn::sm80 {

template <class T_, int kHeadDim_, int kKeys_, int kWarps_>
struct ForwardConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;  // of a chunk
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kStages = 2;
  // 16 bytes more than the elements: then eight rows of a matrix lie in different banks.
  static constexpr int kRowBytes = 2 * kHeadDim + 16;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kChunkBytes = kKeys * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kChunkBytes;
  static_assert(kHeadDim % 16 == 0 && kKeys % 16 == 0);
};

// Copies `count` rows of head_dim elements to shared memory; rows that `row_of` does not know
// (negative) become zeros.
template <class Config, class RowOf>
__device__ __forceinline__ void copy_rows(std::uint32_t to, const void* from, int count,
                                          RowOf row_of) {
  constexpr int kPieces = Config::kHeadDim / 8;  // of 16 bytes
  const auto* bytes = static_cast<const char*>(from);
  for (int i = static_cast<int>(threadIdx.x); i < count * kPieces; i += Config::kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const std::int64_t offset = row_of(row);
    const char* source = offset < 0 ? bytes : bytes + offset * (2 * Config::kHeadDim) + 16 * piece;
    ptx::copy_async16(to + row * Config::kRowBytes + 16 * piece, source, offset >= 0);
  }
}

// The running softmax of the two rows, g and g + 8 of the warp's 16, that a thread shares with
// three others.
template <class Config>
struct Accumulator {
  static constexpr int kColumns = Config::kHeadDim / 8;
  float out[kColumns][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};  // of the logits in base 2
  float sum[2] = {0, 0};                      // of this thread's columns only

  // scores: logits in base 2, -inf where hidden; they become probabilities.
  __device__ void rescale(float (&scores)[Config::kKeys / 8][4]) {
    SPARSE_ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half];
      SPARSE_ATTN_UNROLL
      for (auto& column : scores)
        largest = fmaxf(largest, fmaxf(column[2 * half], column[2 * half + 1]));
      largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
      largest = fmaxf(largest, ptx::shuffle_xor(largest, 2));
      const float shift = largest == -INFINITY ? 0 : largest;
      const float factor = ptx::exp2_approx(maximum[half] - shift);
      maximum[half] = largest;
      sum[half] *= factor;
      SPARSE_ATTN_UNROLL
      for (auto& column : out) {
        column[2 * half] *= factor;
        column[2 * half + 1] *= factor;
      }
      SPARSE_ATTN_UNROLL
      for (auto& column : scores) {
        column[2 * half] = ptx::exp2_approx(column[2 * half] - shift);
        column[2 * half + 1] = ptx::exp2_approx(column[2 * half + 1] - shift);
        sum[half] += column[2 * half] + column[2 * half + 1];
      }
    }
  }
};

// scores[16, kKeys] = query[16, head_dim] key[kKeys, head_dim]^T, for the warp's rows.
template <class Config>
__device__ __forceinline__ void multiply_query_key(float (&scores)[Config::kKeys / 8][4],
                                                   std::uint32_t query, std::uint32_t key) {
  const int lane = ptx::lane_index();
  // Which row and which 8 elements a lane addresses: rows of the two halves first for the query,
  // elements first for the keys.
  const std::uint32_t query_lane =
      query + (lane / 8 % 2 * 8 + lane % 8) * Config::kRowBytes + lane / 16 * 16;
  const std::uint32_t key_lane =
      key + (lane / 16 * 8 + lane % 8) * Config::kRowBytes + lane / 8 % 2 * 16;
  SPARSE_ATTN_UNROLL
  for (int d = 0; d < Config::kHeadDim; d += 16) {
    const ptx::Fragment4 a = ptx::load_matrix(query_lane + 2 * d);
    SPARSE_ATTN_UNROLL
    for (int k = 0; k < Config::kKeys; k += 16) {
      const ptx::Fragment4 b = ptx::load_matrix(key_lane + k * Config::kRowBytes + 2 * d);
      ptx::multiply_add<typename Config::T>(scores[k / 8], a.x, {b.x[0], b.x[1]});
      ptx::multiply_add<typename Config::T>(scores[k / 8 + 1], a.x, {b.x[2], b.x[3]});
    }
  }
}

// out[16, head_dim] += probs[16, kKeys] value[kKeys, head_dim]. `seen` masks the values of keys
// that no row of the warp sees: they may be NaN, and 0 * NaN is not 0.
template <class Config>
__device__ __forceinline__ void multiply_probs_value(float (&out)[Config::kHeadDim / 8][4],
                                                     const float (&probs)[Config::kKeys / 8][4],
                                                     const std::uint32_t (&seen)[Config::kKeys / 8],
                                                     std::uint32_t value) {
  using T = typename Config::T;
  const int lane = ptx::lane_index();
  const std::uint32_t value_lane =
      value + (lane / 8 % 2 * 8 + lane % 8) * Config::kRowBytes + lane / 16 * 16;
  SPARSE_ATTN_UNROLL
  for (int k = 0; k < Config::kKeys; k += 16) {
    // The sums of one product are laid out as the first operand of the next.
    const auto& low = probs[k / 8];
    const auto& high = probs[k / 8 + 1];
    const std::uint32_t a[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]),
                                ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
    SPARSE_ATTN_UNROLL
    for (int d = 0; d < Config::kHeadDim; d += 16) {
      const ptx::Fragment4 b =
          ptx::load_matrix_transposed(value_lane + k * Config::kRowBytes + 2 * d);
      const std::uint32_t low_seen = seen[k / 8], high_seen = seen[k / 8 + 1];
      ptx::multiply_add<T>(out[d / 8], a, {b.x[0] & low_seen, b.x[1] & high_seen});
      ptx::multiply_add<T>(out[d / 8 + 1], a, {b.x[2] & low_seen, b.x[3] & high_seen});
    }
  }
}

// Products to logits in base 2, -inf where a row does not see a key. `seen`: the bits of the two
// keys of a column that a thread has are set if any row of the warp sees them.
template <class Config>
__device__ __forceinline__ void mask_scores(const AttentionForwardParams& p, const Tile& tile,
                                            const RowMask (&rows)[2], std::int64_t slot_offset,
                                            int first_key, float (&scores)[Config::kKeys / 8][4],
                                            std::uint32_t (&seen)[Config::kKeys / 8]) {
  constexpr float kLog2E = 1.4426950408889634f;
  const bool chose[2] = {rows[0].chose(p.plan, slot_offset), rows[1].chose(p.plan, slot_offset)};
  const int lane = ptx::lane_index();
  SPARSE_ATTN_UNROLL
  for (int column = 0; column < Config::kKeys / 8; ++column) {
    seen[column] = 0;
    SPARSE_ATTN_UNROLL
    for (int i = 0; i < 2; ++i) {
      bool is_seen = false;
      const int key = first_key + 8 * column + lane % 4 * 2 + i;
      const bool is_key = key < p.shape.kv_len;
      int position = key, segment = 0;
      float bias = 0;
      if (is_key) {
        const std::int64_t batch_key = static_cast<std::int64_t>(tile.batch) * p.shape.kv_len + key;
        if (p.mask.kv_positions != nullptr) position = ptx::load_global(p.mask.kv_positions + key);
        if (p.mask.kv_segments != nullptr)
          segment = ptx::load_global(p.mask.kv_segments + batch_key);
        if (p.key_bias != nullptr) {
          const std::int64_t head_row =
              static_cast<std::int64_t>(tile.batch) * p.shape.num_kv_heads + tile.kv_head;
          bias = ptx::load_global(p.key_bias + head_row * p.shape.kv_len + key);
        }
      }
      SPARSE_ATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        float& score = scores[column][2 * half + i];
        score *= p.scale;
        if (p.logits_soft_cap != 0) score = p.logits_soft_cap * tanhf(score / p.logits_soft_cap);
        const bool is_visible = is_key && chose[half] && rows[half].sees(p.mask, position, segment);
        score = is_visible ? (score + bias) * kLog2E : -INFINITY;
        is_seen = is_seen || is_visible;
      }
      // Lanes with the same lane % 4 have the same keys.
      if (ptx::ballot(is_seen) & 0x11111111u << (lane % 4)) seen[column] |= 0xffffu << (16 * i);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    attention_forward(const __grid_constant__ AttentionForwardParams p) {
  constexpr int kKeys = Config::kKeys;
  const Tile tile(p.shape, p.plan, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                  // Later tiles see more keys: they go first.
                  p.plan.num_tiles - 1 - static_cast<int>(blockIdx.x));
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int own_rows[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};
  const RowMask masks[2] = {RowMask(p.shape, p.plan, p.mask, tile, own_rows[0]),
                            RowMask(p.shape, p.plan, p.mask, tile, own_rows[1])};
  const std::uint32_t query = ptx::shared_base(), ring = query + Config::kQueryBytes;

  const std::int64_t list = tile.list_offset(p.plan);
  const std::int64_t first_slot = list * p.plan.capacity;
  const int parts = p.shape.kv_block_size / kKeys;  // chunks per block
  int num_chunks = ptx::load_global(p.plan.counts + list);
  num_chunks = (num_chunks < p.plan.capacity ? num_chunks : p.plan.capacity) * parts;
  // -1 if the list names a block that does not exist.
  const auto first_key_of = [&](int chunk) {
    const std::int64_t block = ptx::load_global(p.plan.blocks + first_slot + chunk / parts);
    const std::int64_t first = block * p.shape.kv_block_size + chunk % parts * kKeys;
    return block < 0 || first >= p.shape.kv_len ? -1 : static_cast<int>(first);
  };
  const auto key_of = [&](int chunk) {
    return ring + chunk % Config::kStages * 2 * Config::kChunkBytes;
  };
  const auto fetch = [&](int chunk) {
    const int first = first_key_of(chunk);
    const auto row_of = [&](int i) -> std::int64_t {
      return first < 0 || first + i >= p.shape.kv_len ? -1 : tile.key_offset(p.shape, first + i);
    };
    copy_rows<Config>(key_of(chunk), p.key, kKeys, row_of);
    copy_rows<Config>(key_of(chunk) + Config::kChunkBytes, p.value, kKeys, row_of);
  };

  copy_rows<Config>(query, p.query, Config::kRows, [&](int row) -> std::int64_t {
    return row < tile.num_rows ? tile.row_offset(p.shape, row) : -1;
  });
  if (num_chunks > 0) fetch(0);
  ptx::copy_commit();

  Accumulator<Config> accumulator;
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    // The stage of the next chunk is free: all warps have passed the barrier at the end of the last
    // round.
    if (chunk + 1 < num_chunks) fetch(chunk + 1);
    ptx::copy_commit();
    ptx::copy_wait<1>();
    ptx::sync_threads();  // every thread's copies of this chunk are there
    const int first_key = first_key_of(chunk);
    if (first_key >= 0) {
      float scores[kKeys / 8][4] = {};
      multiply_query_key<Config>(scores, query + 16 * warp * Config::kRowBytes, key_of(chunk));
      std::uint32_t seen[kKeys / 8];
      mask_scores<Config>(p, tile, masks, first_slot + chunk / parts, first_key, scores, seen);
      accumulator.rescale(scores);
      multiply_probs_value<Config>(accumulator.out, scores, seen,
                                   key_of(chunk) + Config::kChunkBytes);
    }
    ptx::sync_threads();  // the stage may be written again
  }
  ptx::copy_wait<0>();

  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = accumulator.sum[half];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    const int row = own_rows[half];
    if (row >= tile.num_rows) continue;
    const float factor = sum == 0 ? 0 : 1 / sum;
    const std::int64_t offset = tile.row_offset(p.shape, row);
    auto* out = static_cast<std::uint32_t*>(p.out) + offset * (Config::kHeadDim / 2);
    SPARSE_ATTN_UNROLL
    for (int column = 0; column < Config::kHeadDim / 8; ++column) {
      const auto& x = accumulator.out[column];
      ptx::store_global(
          out + 4 * column + lane % 4,
          ptx::pack<typename Config::T>(x[2 * half] * factor, x[2 * half + 1] * factor));
    }
    if (lane % 4 == 0) {
      constexpr float kLn2 = 0.6931471805599453f;
      ptx::store_global(
          p.lse + offset,
          sum == 0 ? -INFINITY : (accumulator.maximum[half] + ptx::log2_approx(sum)) * kLn2);
    }
  }
}

}  // namespace sparse_attn::sm80
