// Block-sparse flash attention, backward, for compute capability 9.0. Probabilities are recomputed
// from the lse.
//
// dQ is query-major: the forward's walk. dK and dV are key-major: a CTA has one chunk of keys
// after the other, and walks the query tiles that chose its block, by the inverse of the plan. All
// products of that kernel are transposed, S^T = K Q^T, so that a warpgroup sums the gradients of
// its own keys in registers, and P^T and dS^T are first operands of the next products as they are.
// Blocks that very many tiles chose, as the first, are split in parts, whose float32 sums a last
// kernel adds. No atomics: results do not depend on the order of CTAs.
#pragma once

#include "common/inverse.cuh"
#include "common/slices.cuh"
#include "common/tile.cuh"
#include "params.h"
#include "sm90/attention_forward.cuh"
#include "sm90/keys.cuh"
#include "sm90/matrix.cuh"
#include "sm90/rows.cuh"

namespace sparse_attn::sm90 {

struct AttentionBackwardArguments {
  AttentionBackwardParams params;
  TensorMap query, d_out;  // a box has the rows of a slice, or of a strip
  TensorMap key, value;
};

// How a product x becomes a logit: factor * x in base 2, but for the bias. The derivative of the
// natural logit with respect to the scaled product is 1 - (slope_factor * x)^2.
struct LogitFactors {
  float factor, slope_factor;

