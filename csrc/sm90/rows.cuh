// The walk over the rows that chose a block of keys, for the kernel that is key-major: dK and dV.
// The first warp of a producer reads the list and copies queries and gradients of outputs, and its
// other warps look up what these rows see. Consumers read no list.
//
// Rows come 64 at a time, in strips: so many rows of a tile, in one copy. Strips of which no row
// chose the block are left out. After the last rows come stages without any.
#pragma once

#include "common/inverse.cuh"
#include "common/tile.cuh"
#include "params.h"
#include "sm90/matrix.cuh"

namespace sparse_attn::sm90 {

// The rows of a strip share a list, or are so few that copies of less would be slow. A strip may go
// on beyond its tile: such rows count as not chosen.
struct StripBox : SliceBox {
  static constexpr int kFewestRows = 16;  // if the tile has as many

  __host__ __device__ StripBox(const AttentionShape& shape, const PlanParams& plan)
      : SliceBox(shape, plan) {
    const int fewest = (kFewestRows + heads - 1) / heads;
    const int shared = plan.membership == nullptr ? tokens : plan.row_group_tokens;
    const int wanted = shared < fewest ? fewest : shared;
    if (wanted < tokens) tokens = wanted;
  }
  // From one strip to the next in a stage, where copies may begin; rows between them are zeros.
  __host__ __device__ int stride() const { return (rows() + 7) / 8 * 8; }
  __host__ __device__ int strips_per_stage() const { return kProductRows / stride(); }
  __device__ bool fills_stages() const { return rows() * strips_per_stage() == kProductRows; }
};

struct alignas(8) Strip {
  int index;  // of the slices of so many rows; negative: there is none
  int slot;   // of the block in the list of its tile

  __device__ bool exists() const { return index >= 0; }
  __device__ static Strip none() { return {-1, 0}; }
};

// What a stage holds.
enum class Content {
  kNothing,  // the list is over
  kUnseen,   // rows that see nothing of the chunk
  kMasked,   // rows of which some see a part of the chunk: each pair needs a look
  kPlain,    // rows that see all of the chunk, or nothing
};

// What the 64 rows of a stage bring to the mask and to the gradients, in shared memory.
class RowTable {
 public:
  static constexpr int kBytes = kProductRows * 32 + 16;

  struct Row {
    // Of rows that see nothing of the chunk: then their probabilities are 0 without a mask.
    float lse = INFINITY;  // in base 2
    float delta = 0;
    RowMask mask;
  };
  template <class X>
  struct alignas(8) Two {
    X x[2];
  };

  __device__ explicit RowTable(std::uint32_t base) : base_(base) {}

  __device__ void store(int row, const Row& x) const {
    ptx::store_shared(lse(row), x.lse);
    ptx::store_shared(delta(row), x.delta);
    ptx::store_shared(token(row),
                      Four{{x.mask.is_row, x.mask.position, x.mask.segment, x.mask.num_sinks}});
    ptx::store_shared(window(row), Two<int>{{x.mask.first, x.mask.last}});
  }
  __device__ void store_content(Content content) const { ptx::store_shared(end(), content); }

  __device__ Content content() const { return ptx::load_shared<Content>(end()); }
  // Of a row, an even number, and of the next.
  __device__ Two<float> lse_of_two(int row) const { return ptx::load_shared<Two<float>>(lse(row)); }
  __device__ Two<float> delta_of_two(int row) const {
    return ptx::load_shared<Two<float>>(delta(row));
  }
  __device__ RowMask mask(int row) const {
    const auto of_token = ptx::load_shared<Four>(token(row));
    const auto of_window = ptx::load_shared<Two<int>>(window(row));
    RowMask mask;
    mask.is_row = of_token.x[0];
    mask.position = of_token.x[1];
    mask.segment = of_token.x[2];
    mask.num_sinks = of_token.x[3];
    mask.first = of_window.x[0];
    mask.last = of_window.x[1];
    return mask;
  }

 private:
  struct alignas(16) Four {
    int x[4];
  };
  __device__ std::uint32_t lse(int row) const { return base_ + 4 * row; }
  __device__ std::uint32_t delta(int row) const { return base_ + 4 * kProductRows + 4 * row; }
  __device__ std::uint32_t token(int row) const { return base_ + 8 * kProductRows + 16 * row; }
  __device__ std::uint32_t window(int row) const { return base_ + 24 * kProductRows + 8 * row; }
  __device__ std::uint32_t end() const { return base_ + 32 * kProductRows; }

  std::uint32_t base_;
};

// `kReaders` warpgroups read each stage, before it is written again.
template <int kHeadDim, int kStages, int kReaders>
class RowStream {
 public:
  using Rows = Matrix<kProductRows, kHeadDim>;

