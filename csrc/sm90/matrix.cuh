// Matrices in shared memory, the stages through which they pass, and products of 64 rows by a
// warpgroup. For the forward and the backward kernels.
//
// Tensor copies write a matrix [rows, width] of 16-bit elements as panels of `kSpan` bytes of each
// row, swizzled, one panel after the other. wgmma reads the same bytes both ways: with the products
// summed along a row (its elements are "K-major"), as in Q K^T, or along a column ("MN-major"), as
// V in P V. So nothing is ever transposed, and one copy of K serves for S = Q K^T and for
// dQ = dS K.
#pragma once

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "sm90/ptx.cuh"

namespace sparse_attn::sm90 {

// What each of so many blocks of a multiprocessor of an H100 may have: all together 228 KiB, of
// which each takes one for itself.
constexpr int shared_bytes_of(int blocks) { return (228 / blocks - 1) * 1024; }

constexpr int kWarpgroup = 128;  // threads
constexpr int kProductRows = 64;

// Sums of a product [64, n]: thread i of the warpgroup, in warp w = i / 32 % 4 of it and lane
// l = i % 32, has columns 8 c + 2 (l % 4) and the next of rows 16 w + l / 4 (x[c][0], x[c][1]) and
// 16 w + l / 4 + 8 (x[c][2], x[c][3]).
template <int kColumns>
using Sums = float[kColumns / 8][4];

// The same matrix rounded to 16 bits, as the first operand of the next product takes it.
template <int kColumns>
using Factors = std::uint32_t[kColumns / 16][4];

template <class T, int kColumns>
__device__ __forceinline__ void round_to_factors(std::uint32_t (&factors)[kColumns / 16][4],
                                                 const float (&sums)[kColumns / 8][4]) {
  SPARSE_ATTN_UNROLL
  for (int i = 0; i < kColumns / 16; ++i) {
    SPARSE_ATTN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const auto& column = sums[2 * i + j / 2];
      factors[i][j] = ptx::pack<T>(column[j % 2 * 2], column[j % 2 * 2 + 1]);
    }
  }
}

// How a matrix lies in shared memory. It starts at a multiple of `kAlignment`.
template <int kRows_, int kWidth_>
struct Matrix {
  static constexpr int kRows = kRows_, kWidth = kWidth_;
  static constexpr Swizzle kSwizzle = kWidth % 64 == 0   ? Swizzle::k128
                                      : kWidth % 32 == 0 ? Swizzle::k64
                                                         : Swizzle::k32;
  static constexpr int kSpan = kWidth % 64 == 0 ? 128 : kWidth % 32 == 0 ? 64 : 32;
  static constexpr int kPanelWidth = kSpan / 2;
  static constexpr int kPanels = kWidth / kPanelWidth;
  static constexpr int kPanelBytes = kRows * kSpan;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kAlignment = swizzle_period(kSwizzle);
  static_assert(kRows % 8 == 0 && kWidth % kPanelWidth == 0);

  // Of the 16 bytes from an element on, whose column is a multiple of 8, for ordinary loads and
  // stores.
  __device__ static std::uint32_t offset(int row, int column) {
    const std::uint32_t plain =
        column / kPanelWidth * kPanelBytes + row * kSpan + column % kPanelWidth * 2;
    // Address bits 4 to 6, as many as there are chunks in a row, ^= bits 7 to 9.
    return plain ^ ((plain >> 7) % (kSpan / 16)) << 4;
  }

  // Operands [rows from `row` on, 16 columns from `column` on]: the products are summed along the
  // columns.
  __device__ static std::uint64_t along_rows(std::uint32_t matrix, int row, int column) {
    return ptx::matrix_descriptor(
        matrix + column / kPanelWidth * kPanelBytes + row * kSpan + column % kPanelWidth * 2, 0,
        8 * kSpan, kSwizzle);
  }
  // Operands [16 rows from `row` on, columns from `column` on, a multiple of `kPanelWidth`]: the
  // products are summed along the rows.
  __device__ static std::uint64_t along_columns(std::uint32_t matrix, int row, int column) {
    return ptx::matrix_descriptor(matrix + column / kPanelWidth * kPanelBytes + row * kSpan,
                                  kPanelBytes, 8 * kSpan, kSwizzle);
  }
};