  // Products become logits in base 2 already, if there is a soft cap.
  template <int kColumns>
  __device__ __forceinline__ static LogitFactors cap(const AttentionInputs& in,
                                                     float (&products)[kColumns][4]) {
    if (in.logits_soft_cap == 0) return {in.scale * kLog2E, 0};
    SPARSE_ATTN_UNROLL
    for (auto& column : products) {
      SPARSE_ATTN_UNROLL
      for (float& x : column) x = logit(in, x, 0).base2;
    }
    return {1, kLn2 / in.logits_soft_cap};
  }
  __device__ float base2(float x, float bias) const { return x * factor + bias * kLog2E; }
  __device__ float slope(float x) const { return 1 - x * slope_factor * (x * slope_factor); }
};

// ---- The gradient of queries.

template <class T_, int kHeadDim_, int kBlockSize, int kKeys_, int kStages, class Warpgroups_>
struct QueryGradientConfig : Warpgroups_ {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;  // of a chunk
  static constexpr int kConsumers = Warpgroups_::kConsumers;
  using Rows = Matrix<kProductRows, kHeadDim>;  // of a consumer
  // Each consumer's queries and gradients of outputs.
  using RowRing = Ring<1, kConsumers * 2 * Rows::kBytes, kConsumers * kWarpgroup / 32>;
  using Stream = KeyStream<kHeadDim, kBlockSize, kKeys, kStages, kConsumers>;
  using Turns = PieceRing<kConsumers * kWarpgroup / 32>;
  static constexpr int kSharedBytes =
      RowRing::kBytes + Stream::kBytes + RowRing::kBarrierBytes + Turns::kBytes;
  static_assert(kSharedBytes <= shared_bytes_of(Warpgroups_::kBlocks));
};

// Which pairs of a thread's two rows and the keys of a chunk are visible: bit 4 column + place for
// what the thread has in x[column][place] of the products.
template <class Stream>
__device__ __forceinline__ std::uint32_t visible_pairs(const AttentionInputs& in, const Tile& tile,
                                                       const Stream& stream, int step,
                                                       int consumer) {
  static_assert(Stream::kKeys <= 64);
  const ConsumerRows rows(in, tile);
  std::uint32_t visible = 0;
  for (int column = 0; column < Stream::kKeys / 8; ++column) {
    const Piece piece = stream.piece(step, 8 * column / Stream::kPieceKeys, consumer);
    const int first_key = piece.first_key + 8 * column % Stream::kPieceKeys;
    for (int i = 0; i < 2; ++i) {
      const int index = first_key + ptx::lane_index() % 4 * 2 + i;
      const bool is_masked = piece.visible == Visible::kSome;
      const KeyMask key(in, tile.batch, tile.kv_head, is_masked ? index : in.shape.kv_len);
      for (int half = 0; half < 2; ++half) {
        const bool is_visible =
            piece.has(rows.groups[half]) &&
            (!is_masked || (key.is_key && rows.masks[half].is_row && key.bias != -INFINITY &&
                            rows.masks[half].sees(in.mask, key.position, key.segment)));
        visible |= static_cast<std::uint32_t>(is_visible) << (4 * column + 2 * half + i);
      }
    }
  }
  return visible;
}

// Of the pairs, the keys that any of the thread's rows sees, as `zero_unseen` takes them.
__device__ __forceinline__ std::uint32_t seen_keys(std::uint32_t visible) {
  std::uint32_t seen = 0;
  for (int column = 0; column < 8; ++column)
    seen |= ((visible | visible >> 2) >> (4 * column) & 3) << (2 * column);
  return seen;
}

// What a consumer does with its part of a slice, from `step` on, where the chunks of the slice
// start. Returns the step after the one that ends them.
template <class Config>
__device__ __forceinline__ int differentiate_slice(const AttentionBackwardParams& p,
                                                   const Tile& tile,
                                                   const typename Config::Stream& stream,
                                                   const typename Config::RowRing& row_ring,
                                                   int row_step, int step, int consumer) {
  using T = typename Config::T;
  using Rows = typename Config::Rows;
  using Chunk = typename Config::Stream::Chunk;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys;
  const AttentionInputs& in = p.in;
  const int own_row = ptx::warp_index() % 4 * 16 + ptx::lane_index() / 4;
  const int own_rows[2] = {own_row, own_row + 8};
  float lse[2] = {0, 0}, delta[2] = {0, 0};  // lse in base 2
  for (int half = 0; half < 2; ++half) {
    if (own_rows[half] >= tile.num_rows) continue;
    const std::int64_t offset = tile.row_offset(in.shape, own_rows[half]);
    lse[half] = ptx::load_global(p.lse + offset) * kLog2E;
    delta[half] = ptx::load_global(p.delta + offset);
  }
  const std::uint32_t query = row_ring.stage(row_step) + consumer * 2 * Rows::kBytes,
                      d_out = query + Rows::kBytes;
  Sums<kHeadDim> d_query = {};
  // `d_logits` are the derivatives of the probabilities at first.
  Sums<kKeys> logits, d_logits;
  Factors<kKeys> d_logit_factors;

  // When the products of a chunk have been waited for.
  const auto differentiate = [&](ChunkKind kind, std::uint32_t visible) {
    if (kind == ChunkKind::kPlain && in.logits_soft_cap == 0) {
      const float factor = in.scale * kLog2E;
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < kKeys / 8; ++column) {
        SPARSE_ATTN_UNROLL
        for (int place = 0; place < 4; ++place) {
          const int half = place / 2;
          d_logits[column][place] = ptx::exp2_approx(logits[column][place] * factor - lse[half]) *
                                    (d_logits[column][place] - delta[half]);
        }
      }
    } else {
      const LogitFactors factors = LogitFactors::cap(in, logits);
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < kKeys / 8; ++column) {
        const int in_piece = 8 * column % Config::Stream::kPieceKeys;
        const int first_key = stream.first_key(step, 8 * column / Config::Stream::kPieceKeys);
        SPARSE_ATTN_UNROLL
        for (int place = 0; place < 4; ++place) {
          const int half = place / 2;
          const int key = first_key + in_piece + ptx::lane_index() % 4 * 2 + place % 2;
          const float bias =
              in.key_bias == nullptr ? 0 : KeyMask(in, tile.batch, tile.kv_head, key).bias;
          const float x = logits[column][place], base2 = factors.base2(x, bias);
          const bool is_visible = (visible >> (4 * column + place) & 1) != 0 && base2 != -INFINITY;
          d_logits[column][place] = is_visible ? ptx::exp2_approx(base2 - lse[half]) *
                                                     (d_logits[column][place] - delta[half]) *
                                                     factors.slope(x)
                                               : 0;
        }
      }
    }
    if (kind == ChunkKind::kEdge)
      stream.zero_unseen(stream.keys(step), seen_keys(visible), step, consumer);
  };

  row_ring.wait_full(row_step);
  bool keeps_keys = false;  // of the chunk before, which the last products read
  const auto release_keys = [&] {
    if (keeps_keys) stream.release_keys(step - 1);
    keeps_keys = false;
  };
  for (ChunkKind kind; (kind = stream.wait_keys(step, consumer)) != ChunkKind::kEnd; ++step) {
    if (Config::Stream::kHasUnseen && kind == ChunkKind::kUnseen) {
      ptx::warpgroup_wait<0>(d_query);
      release_keys();
      stream.skip(step);
      continue;
    }
    ptx::warpgroup_fence(logits);
    multiply_transposed<T, Rows, Chunk>(logits, query, 0, stream.keys(step));
    ptx::warpgroup_commit();
    // The sums of the chunk before are over.
    ptx::warpgroup_wait<1>(d_query);
    release_keys();
    keeps_keys = true;
    stream.wait_values(step);
    ptx::warpgroup_fence(d_logits);
    multiply_transposed<T, Rows, Chunk>(d_logits, d_out, 0, stream.values(step));
    ptx::warpgroup_commit();
    std::uint32_t visible = ~0u;
    if (kind != ChunkKind::kPlain) visible = visible_pairs(in, tile, stream, step, consumer);
    ptx::warpgroup_wait<0>(logits, d_logits);
    stream.release_values(step);
    differentiate(kind, visible);
    round_to_factors<T, kKeys>(d_logit_factors, d_logits);
    ptx::warpgroup_fence(d_query, d_logit_factors);
    multiply_factors<T, Chunk>(d_query, d_logit_factors, stream.keys(step));
    ptx::warpgroup_commit();
  }
  ptx::warpgroup_wait<0>(d_query);
  release_keys();
  row_ring.release(row_step);
  stream.skip(step);

  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (own_rows[half] < tile.num_rows) {
      store_row<T, kHeadDim>(p.d_query, tile.row_offset(in.shape, own_rows[half]), d_query, half,
                             in.scale);
    }
  }
  return step + 1;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    query_gradient(const __grid_constant__ AttentionBackwardArguments arguments) {
  using Rows = typename Config::Rows;
  const AttentionInputs& in = arguments.params.in;
  const std::uint32_t rows = ptx::shared_base(), keys = rows + Config::RowRing::kBytes,
                      barriers = keys + Config::Stream::kBytes;
  const typename Config::Stream stream(keys);
  const typename Config::RowRing row_ring(rows, barriers);
  const typename Config::Turns turns(barriers + Config::RowRing::kBarrierBytes);
  if (threadIdx.x == 0) {
    stream.init();
    row_ring.init();
    turns.init();
    ptx::mbarrier_init_fence();
  }
  ptx::sync_threads();  // the barriers can be used

  const Slices slices(in, arguments.params.num_taken, Config::kRows);
  const int consumer = Config::consumer();
  int step = 0;
  if (consumer == Config::kConsumers) {
    if constexpr (Config::kMovesRegisters) ptx::release_registers<Config::kProducerRegisters>();
    if (ptx::warp_index() != Config::kConsumerThreads / 32) return;
    // A tile may have fewer rows: whatever lies in the others, nothing is stored for them.
    const int row_bytes =
        Config::kConsumers * 2 * SliceBox(in.shape, in.plan).rows() * 2 * Config::kHeadDim;
    turns.produce(slices, [&](int piece, int slice) {
      const Tile tile = slices.tile(piece);
      if (ptx::lane_index() == 0) {
        row_ring.wait_empty(slice);
        const std::uint32_t full = row_ring.full(slice);
        ptx::mbarrier_arrive_expect(full, row_bytes);
        for (int i = 0; i < Config::kConsumers; ++i) {
          const Tile part = tile.part(i * kProductRows, kProductRows);
          const std::uint32_t query = row_ring.stage(slice) + i * 2 * Rows::kBytes;
          load_slice<Rows>(query, arguments.query, part, full);
          load_slice<Rows>(query + Rows::kBytes, arguments.d_out, part, full);
        }
      }
      step = stream.produce(in, tile, arguments.key, arguments.value, step);
    });
  } else {
    if constexpr (Config::kMovesRegisters) ptx::take_registers<Config::kConsumerRegisters>();
    // The compiler does not know that it is 0 where there is one.
    const int own = Config::kConsumers == 1 ? 0 : consumer;
    turns.consume([&](int piece, int slice) {
      const Tile tile = slices.tile(piece).part(own * kProductRows, kProductRows);
      step =
          differentiate_slice<Config>(arguments.params, tile, stream, row_ring, slice, step, own);
    });
  }
}

