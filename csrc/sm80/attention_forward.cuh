// Block-sparse flash attention, forward, for compute capability 8.0.
//
// A CTA has one slice of a query tile after the other: its rows are tokens times the query heads of
// one KV head, 16 per warp. It walks the tile's union list. Keys and values of a chunk (a block, or
// a part of a large one) come by cp.async into one of two stages while the other is computed on.
// Scores stay in registers; rows that did not choose a block, and keys that the token mask hides,
// get -inf.
#pragma once

#include "common/slices.cuh"
#include "common/tile.cuh"
#include "params.h"
#include "sm80/matrix.cuh"
#include "sm80/pieces.cuh"

namespace sparse_attn::sm80 {

template <class T_, int kHeadDim_, int kKeys_, int kWarps_ = 4>
struct ForwardConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;  // of a chunk
  static constexpr int kThreads = 32 * kWarps_;
  static constexpr int kRows = 16 * kWarps_;
  using Ring = KeyRing<kHeadDim, kKeys, kThreads>;
  static constexpr int kQueryBytes = kRows * kRowBytes<kHeadDim>;
  static constexpr int kSharedBytes = kQueryBytes + Ring::kBytes + NextPiece::kBytes;
  static_assert(kHeadDim % 16 == 0 && kKeys % 16 == 0 && kSharedBytes <= kMostSharedBytes);
};

// The running softmax of the two rows, g and g + 8 of the warp's 16, that a thread shares with
// three others.
template <class Config>
struct Accumulator {
  Sums<Config::kHeadDim> out = {};
  float maximum[2] = {-INFINITY, -INFINITY};  // of the logits in base 2
  float sum[2] = {0, 0};                      // of this thread's columns only

  // scores: logits in base 2, -inf where hidden; they become probabilities.
  __device__ void rescale(Sums<Config::kKeys>& scores) {
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

// Calls `end_walk` when no more keys are read.
template <class Config, class EndWalk>
__device__ __forceinline__ void attend_to_slice(const AttentionForwardParams& p, const Tile& tile,
                                                EndWalk end_walk) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys;
  const AttentionInputs& in = p.in;
  const Chunks<kKeys> chunks(in, tile);
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int rows[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};
  const RowMask masks[2] = {RowMask(in.shape, in.mask, tile, rows[0]),
                            RowMask(in.shape, in.mask, tile, rows[1])};

  const std::uint32_t query = ptx::shared_base();
  const typename Config::Ring ring(in, tile, chunks, query + Config::kQueryBytes);

  copy_rows<kHeadDim, Config::kThreads, Config::kRows>(
      {{in.query, query}}, [&](int row) -> std::int64_t {
        return row < tile.num_rows ? tile.row_offset(in.shape, row) : -1;
      });
  ring.fetch(0);

  Accumulator<Config> accumulator;
  for (int chunk = 0; chunk < chunks.count(); ++chunk) {
    // The stage of the next chunk is free: all warps have passed the barrier at the end of the last
    // round.
    ring.fetch(chunk + 1);
    ptx::copy_wait<1>();
    ptx::sync_threads();  // every thread's copies of this chunk are there
    const int first_key = chunks.first_key(chunk);
    bool sees[2];
    const Visible visible =
        visible_of_chunk<kKeys>(in, tile, masks, rows, chunks.slot(chunk), first_key, sees);
    if (visible != Visible::kNone) {
      Sums<kKeys> scores = {};
      multiply_transposed<T, kHeadDim, kKeys>(scores, query + 16 * warp * kRowBytes<kHeadDim>,
                                              ring.key(chunk));
      std::uint32_t keep[kKeys / 8];
      if (visible == Visible::kAll) {
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kKeys / 8; ++column) {
          keep[column] = ~0u;
          SPARSE_ATTN_UNROLL
          for (int place = 0; place < 4; ++place) {
            float& score = scores[column][place];
            score = sees[place / 2] ? logit(in, score, 0).base2 : -INFINITY;
          }
        }
      } else {
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kKeys / 8; ++column) {
          SPARSE_ATTN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const KeyMask key(in, tile.batch, tile.kv_head,
                              first_key + 8 * column + lane % 4 * 2 + i);
            SPARSE_ATTN_UNROLL
            for (int half = 0; half < 2; ++half) {
              float& score = scores[column][2 * half + i];
              const bool is_visible =
                  key.is_key && sees[half] && masks[half].sees(in.mask, key.position, key.segment);
              score = is_visible ? logit(in, score, key.bias).base2 : -INFINITY;
            }
          }
        }
        wanted_by_any<kKeys>(keep, [&](int column, int i) {
          return scores[column][i] != -INFINITY || scores[column][2 + i] != -INFINITY;
        });
      }
      accumulator.rescale(scores);
      multiply_registers<T, kHeadDim, kKeys>(accumulator.out, scores, keep, ring.value(chunk));
    }
    ptx::sync_threads();  // the stage may be written again
  }
  ptx::copy_wait<0>();
  end_walk();

  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = accumulator.sum[half];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    if (rows[half] >= tile.num_rows) continue;
    const float factor = sum == 0 ? 0 : 1 / sum;
    const std::int64_t offset = tile.row_offset(in.shape, rows[half]);
    store_row<T, kHeadDim>(p.out, offset, accumulator.out, half, factor);
    if (lane % 4 == 0) {
      const float lse = (accumulator.maximum[half] + ptx::log2_approx(sum)) * kLn2;
      ptx::store_global(p.lse + offset, sum == 0 ? -INFINITY : lse);
    }
  }
}

// Without the 1, ptxas spills a few registers for one more CTA per multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_forward(const __grid_constant__ AttentionForwardParams p) {
  const Slices slices(p.in, p.num_taken, Config::kRows);
  NextPiece next(ptx::shared_base() + Config::kQueryBytes + Config::Ring::kBytes);
  for (int slice = Slices::first(); slices.has(slice); slice = next.share())
    attend_to_slice<Config>(p, slices.tile(slice), [&] { next.take(slices); });
}

}  // namespace sparse_attn::sm80