// By one thread: starts the copy of the rows from `row` on that the box of `map` has, panel by
// panel. `at` are the coordinates of the first element; the copies tell `barrier` of their bytes,
// zeros for what is outside of the array included.
template <class Matrix, int kRank>
__device__ __forceinline__ void load_rows(std::uint32_t matrix, int row, const TensorMap& map,
                                          const int (&at)[kRank],
                                          std::uint32_t barrier SPARSE_ATTN_AT) {
  int from[kRank];
  for (int i = 0; i < kRank; ++i) from[i] = at[i];
  SPARSE_ATTN_UNROLL
  for (int panel = 0; panel < Matrix::kPanels; ++panel) {
    from[0] = panel * Matrix::kPanelWidth;
    ptx::tensor_load(matrix + panel * Matrix::kPanelBytes + row * Matrix::kSpan, map, from,
                     barrier SPARSE_ATTN_HERE);
  }
}

// By `threads` threads, of which this is number `thread`: zeros to the rows for which `is_zeroed`
// says so. Before a product or a copy uses them: `fence_async_proxy` by all of them, and a barrier.
template <class Matrix, class IsZeroed>
__device__ __forceinline__ void zero_rows(std::uint32_t matrix, int thread, int threads,
                                          IsZeroed is_zeroed) {
  struct alignas(16) Zeros {
    std::uint32_t x[4] = {};
  };
  constexpr int kPieces = Matrix::kWidth / 8;
  for (int i = thread; i < Matrix::kRows * kPieces; i += threads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    if (is_zeroed(row)) ptx::store_shared(matrix + Matrix::offset(row, column), Zeros{});
  }
}

// ---- Products, by a warpgroup. They are asynchronous:
//
//   ptx::warpgroup_fence(sums, factors);
//   multiply_...(sums, ...);        // any number
//   ptx::warpgroup_commit();
//   ptx::warpgroup_wait<0>(sums);
//
// and the operands stay as they are until the wait.

// sums[64, B::kRows] = a[64 rows from `row` on, width] b^T.
template <class T, class A, class B>
__device__ __forceinline__ void multiply_transposed(Sums<B::kRows>& sums, std::uint32_t a, int row,
                                                    std::uint32_t b) {
  static_assert(A::kWidth == B::kWidth);
  SPARSE_ATTN_UNROLL
  for (int column = 0; column < A::kWidth; column += 16) {
    ptx::warpgroup_multiply<T, ptx::Major::kK, ptx::Major::kK>(
        sums, A::along_rows(a, row, column), B::along_rows(b, 0, column), column != 0);
  }
}

// sums[64, B::kWidth] += factors[64, B::kRows] b.
template <class T, class B>
__device__ __forceinline__ void multiply_factors(Sums<B::kWidth>& sums,
                                                 const Factors<B::kRows>& factors,
                                                 std::uint32_t b) {
  SPARSE_ATTN_UNROLL
  for (int row = 0; row < B::kRows; row += 16) {
    ptx::warpgroup_multiply<T, ptx::Major::kMN>(sums, factors[row / 16],
                                                B::along_columns(b, row, 0), true);
  }
}

// ---- Stages that a producer fills by copies while consumers read others.
//
// Steps count from 0 and never start again; step i is in stage i % kStages. The producer waits
// until the consumers have released what the stage had, tells the stage's barrier how many bytes
// come, and starts the copies. Consumers wait until they are there, and release the stage when they
// have read it. What the producer itself stored before it told the barrier can be read as well.
template <int kStages, int kStageBytes, int kConsumerWarps, int kProducerArrivals = 1>
class Ring {
 public:
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBarrierBytes = kStages * 16;

  __device__ Ring(std::uint32_t stages, std::uint32_t barriers)
      : stages_(stages), barriers_(barriers) {}