// ---- The gradients of keys and values.

// What the keys of a chunk bring to the mask and to the logits.
class KeyTable {
 public:
  static constexpr int kBytes = kProductRows * 16;

  struct alignas(16) Key {
    int is_key, position, segment;
    float bias;
  };

  __device__ explicit KeyTable(std::uint32_t base) : base_(base) {}
  __device__ void store(int key, const KeyMask& mask) const {
    ptx::store_shared(base_ + 16 * key, Key{mask.is_key, mask.position, mask.segment, mask.bias});
  }
  __device__ Key key(int key) const { return ptx::load_shared<Key>(base_ + 16 * key); }

 private:
  std::uint32_t base_;
};

// A chunk of keys and a part of its block's list, and where the sums go.
struct Part {
  static constexpr int kBytes = 32;

  int number;                // which one of the CTA's it is
  std::int64_t partial_row;  // of the first key; negative: the part is all of the block's list
  int first_key;
  int first_step;  // of the list's rows; negative: there is no further part
  int batch, kv_head;

  __device__ bool exists() const { return first_step >= 0; }

  __device__ void store(std::uint32_t to) const {
    ptx::store_shared(to, Rows{partial_row, first_key, first_step});
    ptx::store_shared(to + 16, Head{batch, kv_head});
    ptx::store_shared(to + 24, number);
  }
  __device__ static Part load(std::uint32_t from) {
    const auto rows = ptx::load_shared<Rows>(from);
    const auto head = ptx::load_shared<Head>(from + 16);
    return {ptx::load_shared<int>(from + 24),
            rows.partial_row,
            rows.first_key,
            rows.first_step,
            head.batch,
            head.kv_head};
  }

