// The maximum and the minimum of each channel of the keys in a block. The same on every
// architecture.
#pragma once

#include "common/ptx.cuh"
#include "common/units.cuh"
#include "params.h"

namespace sparse_attn {

template <class T_>
struct ExtremaConfig {
  using T = T_;
  static constexpr int kThreads = 128;
  static constexpr std::uint32_t kSharedBytes = 0;
  static constexpr int kTogether = 4;  // tokens whose loads do not wait for each other
};

// Of a token in [key_batch, kv_len] or [num_pages, page_size]; negative if it is nowhere.
__device__ __forceinline__ std::int64_t token_row(const ExtremaParams& p, int batch,
                                                  std::int64_t position) {
  if (p.page_table == nullptr) {
    return position < p.kv_len
               ? static_cast<std::int64_t>(batch % p.key_batch) * p.kv_len + position
               : -1;
  }
  const std::int64_t place = position / p.page_size;
  if (place >= p.max_pages) return -1;
  const int page = ptx::load_global(
      p.page_table + static_cast<std::int64_t>(batch % p.table_batch) * p.max_pages + place);
  if (page < 0 || page >= p.num_pages) return -1;
  return static_cast<std::int64_t>(page) * p.page_size + position % p.page_size;
}

// A thread has eight channels of a block.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    block_extrema(const __grid_constant__ ExtremaParams p) {
  using T = typename Config::T;
  constexpr int kTogether = Config::kTogether;
  const int batch = static_cast<int>(blockIdx.z), slot = static_cast<int>(blockIdx.y),
            piece = static_cast<int>(blockIdx.x * Config::kThreads + threadIdx.x);
  if (piece >= p.row_pieces) return;
  const std::int64_t block = ptx::load_global(
      p.blocks + static_cast<std::int64_t>(batch % p.block_batch) * p.num_blocks + slot);
  const int length = ptx::load_global(p.lengths + batch % p.length_batch);
  const std::int64_t begin = block * p.block_size,
                     end = length < begin + p.block_size ? length : begin + p.block_size;
  float highest[8], lowest[8];
  SPARSE_ATTN_UNROLL
  for (int i = 0; i < 8; ++i) {
    highest[i] = -INFINITY;
    lowest[i] = INFINITY;
  }
  for (std::int64_t first = block < 0 ? end : begin; first < end; first += kTogether) {
    ptx::Words4 words[kTogether];
    bool exists[kTogether];
    SPARSE_ATTN_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      const std::int64_t row = first + j < end ? token_row(p, batch, first + j) : -1;
      exists[j] = row >= 0;
      words[j] = {};
      if (exists[j]) {
        words[j] =
            ptx::load_global(static_cast<const ptx::Words4*>(p.keys) + row * p.row_pieces + piece);
      }
    }
    SPARSE_ATTN_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<std::uint16_t>(words[j].x[i / 2] >> (i % 2 * 16));
        const float x = ptx::to_float(T{bits});
        const bool is_nan = x != x;  // which stays
        if (exists[j] && (is_nan || x > highest[i])) highest[i] = x;
        if (exists[j] && (is_nan || x < lowest[i])) lowest[i] = x;
      }
    }
  }
  const auto store = [&](void* to, const float (&x)[8]) {
    ptx::Words4 words;
    SPARSE_ATTN_UNROLL
    for (int i = 0; i < 4; ++i) words.x[i] = ptx::pack<T>(x[2 * i], x[2 * i + 1]);
    const std::int64_t row = static_cast<std::int64_t>(batch) * p.num_blocks + slot;
    ptx::store_global(static_cast<ptx::Words4*>(to) + row * p.row_pieces + piece, words);
  };
  store(p.maximum, highest);
  store(p.minimum, lowest);
}

}  // namespace sparse_attn