  // By one thread, before a `mbarrier_init_fence` and a barrier of the CTA.
  __device__ void init() const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), kProducerArrivals);
      ptx::mbarrier_init(empty(stage), kConsumerWarps);
    }
  }

  __device__ std::uint32_t stage(int step) const { return stages_ + step % kStages * kStageBytes; }

  // The producer's. `full` is the barrier for `mbarrier_arrive_expect` and copies.
  __device__ std::uint32_t full(int step) const { return barriers_ + step % kStages * 16; }
  __device__ void wait_empty(int step SPARSE_ATTN_AT) const {
    ptx::mbarrier_wait(empty(step), (step / kStages + 1) % 2 SPARSE_ATTN_HERE);
  }

  // The consumers'. All threads wait; a whole warp releases, after its products have been waited
  // for.
  __device__ void wait_full(int step SPARSE_ATTN_AT) const {
    ptx::mbarrier_wait(full(step), step / kStages % 2 SPARSE_ATTN_HERE);
  }
  __device__ void release(int step SPARSE_ATTN_AT) const {
    ptx::sync_warp();  // the other lanes have read it as well
    if (ptx::lane_index() == 0) ptx::mbarrier_arrive(empty(step) SPARSE_ATTN_HERE);
  }

 private:
  __device__ std::uint32_t empty(int step) const { return full(step) + 8; }

  std::uint32_t stages_, barriers_;
};

// ---- On the host.

// Keys or values: coordinates (element, kv_head, key, row of the batch), `keys` keys of a head at a
// time. Keys beyond kv_len are zeros.
template <class T, int kHeadDim>
TensorMap map_of_keys(const void* keys, const AttentionShape& shape, int keys_of_box) {
  const std::uint64_t heads = shape.num_kv_heads, kv_len = shape.kv_len, rows = shape.key_batch,
                      row_bytes = 2 * kHeadDim;
  using M = Matrix<8, kHeadDim>;
  return make_tensor_map<T, 4>(keys, {kHeadDim, heads, kv_len, rows},
                               {row_bytes, heads * row_bytes, kv_len * heads * row_bytes},
                               {M::kPanelWidth, 1, static_cast<std::uint32_t>(keys_of_box), 1},
                               M::kSwizzle);
}

// Tokens and heads of which a slice of 64 rows of a tile consists: all of the tile, whole tokens,
// or a part of one token's heads.
struct SliceBox {
  int tokens, heads;

  __host__ __device__ SliceBox(const AttentionShape& shape, const PlanParams& plan) {
    const int group_size = shape.num_q_heads / shape.num_kv_heads;
    heads = group_size < kProductRows ? group_size : kProductRows;
    const int most = kProductRows / heads;
    tokens = plan.tile_size < most ? plan.tile_size : most;
  }
  SPARSE_ATTN_HOST_DEVICE int rows() const { return tokens * heads; }
};

// Queries or what has their shape: coordinates (element, head of the group, kv_head, token, batch),
// rows token-major as `Tile` has them. Tokens beyond q_len are zeros.
template <class T, int kHeadDim>
TensorMap map_of_rows(const void* rows, const AttentionShape& shape, const SliceBox& box) {
  const std::uint64_t heads = shape.num_q_heads, kv_heads = shape.num_kv_heads, q_len = shape.q_len,
                      batch = shape.batch, row_bytes = 2 * kHeadDim;
  using M = Matrix<8, kHeadDim>;
  return make_tensor_map<T, 5>(
      rows, {kHeadDim, heads / kv_heads, kv_heads, q_len, batch},
      {row_bytes, heads / kv_heads * row_bytes, heads * row_bytes, q_len * heads * row_bytes},
      {M::kPanelWidth, static_cast<std::uint32_t>(box.heads), 1,
       static_cast<std::uint32_t>(box.tokens), 1},
      M::kSwizzle);
}

// By one thread: starts the copy of a slice's rows by such a map, `SliceBox::rows()` of them; the
// rest of the 64 stays as it is.
template <class Matrix>
__device__ __forceinline__ void load_slice(std::uint32_t matrix, const TensorMap& map,
                                           const Tile& tile, std::uint32_t barrier SPARSE_ATTN_AT) {
  load_rows<Matrix, 5>(
      matrix, 0, map,
      {0, tile.first_row % tile.group_size, tile.kv_head, tile.token(0), tile.batch},
      barrier SPARSE_ATTN_HERE);
}

// Writes a thread's share of one of its two rows, times `factor`, to row `index` of `to`.
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

}  // namespace sparse_attn::sm90