 private:
  struct alignas(16) Rows {
    std::int64_t partial_row;
    int first_key, first_step;
  };
  struct alignas(8) Head {
    int batch, kv_head;
  };
};

template <class T_, int kHeadDim_, int kKeys_>
struct KeyGradientConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  // Of a chunk. Products have 64 rows; those beyond the chunk are computed and not looked at.
  static constexpr int kKeys = kKeys_;
  static_assert(kKeys <= kProductRows);
  // A warpgroup's registers hold the sums of both gradients: then the two consumers take turns at
  // the stages. If not, each has one gradient, and both read all stages.
  static constexpr bool kTakesTurns = kHeadDim <= 128;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kBlocks = 1;                                        // of a multiprocessor
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // of a thread
  using Keys = Matrix<kProductRows, kHeadDim>;
  // An even number: consumers that take turns have stages of their own, and see all phases of
  // their barriers.
  static constexpr int kStages = kHeadDim <= 96 ? 6 : kHeadDim <= 128 ? 4 : 2;
  static_assert(kStages % kConsumers == 0);
  using Stream = RowStream<kHeadDim, kStages, kTakesTurns ? 1 : kConsumers>;

  // In shared memory.
  static constexpr int kKey = 0, kValue = Keys::kBytes, kStream = 2 * Keys::kBytes;
  static constexpr int kKeyTable = kStream + (Stream::kBytes + 15) / 16 * 16;
  static constexpr int kPart = kKeyTable + KeyTable::kBytes;
  // One part at a time. Its readers: the consumers, and the warps that look up rows.
  using PartRing = Ring<1, Part::kBytes, kConsumers * kWarpgroup / 32 + Stream::kTableWarps>;
  static constexpr int kPartBarriers = kPart + PartRing::kBytes;
  static constexpr int kKeyBarrier = kPartBarriers + PartRing::kBarrierBytes;
  static constexpr int kSharedBytes = kKeyBarrier + 8;
  static_assert(kSharedBytes <= shared_bytes_of(kBlocks));
};

// What a CTA has in shared memory.
template <class Config>
struct KeyGradientMemory {
  std::uint32_t base = ptx::shared_base();
  typename Config::Stream stream{base + Config::kStream};
  typename Config::PartRing parts{base + Config::kPart, base + Config::kPartBarriers};

