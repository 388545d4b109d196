// Block-sparse flash attention, forward, for compute capability 9.0.
//
// A CTA has one or two consumers, warpgroups that compute on 64 rows each of a slice of a query
// tile, and one producer warp, which walks the tile's list and copies keys and values (keys.cuh)
// for all of them. It stays for several slices: while consumers finish one, the producer copies
// what the next one needs.
//
// The softmax of a chunk is computed while the tensor cores multiply the probabilities of the chunk
// before by its values.
#pragma once

#include "common/slices.cuh"
#include "common/tile.cuh"
#include "params.h"
#include "sm90/keys.cuh"
#include "sm90/matrix.cuh"
#include "sm90/pieces.cuh"

namespace sparse_attn::sm90 {

struct AttentionForwardArguments {
  AttentionForwardParams params;
  TensorMap query, key, value;
};

// Threads and registers of the CTAs of a multiprocessor, with so many consumers each.
template <int kConsumers_, int kBlocks_>
struct Warpgroups {
  static constexpr int kConsumers = kConsumers_, kBlocks = kBlocks_;
  static constexpr int kConsumerThreads = kConsumers * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + kWarpgroup;  // the producer's are the last
  static constexpr int kRows = kConsumers * kProductRows;
  // Of a thread: at the start, and then, where that is less than a thread may have.
  static constexpr int kRegisters = 65536 / (kBlocks * kThreads) / 8 * 8;
  static constexpr bool kMovesRegisters = kRegisters < 256;
  static constexpr int kProducerRegisters = kConsumers == 1 ? 72 : 96;
  static constexpr int kConsumerRegisters =
      kRegisters + (kRegisters - kProducerRegisters) / kConsumers / 8 * 8;
  static_assert(!kMovesRegisters || kConsumerRegisters <= 240);

  // The consumer that a thread belongs to. The compiler sees that it is the same in all lanes.
  __device__ static int consumer() {
    return ptx::shuffle(static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  }
};

template <class T_, int kHeadDim_, int kBlockSize, int kKeys_, int kStages, class Warpgroups_>
struct ForwardConfig : Warpgroups_ {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;           // of a chunk
  using Query = Matrix<kProductRows, kHeadDim>;  // of a consumer
  static constexpr int kConsumers = Warpgroups_::kConsumers;
  static constexpr int kQueryBytes = kConsumers * Query::kBytes;
  using QueryRing = Ring<1, kQueryBytes, kConsumers * kWarpgroup / 32>;
  using Stream = KeyStream<kHeadDim, kBlockSize, kKeys, kStages, kConsumers>;
  using Turns = PieceRing<kConsumers * kWarpgroup / 32>;
  static constexpr int kSharedBytes =
      kQueryBytes + Stream::kBytes + QueryRing::kBarrierBytes + Turns::kBytes;
  static_assert(kSharedBytes <= shared_bytes_of(Warpgroups_::kBlocks));
};

// The running softmax of the two rows that a thread shares with three others.
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};  // of the logits in base 2
  float sum[2] = {0, 0};                      // of this thread's columns only

  // scores: times `unit`, which is positive, logits in base 2; -inf where hidden. They become
  // probabilities. `factors` are those of what was summed so far.
  template <int kColumns>
  __device__ __forceinline__ void update(float (&scores)[kColumns][4], float unit,
                                         float (&factors)[2]) {
    SPARSE_ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
      SPARSE_ATTN_UNROLL
      for (auto& column : scores)
        largest = fmaxf(largest, fmaxf(column[2 * half], column[2 * half + 1]));
      largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
      largest = fmaxf(maximum[half], fmaxf(largest, ptx::shuffle_xor(largest, 2)) * unit);
      const float shift = largest == -INFINITY ? 0 : largest;
      factors[half] = ptx::exp2_approx(maximum[half] - shift);
      maximum[half] = largest;
      sum[half] *= factors[half];
      SPARSE_ATTN_UNROLL
      for (auto& column : scores) {
        column[2 * half] = ptx::exp2_approx(column[2 * half] * unit - shift);
        column[2 * half + 1] = ptx::exp2_approx(column[2 * half + 1] * unit - shift);
        sum[half] += column[2 * half] + column[2 * half + 1];
      }
    }
  }
};

// What becomes of products before the softmax: nothing, if one factor turns them into logits in
// base 2; else these logits, but for the bias.
struct Scores {
  const AttentionInputs& in;
  bool is_product;

  __device__ explicit Scores(const AttentionInputs& in)
      : in(in), is_product(in.logits_soft_cap == 0 && in.key_bias == nullptr && in.scale > 0) {}

  __device__ float unit() const { return is_product ? in.scale * kLog2E : 1; }

  template <int kColumns>
  __device__ __forceinline__ void convert(float (&scores)[kColumns][4]) const {
    if (is_product) return;
    SPARSE_ATTN_UNROLL
    for (auto& column : scores) {
      SPARSE_ATTN_UNROLL
      for (float& score : column) score = logit(in, score, 0).base2;
    }
  }
};

