// Scores units of keys, pools them to blocks and selects the best blocks of each query, for compute
// capability 9.0 (common/select_blocks.cuh).
//
// A CTA has some consumers, warpgroups that compute on 64 query rows each and have a tile of their
// own, and one producer warp, which copies the units for all of them. Consumers share nothing but
// these, and need not keep step. The CTA stays for several pieces of work, a tile for each
// consumer: while consumers finish one, the producer copies units of the next.
#pragma once

#include "common/select_blocks.cuh"
#include "params.h"
#include "sm90/matrix.cuh"
#include "sm90/pieces.cuh"

namespace sparse_attn::sm90 {

struct SelectionArguments {
  SelectionParams params;
  TensorMap fine, coarse;  // boxes of kUnits units of a head; unset where there is no unit
};

// How a consumer shares the scores of a chunk.
struct ConsumerConfig {
  static constexpr int kLaneRows = 2;
  static constexpr int kWarps = kWarpgroup / 32, kRowWarps = kWarps, kColumnWarps = 1;
  static constexpr int kThreads = kWarpgroup;
  static constexpr int kRows = kProductRows;
  static constexpr int kUnits = 64, kColumns = kUnits;
  static constexpr int kSumTables = 2;
};

template <class T_, int kHeadDim_>
struct SelectionConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = 2;                            // warpgroups
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the producer's are the last
  static constexpr int kBlocks = 1;                               // of a multiprocessor
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // of a thread
  using Chunk = Matrix<ConsumerConfig::kUnits, kHeadDim>;
  static constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
  using ChunkRing = Ring<4, Chunk::kBytes, kConsumerWarps>;
  using Turns = PieceRing<kConsumerWarps>;
  static constexpr std::uint32_t kUnitBytes = ChunkRing::kBytes + ChunkRing::kBarrierBytes;
  static constexpr std::uint32_t kRingBytes = kUnitBytes + Turns::kBytes;
  static_assert(kRingBytes % 16 == 0);
};

// Shared memory of a CTA: chunks of units, numbers of pieces, and what each consumer's tokens need.
template <class Config>
SPARSE_ATTN_HOST_DEVICE TokenMemory<ConsumerConfig> memory_of(const SelectionTiling& tiling,
                                                              std::uint32_t base, int consumer) {
  const std::uint32_t first = base + Config::kRingBytes;
  const TokenMemory<ConsumerConfig> memory(tiling, first, 0);
  const auto bytes = static_cast<std::uint32_t>((memory.end - first + 15) / 16 * 16);
  return TokenMemory<ConsumerConfig>(tiling, first + consumer * bytes, 0);
}

// The products of a consumer's rows with units, from `step` of the ring on.
template <class Config>
class UnitStream {
 public:
  using ChunkRing = typename Config::ChunkRing;

  // Takes the query's rows, which stay in registers.
  __device__ UnitStream(const SelectionParams& p, const SelectionTile& tile,
                        const TokenGroup<ConsumerConfig>& group, const ChunkRing& ring, int step)
      : ring_(ring), step_(step) {
    const auto* pairs = static_cast<const std::uint32_t*>(p.query) + ptx::lane_index() % 4;
    SPARSE_ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = group.first_row() + 8 * half;
      const bool is_row = group.is_row(row);
      const std::int64_t first =
          is_row ? tile.query_row(p, group.rows.slot(row), group.rows.head(row)) *
                       (Config::kHeadDim / 2)
                 : 0;
      SPARSE_ATTN_UNROLL
      for (int i = 0; i < 2 * Config::kHeadDim / 16; ++i)
        query_[i / 2][half + 2 * (i % 2)] = is_row ? ptx::load_global(pairs + first + 4 * i) : 0;
    }
  }

  __device__ void start(const UnitParams&, int first, int end) {
    first_ = first;
    end_ = end;
  }

  template <class Use>
  __device__ void for_each(Use use) {
    constexpr int kUnits = ConsumerConfig::kUnits;
    for (; first_ < end_; first_ += kUnits, ++step_) {
      UnitScores<ConsumerConfig> scores;
      ring_.wait_full(step_);
      ptx::warpgroup_fence(scores[0], query_);
      SPARSE_ATTN_UNROLL
      for (int column = 0; column < Config::kHeadDim; column += 16) {
        ptx::warpgroup_multiply<typename Config::T, ptx::Major::kK>(
            scores[0], query_[column / 16],
            Config::Chunk::along_rows(ring_.stage(step_), 0, column), column != 0);
      }
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(scores[0]);
      ring_.release(step_);
      use(first_, scores);
    }
  }

  // After the last chunk.
  __device__ int step() const { return step_; }

 private:
  const ChunkRing& ring_;
  Factors<Config::kHeadDim> query_;
  int first_ = 0, end_ = 0, step_;
};