  // Of the chunk, and the barrier that is told when they are there. A part's readers release them
  // with it.
  __device__ std::uint32_t key() const { return base + Config::kKey; }
  __device__ std::uint32_t value() const { return base + Config::kValue; }
  __device__ std::uint32_t key_barrier() const { return base + Config::kKeyBarrier; }
  __device__ KeyTable key_table() const { return KeyTable(base + Config::kKeyTable); }
  __device__ Part part() const { return Part::load(parts.stage(0)); }
};

// Which pairs of a stage's rows and two keys, `own_key` and the eighth after it, are visible: bit
// 4 column + place for what a thread has in x[column][place] of the transposed products.
__device__ __forceinline__ std::uint32_t visible_pairs(const AttentionInputs& in,
                                                       const RowTable& rows, const KeyTable& keys,
                                                       int own_key) {
  const KeyTable::Key own[2] = {keys.key(own_key), keys.key(own_key + 8)};
  std::uint32_t visible = 0;
  SPARSE_ATTN_NO_UNROLL
  for (int column = 0; column < kProductRows / 8; ++column) {
    for (int i = 0; i < 2; ++i) {
      const RowMask row = rows.mask(8 * column + ptx::lane_index() % 4 * 2 + i);
      for (int half = 0; half < 2; ++half) {
        const KeyTable::Key& key = own[half];
        const bool is_visible =
            row.is_row && key.is_key && row.sees(in.mask, key.position, key.segment);
        visible |= static_cast<std::uint32_t>(is_visible) << (4 * column + 2 * half + i);
      }
    }
  }
  return visible;
}

template <int kHeadDim>
struct KeyGradients {
  Sums<kHeadDim> key = {}, value = {};
  float bias[2] = {0, 0};  // of a thread's two keys, over its own rows
};