 private:
  // A stage is full when its copies and its table are there.
  using Stages = Ring<kStages, 2 * Rows::kBytes, kReaders * kWarpgroup / 32, 2>;
  static constexpr int kStripBytes = kProductRows / 8 * sizeof(Strip);
  static constexpr int kTables = Stages::kBytes, kStrips = kTables + kStages * RowTable::kBytes,
                       kBarriers = kStrips + kStages * kStripBytes,
                       kStripBarriers = kBarriers + Stages::kBarrierBytes;

 public:
  static constexpr int kStageBytes = Stages::kBytes;  // from `base` on
  static constexpr int kBytes = kStripBarriers + 8 * kStages;
  // Not more than stages: who waits for a phase of a barrier must know that the one before is over.
  static constexpr int kTableWarps = kStages < 3 ? kStages : 3;

  // `base` is a multiple of Rows::kAlignment.
  __device__ explicit RowStream(std::uint32_t base)
      : base_(base), stages_(base, base + kBarriers) {}

  // By `kThreads` threads, of which this is number `thread`, and then fence and barrier as after
  // `zero_rows`: no copy writes the rows between strips.
  template <int kThreads>
  __device__ void zero_rows_between(const StripBox& box, int thread) const {
    const auto is_between = [&](int row) {
      return row % box.stride() >= box.rows() || row / box.stride() >= box.strips_per_stage();
    };
    if (box.fills_stages()) return;
    SPARSE_ATTN_NO_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      zero_rows<Rows>(query(stage), thread, kThreads, is_between);
      zero_rows<Rows>(d_out(stage), thread, kThreads, is_between);
    }
  }
  // By one thread, as `Ring::init`.
  __device__ void init() const {
    stages_.init();
    for (int stage = 0; stage < kStages; ++stage) ptx::mbarrier_init(strip_barrier(stage), 1);
  }

  // By the producer's first warp: starts the copies of all rows of the list, in stages from `step`
  // on. Returns the step after the one that ends them.
  __device__ int copy(const AttentionInputs& in, const InverseList& list, int batch, int kv_head,
                      const TensorMap& query_map, const TensorMap& d_out_map, int step) const {
    const StripBox box(in.shape, in.plan);
    const int strips_per_tile = Tile::slices_per_tile(in.shape, in.plan, box.rows()),
              strips_per_stage = box.strips_per_stage(), lane = ptx::lane_index();
    int filled = 0;  // strips of the stage
    const auto start_stage = [&] {
      stages_.wait_empty(step);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect(stages_.full(step),
                                    2 * strips_per_stage * box.rows() * 2 * kHeadDim);
      }
      ptx::sync_warp();  // the barrier knows of the bytes before they come
    };
    const auto end_stage = [&] {
      ptx::sync_warp();  // all strips have been stored
      if (lane == 0) ptx::mbarrier_arrive(strip_barrier(step));
      ++step;
      filled = 0;
    };
    // By a lane: one of the strips.
    const auto start_copies = [&](const Strip& strip, int i, int token, int head) {
      ptx::store_shared(strip_address(step, i), strip);
      const int at[5] = {0, head, kv_head, token, batch};
      load_rows<Rows>(query(step), i * box.stride(), query_map, at, stages_.full(step));
      load_rows<Rows>(d_out(step), i * box.stride(), d_out_map, at, stages_.full(step));
    };

