// Products of 16 rows by a warp, with rows of `kHeadDim` elements in shared memory.
//
// A row takes 16 bytes more than its elements: then eight rows of an 8x8 matrix lie in different
// banks.
#pragma once

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "sm80/ptx.cuh"

namespace sparse_attn::sm80 {

// Sums of a product [16, n]: lane i has columns 8 c + 2 (i % 4) and the next of rows i / 4
// (x[c][0], x[c][1]) and i / 4 + 8.
template <int kColumns>
using Sums = float[kColumns / 8][4];

// What a block of an A100 may have.
constexpr int kMostSharedBytes = 163 * 1024;

template <int kHeadDim>
constexpr int kRowBytes = 2 * kHeadDim + 16;

// Where rows are copied from and to: a global array and shared memory.
struct RowCopy {
  const void* from;
  std::uint32_t to;
};

// Starts copies of `kCount` rows, of the same rows for each of `copies`, by `kThreads` threads.
// `row_of` gives a row's index in the arrays, or a negative number for a row of zeros.
template <int kHeadDim, int kThreads, int kCount, int kCopies, class RowOf>
__device__ __forceinline__ void copy_rows(const RowCopy (&copies)[kCopies], RowOf row_of) {
  constexpr int kPieces = kHeadDim / 8;  // of 16 bytes
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const std::int64_t index = row_of(row);
    const std::int64_t offset = index < 0 ? 0 : index * (2 * kHeadDim) + 16 * piece;
    SPARSE_ATTN_UNROLL
    for (const RowCopy& copy : copies) {
      ptx::copy_async16(copy.to + row * kRowBytes<kHeadDim> + 16 * piece,
                        static_cast<const char*>(copy.from) + offset, index >= 0);
    }
  }
}

// The two stages through which the chunks of a tile pass: keys, then values.
template <int kHeadDim, int kKeys, int kThreads>
class KeyRing {
 public:
  static constexpr int kStages = 2;
  static constexpr int kChunkBytes = kKeys * kRowBytes<kHeadDim>;
  static constexpr int kBytes = kStages * 2 * kChunkBytes;

  __device__ KeyRing(const AttentionInputs& in, const Tile& tile, const Chunks<kKeys>& chunks,
                     std::uint32_t base)
      : in_(in), tile_(tile), chunks_(chunks), base_(base) {}

  __device__ std::uint32_t key(int chunk) const {
    return base_ + chunk % kStages * 2 * kChunkBytes;
  }
  __device__ std::uint32_t value(int chunk) const { return key(chunk) + kChunkBytes; }

  // Starts the copies of a chunk, if there is one, and ends their group.
  __device__ void fetch(int chunk) const {
    if (chunk < chunks_.count()) {
      const int first = chunks_.first_key(chunk);
      const int count = first < 0 ? 0 : in_.shape.kv_len - first;
      const std::int64_t first_row = tile_.key_offset(in_.shape, first);
      const std::int64_t stride = in_.shape.num_kv_heads;
      copy_rows<kHeadDim, kThreads, kKeys>(
          {{in_.key, key(chunk)}, {in_.value, value(chunk)}},
          [&](int i) -> std::int64_t { return i < count ? first_row + i * stride : -1; });
    }
    ptx::copy_commit();
  }

 private:
  const AttentionInputs& in_;
  const Tile& tile_;
  const Chunks<kKeys>& chunks_;
  std::uint32_t base_;
};

// sums[16, kColumns] += a[16, kHeadDim] b[kColumns, kHeadDim]^T.
template <class T, int kHeadDim, int kColumns>
__device__ __forceinline__ void multiply_transposed(Sums<kColumns>& sums, std::uint32_t a,
                                                    std::uint32_t b) {
  const int lane = ptx::lane_index();
  // The four matrices of a load: for a, rows first and then elements; for b, elements first and
  // then rows.
  const std::uint32_t a_lane =
      a + (lane / 8 % 2 * 8 + lane % 8) * kRowBytes<kHeadDim> + lane / 16 * 16;
  const std::uint32_t b_lane =
      b + (lane / 16 * 8 + lane % 8) * kRowBytes<kHeadDim> + lane / 8 % 2 * 16;
  SPARSE_ATTN_UNROLL
  for (int d = 0; d < kHeadDim; d += 16) {
    const ptx::Fragment4 x = ptx::load_matrix(a_lane + 2 * d);
    SPARSE_ATTN_UNROLL
    for (int n = 0; n < kColumns; n += 16) {
      const ptx::Fragment4 y = ptx::load_matrix(b_lane + n * kRowBytes<kHeadDim> + 2 * d);
      ptx::multiply_add<T>(sums[n / 8], x.x, {y.x[0], y.x[1]});
      ptx::multiply_add<T>(sums[n / 8 + 1], x.x, {y.x[2], y.x[3]});
    }
  }
}