// All consumers walk over the units that any token of the piece sees, which `first_tile` starts.
template <class Config>
__device__ __forceinline__ SelectionWalks walks_of_piece(const SelectionParams& p,
                                                         const SelectionTile& first_tile) {
  const int num_tokens =
      smaller(p.q_len - first_tile.first_token, Config::kConsumers * p.tiling.tile_tokens);
  return walks_of(p, num_tokens, [&](int slot) { return load_position(p, first_tile, slot); });
}

// By one thread: copies the units of all walks, in their order, from `step` on. Returns the step
// after the last.
template <class Config>
__device__ int copy_units(const SelectionArguments& arguments, const SelectionTile& tile,
                          const SelectionWalks& walks, const typename Config::ChunkRing& ring,
                          int step) {
  constexpr int kUnits = ConsumerConfig::kUnits;
  const SelectionParams& p = arguments.params;
  const auto copy = [&](const TensorMap& map, int first, int end) {
    for (; first < end; first += kUnits, ++step) {
      ring.wait_empty(step);
      ptx::mbarrier_arrive_expect(ring.full(step), Config::Chunk::kBytes);
      load_rows<typename Config::Chunk, 4>(ring.stage(step), 0, map,
                                           {0, tile.kv_head, first, tile.batch % p.unit_batch},
                                           ring.full(step));
    }
  };
  copy(arguments.coarse, 0, walks.coarse_end);
  copy(arguments.fine, 0, walks.fallback_end);
  for (Segment segment = walks.segment<ConsumerConfig>(p, 0); segment.first_block < walks.end_block;
       segment = walks.segment<ConsumerConfig>(p, segment.end_block)) {
    copy(arguments.fine, segment.first_unit, segment.end_unit);
  }
  return step;
}

// What a consumer does with its tile, from `step` on. Returns the step after the last.
template <class Config>
__device__ __forceinline__ int select_of_tile(const SelectionParams& p, const SelectionTile& tile,
                                              const SelectionWalks& walks,
                                              const TokenMemory<ConsumerConfig>& memory,
                                              const typename Config::ChunkRing& ring, int step,
                                              int barrier) {
  const TokenGroup<ConsumerConfig> group(p, tile, memory,
                                         static_cast<int>(threadIdx.x) % kWarpgroup, barrier);
  group.start();
  ptx::sync_barrier(barrier, kWarpgroup);  // positions and states are there
  UnitStream<Config> units(p, tile, group, ring, step);
  group.select(walks, units);
  group.write_lists();
  ptx::sync_barrier(barrier, kWarpgroup);  // positions and states may be written again
  return units.step();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    selection(const __grid_constant__ SelectionArguments arguments) {
  const SelectionParams& p = arguments.params;
  const std::uint32_t base = ptx::shared_base();
  const typename Config::ChunkRing ring(base, base + Config::ChunkRing::kBytes);
  const typename Config::Turns turns(base + Config::kUnitBytes);
  if (threadIdx.x == 0) {
    ring.init();
    turns.init();
    ptx::mbarrier_init_fence();
  }
  ptx::sync_threads();  // the barriers can be used

  const SelectionTiles tiles(p, Config::kConsumers);
  // The compiler sees that it is the same in all lanes.
  const int consumer = ptx::shuffle(static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  int step = 0;
  if (consumer == Config::kConsumers) {
    ptx::release_registers<Config::kProducerRegisters>();
    if (ptx::warp_index() != Config::kConsumerWarps) return;
    turns.produce(tiles, [&](int piece, int) {
      const SelectionTile tile = tiles.tile(piece);
      const auto walks = walks_of_piece<Config>(p, tile);
      if (ptx::lane_index() == 0) step = copy_units<Config>(arguments, tile, walks, ring, step);
    });
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    const auto memory = memory_of<Config>(p.tiling, base, consumer);
    turns.consume([&](int piece, int) {
      const auto walks = walks_of_piece<Config>(p, tiles.tile(piece));
      step = select_of_tile<Config>(p, tiles.tile(piece, consumer), walks, memory, ring, step,
                                    1 + consumer);
    });
  }
}

// ---- On the host.

// Units: coordinates (element, kv_head, unit, row of the batch). Units beyond the last are zeros.
template <class T, int kHeadDim>
TensorMap map_of_units(const UnitParams& units, const SelectionParams& p) {
  if (units.count == 0) return {};
  AttentionShape shape{};
  shape.num_kv_heads = p.num_kv_heads;
  shape.kv_len = units.count;
  shape.key_batch = p.unit_batch;
  return map_of_keys<T, kHeadDim>(units.keys, shape, ConsumerConfig::kUnits);
}

template <class Config>
SelectionTiling tiling_for(const SelectionParams& p, int segment_blocks) {
  return selection_tiling(p, ConsumerConfig::kRows, segment_blocks,
                          shared_bytes_of(Config::kBlocks), false,
                          [](const SelectionTiling& tiling) {
                            return memory_of<Config>(tiling, 0, Config::kConsumers - 1).end;
                          });
}

}  // namespace sparse_attn::sm90