    // Each lane looks at one of 32 strips, of the tiles from `entry` on, the first of which has
    // `offset` strips that have been looked at.
    int offset = 0;
    for (std::int64_t entry = 0; entry < list.count();) {
      const int strips_before = offset + lane;
      Strip own = Strip::none();
      int token = 0, head = 0;
      if (entry + strips_before / strips_per_tile < list.count()) {
        const InverseList::Entry of_lane = list.at(entry + strips_before / strips_per_tile);
        if (of_lane.tile >= 0) {
          const int index = of_lane.tile * strips_per_tile + strips_before % strips_per_tile;
          const Tile tile(in.shape, in.plan, box.rows(), batch, kv_head, index);
          if (any_chose(in.plan, tile, of_lane.slot)) own = {index, of_lane.slot};
          token = tile.token(0);
          head = tile.first_row % tile.group_size;
        }
      }
      entry += (offset + 32) / strips_per_tile;
      offset = (offset + 32) % strips_per_tile;

      // Those that chose the block go to the stage, and to the next ones when it is full.
      const std::uint32_t chosen = ptx::ballot(own.exists());
      const int count = ptx::count_bits(chosen),
                number = ptx::count_bits(chosen & ((1u << lane) - 1));
      for (int taken = 0; taken < count;) {
        if (filled == 0) start_stage();
        const int place = filled + number - taken;
        if (own.exists() && number >= taken && place < strips_per_stage)
          start_copies(own, place, token, head);
        const int room = strips_per_stage - filled, rest = count - taken;
        filled += rest < room ? rest : room;
        taken += rest < room ? rest : room;
        if (filled == strips_per_stage) end_stage();
      }
    }
    if (filled > 0) {
      // Tokens beyond the array: zeros.
      if (lane >= filled && lane < strips_per_stage)
        start_copies(Strip::none(), lane, in.shape.q_len, 0);
      end_stage();
    }
    // One stage without strips for each of the warps below.
    for (const int end = step + kTableWarps; step < end; ++step) {
      stages_.wait_empty(step);
      if (lane == 0) {
        ptx::store_shared(strip_address(step, 0), Strip::none());
        ptx::mbarrier_arrive(stages_.full(step));
        ptx::mbarrier_arrive(strip_barrier(step));
      }
    }
    return step;
  }

  // By `kTableWarps` other warps of the producer: fills in the tables of a list, each warp those of
  // every so many stages, from `step` on. The keys are those that the consumers have. Returns the
  // warp's first step of the next list.
  __device__ int look_up(const AttentionBackwardParams& p, int batch, int kv_head, int first_key,
                         int last_key, int step) const {
    const StripBox box(p.in.shape, p.in.plan);
    const int lane = ptx::lane_index();
    for (;; step += kTableWarps) {
      // The copying warp has said which strips come, and the consumers have read the old table.
      ptx::mbarrier_wait(strip_barrier(step), step / kStages % 2);
      const auto strip = [&](int i) { return ptx::load_shared<Strip>(strip_address(step, i)); };
      const bool is_over = !strip(0).exists();
      bool sees_some = false, sees_part = false;
      for (int row = is_over ? kProductRows : lane; row < kProductRows; row += 32) {
        const int i = row / box.stride(), row_of_strip = row % box.stride();
        const bool is_between = i >= box.strips_per_stage() || row_of_strip >= box.rows();
        const Visible sees =
            look_up_row(p, batch, kv_head, first_key, last_key, box.rows(),
                        is_between ? Strip::none() : strip(i), row_of_strip, table(step), row);
        sees_some = sees_some || sees != Visible::kNone;
        sees_part = sees_part || sees == Visible::kSome;
      }
      const bool is_seen = ptx::ballot(sees_some) != 0, is_masked = ptx::ballot(sees_part) != 0;
      if (lane == 0) {
        table(step).store_content(is_over     ? Content::kNothing
                                  : is_masked ? Content::kMasked
                                  : is_seen   ? Content::kPlain
                                              : Content::kUnseen);
      }
      ptx::sync_warp();  // the table is there before the barrier is told
      if (lane == 0) ptx::mbarrier_arrive(stages_.full(step));
      if (is_over) return step + kTableWarps;
    }
  }

  // By the consumers. At least two stages have no rows.
  __device__ Content wait(int step) const {
    stages_.wait_full(step);
    return table(step).content();
  }
  __device__ std::uint32_t query(int step) const { return stages_.stage(step); }
  __device__ std::uint32_t d_out(int step) const { return stages_.stage(step) + Rows::kBytes; }
  __device__ RowTable table(int step) const {
    return RowTable(base_ + kTables + step % kStages * RowTable::kBytes);
  }
  __device__ void release(int step) const { stages_.release(step); }

 private:
  __device__ static bool any_chose(const PlanParams& plan, const Tile& strip, int slot) {
    const std::int64_t offset = strip.list_offset(plan) * plan.capacity + slot;
    for (int row = 0; row < strip.num_rows; row += plan.row_group_heads) {
      if (chose(plan, strip, row, offset)) return true;
    }
    return false;
  }

  // Returns how much the row sees of the keys.
  __device__ static Visible look_up_row(const AttentionBackwardParams& p, int batch, int kv_head,
                                        int first_key, int last_key, int strip_rows,
                                        const Strip& strip, int row_of_strip, const RowTable& table,
                                        int row) {
    const AttentionInputs& in = p.in;
    RowTable::Row entry;
    Visible sees = Visible::kNone;
    if (strip.exists()) {
      const Tile tile(in.shape, in.plan, strip_rows, batch, kv_head, strip.index);
      const std::int64_t slot = tile.list_offset(in.plan) * in.plan.capacity + strip.slot;
      if (chose(in.plan, tile, row_of_strip, slot)) {
        entry.mask = RowMask(in.shape, in.mask, tile, row_of_strip);
        sees = entry.mask.sees_keys(in, first_key, last_key);
      }
      if (sees != Visible::kNone) {
        const std::int64_t offset = tile.row_offset(in.shape, row_of_strip);
        entry.lse = ptx::load_global(p.lse + offset) * kLog2E;
        entry.delta = ptx::load_global(p.delta + offset);
      }
    }
    entry.mask.is_row = sees != Visible::kNone;
    table.store(row, entry);
    return sees;
  }

  __device__ std::uint32_t strip_address(int step, int i) const {
    return base_ + kStrips + step % kStages * kStripBytes + i * sizeof(Strip);
  }
  // Is told when the strips of a stage are known.
  __device__ std::uint32_t strip_barrier(int step) const {
    return base_ + kStripBarriers + step % kStages * 8;
  }

  std::uint32_t base_;
  Stages stages_;
};

}  // namespace sparse_attn::sm90