// One or both of the gradients of the chunk's keys, by a warpgroup, from every `kStride`-th stage
// from `step` on. Returns the step that ends the rows, which is not released.
template <class Config, bool kHasKey, bool kHasValue, int kStride>
__device__ __forceinline__ int sum_gradients(KeyGradients<Config::kHeadDim>& gradients,
                                             const AttentionInputs& in,
                                             const KeyGradientMemory<Config>& memory, int step) {
  using T = typename Config::T;
  using Keys = typename Config::Keys;
  using Rows = typename Config::Stream::Rows;
  const typename Config::Stream& stream = memory.stream;
  const int lane = ptx::lane_index();
  const int own_key = ptx::warp_index() % 4 * 16 + lane / 4;  // and the eighth after it
  // Transposed: a row is a key.
  Sums<kProductRows> probs, d_logits;
  Factors<kProductRows> prob_factors, d_logit_factors;
  const auto round = [&] {
    if constexpr (kHasValue) round_to_factors<T, kProductRows>(prob_factors, probs);
    if constexpr (kHasKey) round_to_factors<T, kProductRows>(d_logit_factors, d_logits);
  };

  int unreleased = -1;  // the step whose stage the last products read
  for (;; step += kStride) {
    const Content content = stream.wait(step);
    if (content == Content::kNothing) break;
    if (content == Content::kUnseen) {
      // Nothing may be kept: after enough such stages the copies wait for what is.
      ptx::warpgroup_wait<0>(gradients.key, gradients.value);
      if (unreleased >= 0) stream.release(unreleased);
      unreleased = -1;
      stream.release(step);
      continue;
    }
    const std::uint32_t query = stream.query(step), d_out = stream.d_out(step);
    const RowTable table = stream.table(step);

    ptx::warpgroup_fence(probs);
    multiply_transposed<T, Keys, Rows>(probs, memory.key(), 0, query);
    ptx::warpgroup_commit();
    // The sums of the stage before are over, and it may be written again.
    ptx::warpgroup_wait<1>(gradients.key, gradients.value);
    if (unreleased >= 0) stream.release(unreleased);
    unreleased = step;
    if constexpr (kHasKey) {
      ptx::warpgroup_fence(d_logits);
      multiply_transposed<T, Keys, Rows>(d_logits, memory.value(), 0, d_out);
      ptx::warpgroup_commit();
    }

    if (content == Content::kPlain && in.logits_soft_cap == 0) {
      // The exponentials, while the tensor cores compute what comes second.
      const float factor = in.scale * kLog2E;
      ptx::warpgroup_wait<kHasKey ? 1 : 0>(probs);
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < kProductRows / 8; ++column) {
        const auto lse = table.lse_of_two(8 * column + lane % 4 * 2);
        SPARSE_ATTN_UNROLL
        for (int place = 0; place < 4; ++place) {
          float& prob = probs[column][place];
          prob = ptx::exp2_approx(prob * factor - lse.x[place % 2]);
        }
      }
      if constexpr (kHasKey) {
        ptx::warpgroup_wait<0>(d_logits);
        SPARSE_ATTN_UNROLL
        for (int column = 0; column < kProductRows / 8; ++column) {
          const auto delta = table.delta_of_two(8 * column + lane % 4 * 2);
          SPARSE_ATTN_UNROLL
          for (int place = 0; place < 4; ++place) {
            float& d_logit = d_logits[column][place];
            d_logit = probs[column][place] * (d_logit - delta.x[place % 2]);
          }
        }
      }
      round();
    } else {
      // The mask, while the tensor cores compute what it is for.
      const KeyTable keys = memory.key_table();
      std::uint32_t visible = ~0u;
      if (content == Content::kMasked) visible = visible_pairs(in, table, keys, own_key);
      const float bias[2] = {keys.key(own_key).bias, keys.key(own_key + 8).bias};
      ptx::warpgroup_wait<0>(probs);
      if constexpr (kHasKey) ptx::warpgroup_wait<0>(d_logits);
      const LogitFactors factors = LogitFactors::cap(in, probs);
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < kProductRows / 8; ++column) {
        const int row = 8 * column + lane % 4 * 2;
        const auto lse = table.lse_of_two(row), delta = table.delta_of_two(row);
        SPARSE_ATTN_UNROLL
        for (int place = 0; place < 4; ++place) {
          float& prob = probs[column][place];
          const float x = factors.base2(prob, bias[place / 2]), slope = factors.slope(prob);
          const bool is_visible = (visible >> (4 * column + place) & 1) != 0 && x != -INFINITY;
          prob = is_visible ? ptx::exp2_approx(x - lse.x[place % 2]) : 0;
          if constexpr (kHasKey) {
            float& d_logit = d_logits[column][place];
            const float d_biased = is_visible ? prob * (d_logit - delta.x[place % 2]) : 0;
            gradients.bias[place / 2] += d_biased;
            d_logit = is_visible ? d_biased * slope : 0;
          }
        }
      }
      round();
    }
    ptx::warpgroup_fence(gradients.key, gradients.value, prob_factors, d_logit_factors);
    if constexpr (kHasValue) multiply_factors<T, Rows>(gradients.value, prob_factors, d_out);
    if constexpr (kHasKey) multiply_factors<T, Rows>(gradients.key, d_logit_factors, query);
    ptx::warpgroup_commit();
  }
  ptx::warpgroup_wait<0>(gradients.key, gradients.value);
  if (unreleased >= 0) stream.release(unreleased);
  return step;
}

// Two consumers that took turns give each other their sums, through the memory of the stages: the
// first then has all of d_key, the second all of d_value.
template <class Config>
__device__ __forceinline__ void exchange(KeyGradients<Config::kHeadDim>& gradients,
                                         const KeyGradientMemory<Config>& memory,
                                         const StripBox& box, bool is_first) {
  constexpr int kConsumerThreads = Config::kConsumers * kWarpgroup;
  constexpr int kColumns = Config::kHeadDim / 8;
  static_assert(Config::Stream::kStageBytes >= 2 * kColumns * kWarpgroup * 16);
  struct alignas(16) Column {
    float x[4];
  };
  struct alignas(8) Bias {
    float x[2];
  };
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const std::uint32_t bias = memory.base + Config::kKeyTable + 8 * thread;
  const auto address = [&](bool is_key, int column) {
    return memory.base + Config::kStream +
           ((kColumns * is_key + column) * kWarpgroup + thread) * 16;
  };
  const auto give = [&](const Sums<Config::kHeadDim>& sums, bool is_key) {
    SPARSE_ATTN_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      const auto& x = sums[column];
      ptx::store_shared(address(is_key, column), Column{{x[0], x[1], x[2], x[3]}});
    }
  };
  const auto take = [&](Sums<Config::kHeadDim>& sums, bool is_key) {
    SPARSE_ATTN_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      const auto other = ptx::load_shared<Column>(address(is_key, column));
      for (int place = 0; place < 4; ++place) sums[column][place] += other.x[place];
    }
  };
  ptx::sync_barrier(1, kConsumerThreads);  // both have read all stages, and the table of keys
  if (is_first) {
    give(gradients.value, false);
  } else {
    give(gradients.key, true);
    ptx::store_shared(bias, Bias{{gradients.bias[0], gradients.bias[1]}});
  }
  ptx::sync_barrier(1, kConsumerThreads);  // what the other gives is there
  if (is_first) {
    take(gradients.key, true);
    const auto other = ptx::load_shared<Bias>(bias);
    for (int half = 0; half < 2; ++half) gradients.bias[half] += other.x[half];
  } else {
    take(gradients.value, false);
  }
  if (!box.fills_stages()) {
    ptx::sync_barrier(1, kConsumerThreads);  // both have taken what lay where zeros have to be
    memory.stream.template zero_rows_between<kConsumerThreads>(box, static_cast<int>(threadIdx.x));
  }
  ptx::fence_async_proxy();  // copies may write there
}