// What a consumer does with its part of a slice, from `step` on, where the chunks of the slice
// start. Returns the step after the one that ends them.
template <class Config>
__device__ __forceinline__ int attend_to_slice(const AttentionForwardParams& p, const Tile& tile,
                                               const typename Config::Stream& stream,
                                               const typename Config::QueryRing& query_ring,
                                               int query_step, int step, int consumer) {
  using T = typename Config::T;
  using Query = typename Config::Query;
  using Chunk = typename Config::Stream::Chunk;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys;
  const AttentionInputs& in = p.in;
  const ConsumerRows rows(in, tile);
  const std::uint32_t query = query_ring.stage(query_step) + consumer * Query::kBytes;
  Sums<kHeadDim> out = {};
  Sums<kKeys> scores;
  Factors<kKeys> probs;
  Softmax softmax;
  const Scores conversion(in);

  // Masks the scores of a chunk, whose products have been waited for, and releases its keys.
  const auto mask = [&](ChunkKind kind) {
    conversion.convert(scores);
    if (kind != ChunkKind::kPlain) {
      const std::uint32_t seen =
          visit_scores(in, tile, stream, step, consumer, rows,
                       [&](int column, int place, bool is_visible, float bias) {
                         float& score = scores[column][place];
                         score = is_visible ? score + bias * kLog2E : -INFINITY;
                         return score != -INFINITY;
                       });
      if (kind == ChunkKind::kEdge) {
        stream.wait_values(step);
        stream.zero_unseen(stream.values(step), seen, step, consumer);
      }
    }
    stream.release_keys(step);
  };

  const auto multiply_keys = [&] {
    multiply_transposed<T, Query, Chunk>(scores, query, 0, stream.keys(step));
    ptx::warpgroup_commit();
  };
  const auto multiply_values = [&] {
    multiply_factors<T, Chunk>(out, probs, stream.values(step - 1));
    ptx::warpgroup_commit();
  };

  query_ring.wait_full(query_step);
  ChunkKind kind = stream.wait_keys(step, consumer);
  while (kind != ChunkKind::kEnd) {
    if (Config::Stream::kHasUnseen && kind == ChunkKind::kUnseen) {
      stream.skip(step);
      kind = stream.wait_keys(++step, consumer);
      continue;
    }
    // Chunks one after the other, up to one that the consumer skips.
    const int first_step = step;
    ptx::warpgroup_fence(scores);
    multiply_keys();
    ptx::warpgroup_wait<0>(scores);
    while (true) {
      mask(kind);
      float factors[2];
      softmax.update(scores, conversion.unit(), factors);
      ptx::warpgroup_wait<0>(out);
      if (step > first_step) stream.release_values(step - 1);
      SPARSE_ATTN_UNROLL
      for (auto& column : out) {
        SPARSE_ATTN_UNROLL
        for (int place = 0; place < 4; ++place) column[place] *= factors[place / 2];
      }
      round_to_factors<T, kKeys>(probs, scores);

      ++step;
      kind = stream.wait_keys(step, consumer);
      stream.wait_values(step - 1);  // they came before the keys
      if (kind == ChunkKind::kEnd) break;
      if (Config::Stream::kHasUnseen && kind == ChunkKind::kUnseen) break;
      // Two groups of products, so that the scores are there first.
      ptx::warpgroup_fence(scores, out, probs);
      multiply_keys();
      multiply_values();
      ptx::warpgroup_wait<1>(scores);
    }
    ptx::warpgroup_fence(out, probs);
    multiply_values();
    ptx::warpgroup_wait<0>(out);
    stream.release_values(step - 1);
  }
  query_ring.release(query_step);
  stream.skip(step);

  SPARSE_ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sum[half];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    if (!rows.masks[half].is_row) continue;
    const float factor = sum == 0 ? 0 : 1 / sum;
    const std::int64_t offset = tile.row_offset(in.shape, rows.rows[half]);
    store_row<T, kHeadDim>(p.out, offset, out, half, factor);
    if (ptx::lane_index() % 4 == 0) {
      // -inf for a row that saw nothing.
      ptx::store_global(p.lse + offset, (softmax.maximum[half] + ptx::log2_approx(sum)) * kLn2);
    }
  }
  return step + 1;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    attention_forward(const __grid_constant__ AttentionForwardArguments arguments) {
  using Query = typename Config::Query;
  const AttentionInputs& in = arguments.params.in;
  const std::uint32_t query = ptx::shared_base();
  const std::uint32_t keys = query + Config::kQueryBytes, barriers = keys + Config::Stream::kBytes;
  const typename Config::Stream stream(keys);
  const typename Config::QueryRing query_ring(query, barriers);
  const typename Config::Turns turns(barriers + Config::QueryRing::kBarrierBytes);
  if (threadIdx.x == 0) {
    stream.init();
    query_ring.init();
    turns.init();
    ptx::mbarrier_init_fence();
  }
  ptx::sync_threads();

  const Slices slices(in, arguments.params.num_taken, Config::kRows);
  const int consumer = Config::consumer();
  int step = 0;
  if (consumer == Config::kConsumers) {
    // A tile may have fewer rows: whatever lies in the others, nothing is stored for them.
    const int query_bytes =
        Config::kConsumers * SliceBox(in.shape, in.plan).rows() * 2 * Config::kHeadDim;
    if constexpr (Config::kMovesRegisters) ptx::release_registers<Config::kProducerRegisters>();
    if (ptx::warp_index() != Config::kConsumerThreads / 32) return;
    turns.produce(slices, [&](int piece, int slice) {
      const Tile tile = slices.tile(piece);
      if (ptx::lane_index() == 0) {
        query_ring.wait_empty(slice);
        const std::uint32_t full = query_ring.full(slice);
        ptx::mbarrier_arrive_expect(full, query_bytes);
        for (int i = 0; i < Config::kConsumers; ++i) {
          load_slice<Query>(query_ring.stage(slice) + i * Query::kBytes, arguments.query,
                            tile.part(i * kProductRows, kProductRows), full);
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
      step = attend_to_slice<Config>(arguments.params, tile, stream, query_ring, slice, step, own);
    });
  }
}

}  // namespace sparse_attn::sm90