// sums[16, kHeadDim] += a[16, kColumns] b[kColumns, kHeadDim], where a is what a product left in
// registers. `keep` is ANDed to the pairs of rows of b that a lane has, [kColumns / 8]: rows whose
// factors are all 0 may hold NaN, and 0 * NaN is not 0.
template <class T, int kHeadDim, int kColumns>
__device__ __forceinline__ void multiply_registers(Sums<kHeadDim>& sums, const Sums<kColumns>& a,
                                                   const std::uint32_t (&keep)[kColumns / 8],
                                                   std::uint32_t b) {
  const int lane = ptx::lane_index();
  const std::uint32_t b_lane =
      b + (lane / 8 % 2 * 8 + lane % 8) * kRowBytes<kHeadDim> + lane / 16 * 16;
  SPARSE_ATTN_UNROLL
  for (int n = 0; n < kColumns; n += 16) {
    // The sums of one product are laid out as the first operand of the next.
    const auto& low = a[n / 8];
    const auto& high = a[n / 8 + 1];
    const std::uint32_t low_keep = keep[n / 8], high_keep = keep[n / 8 + 1];
    const std::uint32_t x[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]),
                                ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
    SPARSE_ATTN_UNROLL
    for (int d = 0; d < kHeadDim; d += 16) {
      const ptx::Fragment4 y =
          ptx::load_matrix_transposed(b_lane + n * kRowBytes<kHeadDim> + 2 * d);
      ptx::multiply_add<T>(sums[d / 8], x, {y.x[0] & low_keep, y.x[1] & high_keep});
      ptx::multiply_add<T>(sums[d / 8 + 1], x, {y.x[2] & low_keep, y.x[3] & high_keep});
    }
  }
}

// What the 16 rows of a warp see of a chunk, of which a lane has two. kAll: each row sees all of
// the keys or, where its `sees` is false, none.
template <int kKeys>
__device__ __forceinline__ Visible visible_of_chunk(const AttentionInputs& in, const Tile& tile,
                                                    const RowMask (&masks)[2], const int (&rows)[2],
                                                    std::int64_t slot, int first_key,
                                                    bool (&sees)[2] SPARSE_ATTN_AT) {
  bool has_edge = false;
  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const bool is_chosen = first_key >= 0 && chose(in.plan, tile, rows[half], slot);
    const Visible own =
        is_chosen ? masks[half].sees_keys(in, first_key, first_key + kKeys - 1) : Visible::kNone;
    sees[half] = own != Visible::kNone;
    has_edge = has_edge || own == Visible::kSome;
  }
  if (ptx::ballot(sees[0] || sees[1] SPARSE_ATTN_HERE) == 0) return Visible::kNone;
  return ptx::ballot(has_edge SPARSE_ATTN_HERE) == 0 ? Visible::kAll : Visible::kSome;
}

// Which of the columns that a lane has are `wanted` by any row of the warp, as `multiply_registers`
// takes it.
template <int kColumns, class Wanted>
__device__ __forceinline__ void wanted_by_any(std::uint32_t (&keep)[kColumns / 8], Wanted wanted) {
  SPARSE_ATTN_UNROLL
  for (int column = 0; column < kColumns / 8; ++column) {
    // Lanes with the same lane % 4 have the same columns.
    const std::uint32_t same = 0x11111111u << (ptx::lane_index() % 4);
    const bool low = ptx::ballot(wanted(column, 0)) & same,
               high = ptx::ballot(wanted(column, 1)) & same;
    keep[column] = (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
  }
}

// Writes a lane's share of one of its two rows, times `factor`, to row `index` of `to`.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_row(void* to, std::int64_t index, const Sums<kHeadDim>& sums,
                                          int half, float factor) {
  auto* pairs = static_cast<std::uint32_t*>(to) + index * (kHeadDim / 2);
  SPARSE_ATTN_UNROLL
  for (int column = 0; column < kHeadDim / 8; ++column) {
    const auto& x = sums[column];
    ptx::store_global(pairs + 4 * column + ptx::lane_index() % 4,
                      ptx::pack<T>(x[2 * half] * factor, x[2 * half + 1] * factor));
  }
}

}  // namespace sparse_attn::sm80