// Writes one of the gradients: the result, or the sums of a part of the block's list.
template <class Config, bool kIsKey>
__device__ __forceinline__ void store_gradient(const AttentionBackwardParams& p,
                                               const KeyGradients<Config::kHeadDim>& gradients,
                                               const Part& part) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim;
  const AttentionShape& shape = p.in.shape;
  const int lane = ptx::lane_index(), kv_head = part.kv_head, batch = part.batch;
  const auto& sums = kIsKey ? gradients.key : gradients.value;
  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float bias_sum = gradients.bias[half];
    if constexpr (kIsKey) {
      bias_sum += ptx::shuffle_xor(bias_sum, 1);
      bias_sum += ptx::shuffle_xor(bias_sum, 2);
    }
    const int i = ptx::warp_index() % 4 * 16 + lane / 4 + 8 * half, key = part.first_key + i;
    if (i >= Config::kKeys || key >= shape.kv_len) continue;
    if (part.partial_row < 0) {
      store_row<T, kHeadDim>(kIsKey ? p.d_key : p.d_value, key_row(shape, batch, kv_head, key),
                             sums, half, kIsKey ? p.in.scale : 1.0f);
      if (kIsKey && p.d_key_bias != nullptr && lane % 4 == 0)
        ptx::store_global(p.d_key_bias + bias_offset(shape, batch, kv_head, key), bias_sum);
    } else {
      float* to = p.partials + (part.partial_row + i) * kPartialWidth<kHeadDim>;
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < kHeadDim / 8; ++column) {
        for (int j = 0; j < 2; ++j) {
          ptx::store_global(to + (kIsKey ? 0 : kHeadDim) + 8 * column + lane % 4 * 2 + j,
                            sums[column][2 * half + j]);
        }
      }
      if (kIsKey && lane % 4 == 0) ptx::store_global(to + 2 * kHeadDim, bias_sum);
    }
  }
}

// What a consumer does with all parts of the CTA. The first writes d_key, the second d_value.
template <class Config, bool kHasKey, bool kHasValue>
__device__ __forceinline__ void consume(const AttentionBackwardParams& p,
                                        const KeyGradientMemory<Config>& memory, bool is_first) {
  constexpr int kStride = Config::kTakesTurns ? Config::kConsumers : 1;
  int step = Config::kTakesTurns ? !is_first : 0;
  for (int number = 0;; ++number) {
    memory.parts.wait_full(number);
    const int first_step = memory.part().first_step;
    if (first_step < 0) return;
    // Stages without rows, after the part before.
    for (; step < first_step; step += kStride) {
      memory.stream.wait(step);
      memory.stream.release(step);
    }
    ptx::mbarrier_wait(memory.key_barrier(), number % 2);
    KeyGradients<Config::kHeadDim> gradients;
    step = sum_gradients<Config, kHasKey, kHasValue, kStride>(gradients, p.in, memory, step);
    if constexpr (Config::kTakesTurns)
      exchange<Config>(gradients, memory, StripBox(p.in.shape, p.in.plan), is_first);
    const Part part = memory.part();
    // While so many columns are summed no register is left to hold it.
    if constexpr (!Config::kTakesTurns) number = part.number;
    memory.parts.release(number);
    if (kHasKey && is_first) store_gradient<Config, true>(p, gradients, part);
    if (kHasValue && !is_first) store_gradient<Config, false>(p, gradients, part);
  }
}

// The producer's first warp: takes chunks, says which they are, and copies what belongs to them.
template <class Config>
__device__ __forceinline__ void produce(const AttentionBackwardArguments& arguments,
                                        const KeyGradientMemory<Config>& memory) {
  const AttentionBackwardParams& p = arguments.params;
  const AttentionInputs& in = p.in;
  const int lane = ptx::lane_index();
  const auto send = [&](const Part& part) {
    if (lane == 0) part.store(memory.parts.stage(part.number));
    ptx::sync_warp();  // the table is there as well
    if (lane == 0) ptx::mbarrier_arrive(memory.parts.full(part.number));
  };
  const KeyChunks chunks(p, Config::kKeys);
  int number = 0, step = 0;
  for (int piece = KeyChunks::first(); chunks.has(piece); piece = chunks.take_by_warp()) {
    const auto [batch, kv_head, part, key_of_block] = chunks.chunk(piece);
    const InverseList list(in, p.inverse, batch, kv_head, part);
    if (!list.exists()) continue;
    const int first_key = list.block() * in.shape.kv_block_size + key_of_block;
    memory.parts.wait_empty(number);
    for (int key = lane; key < kProductRows; key += 32)
      memory.key_table().store(key, KeyMask(in, batch, kv_head, first_key + key));
    const std::int64_t partial_row =
        list.is_whole() ? -1 : list.partial_row(in.shape, p.inverse, first_key);
    send({number, partial_row, first_key, step, batch, kv_head});
    if (lane == 0) {
      const std::uint32_t barrier = memory.key_barrier();
      ptx::mbarrier_arrive_expect(barrier, 2 * Config::kKeys * 2 * Config::kHeadDim);
      const int at[4] = {0, kv_head, first_key, batch % in.shape.key_batch};
      load_rows<typename Config::Keys>(memory.key(), 0, arguments.key, at, barrier);
      load_rows<typename Config::Keys>(memory.value(), 0, arguments.value, at, barrier);
    }
    step = memory.stream.copy(in, list, batch, kv_head, arguments.query, arguments.d_out, step);
    ++number;
  }
  memory.parts.wait_empty(number);
  send({number, -1, 0, -1, 0, 0});
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    key_gradient(const __grid_constant__ AttentionBackwardArguments arguments) {
  const AttentionBackwardParams& p = arguments.params;
  const KeyGradientMemory<Config> memory;
  const int thread = static_cast<int>(threadIdx.x);
  memory.stream.template zero_rows_between<Config::kThreads>(StripBox(p.in.shape, p.in.plan),
                                                             thread);
  ptx::fence_async_proxy();
  if (thread == 0) {
    memory.stream.init();
    memory.parts.init();
    ptx::mbarrier_init(memory.key_barrier(), 1);
    ptx::mbarrier_init_fence();
  }
  ptx::sync_threads();  // the barriers can be used, and the zeros are there

  // The compiler sees that it is the same in all lanes.
  const int warpgroup = ptx::shuffle(thread / kWarpgroup, 0);
  if (warpgroup == Config::kConsumers) {
    ptx::release_registers<Config::kProducerRegisters>();
    const int warp = ptx::warp_index() % (kWarpgroup / 32);
    if (warp == 0) {
      produce(arguments, memory);
    } else if (warp <= Config::Stream::kTableWarps) {
      int step = warp - 1;
      for (int number = 0;; ++number) {
        memory.parts.wait_full(number);
        const Part part = memory.part();
        if (!part.exists()) return;
        step = memory.stream.look_up(p, part.batch, part.kv_head, part.first_key,
                                     part.first_key + Config::kKeys - 1, step);
        memory.parts.release(number);
      }
    }
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    if constexpr (Config::kTakesTurns) {
      consume<Config, true, true>(p, memory, warpgroup == 0);
    } else if (warpgroup == 0) {
      consume<Config, true, false>(p, memory, true);
    } else {
      consume<Config, false, true>(p, memory, false);
    }
  }
}

}  // namespace sparse_attn::sm90
