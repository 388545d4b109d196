// The walk over the keys that a slice of a query tile sees, for the kernels that are query-major:
// forward and dQ. A producer warp reads the lists and copies keys and values; consumers, of which
// each is a warpgroup with 64 rows of the slice, read no list.
//
// Keys come in chunks of `kKeys`: a part of a large block, or several small blocks, so that
// products are never narrow. A chunk consists of pieces: so many keys of one block. Pieces that no
// row of the slice may see are left out. The chunk's header says of each piece which rows chose it
// and whether its keys have to be looked at one by one; and which consumers have nothing to do.
// After the last chunk comes one without keys.
#pragma once

#include "common/tile.cuh"
#include "params.h"
#include "sm90/matrix.cuh"

namespace sparse_attn::sm90 {

// The row groups of a plan to which the rows of a consumer belong: not more than the rows, and one
// after the other, because they are whole tokens or a part of one.
struct SliceGroups {
  int first = 0;

  SliceGroups() = default;
  __device__ SliceGroups(const PlanParams& plan, const Tile& tile) : first(of(plan, tile, 0)) {}

  // Counted from the first.
  __device__ int of_row(const PlanParams& plan, const Tile& tile, int row) const {
    return of(plan, tile, row) - first;
  }

  // Those that chose the block in a slot, as bits.
  __device__ std::uint64_t that_chose(const PlanParams& plan, std::int64_t slot) const {
    if (plan.membership == nullptr) return ~std::uint64_t{0};
    const auto word = [&](int i) -> std::uint64_t {
      const int index = first / 32 + i;
      if (index >= plan.num_words) return 0;
      return ptx::load_global(plan.membership + slot * plan.num_words + index);
    };
    const int shift = first % 32;
    const std::uint64_t low = (word(0) | word(1) << 32) >> shift;
    return shift == 0 ? low : low | word(2) << (64 - shift);
  }

 private:
  __device__ static int of(const PlanParams& plan, const Tile& tile, int row) {
    const int token = (tile.first_row + row) / tile.group_size,
              head = (tile.first_row + row) % tile.group_size;
    return token / plan.row_group_tokens * (tile.group_size / plan.row_group_heads) +
           head / plan.row_group_heads;
  }
};

// What the rows of a consumer see together, known to all lanes of a warp. A row sees no more than
// `widest` and no less than `narrowest`.
struct SliceMask {
  RowMask widest, narrowest;
  SliceGroups groups;
  std::uint64_t existing = 0;  // groups of rows that exist

  SliceMask() = default;
  __device__ SliceMask(const AttentionInputs& in, const Tile& tile) : groups(in.plan, tile) {
    set(widest, INT32_MIN, INT32_MAX);
    set(narrowest, INT32_MAX, INT32_MIN);
    for (int row = ptx::lane_index(); row < tile.num_rows; row += 32) {
      const RowMask mask(in.shape, in.mask, tile, row);
      merge(mask, mask);
      existing |= std::uint64_t{1} << groups.of_row(in.plan, tile, row);
    }
    for (int distance = 1; distance < 32; distance *= 2) {
      merge(other_lane(widest, distance), other_lane(narrowest, distance));
      const auto low = static_cast<std::uint32_t>(existing),
                 high = static_cast<std::uint32_t>(existing >> 32);
      existing |= ptx::shuffle_xor(low, distance) |
                  static_cast<std::uint64_t>(ptx::shuffle_xor(high, distance)) << 32;
    }
  }

  __device__ Visible sees_keys(const AttentionInputs& in, int first_key, int last_key) const {
    if (widest.sees_keys(in, first_key, last_key) == Visible::kNone) return Visible::kNone;
    const bool is_all = narrowest.sees_keys(in, first_key, last_key) == Visible::kAll;
    return is_all ? Visible::kAll : Visible::kSome;
  }

 private:
  // Of no row: `low` where more is wider, `high` where more is narrower.
  __device__ static void set(RowMask& mask, int low, int high) {
    mask.position = mask.num_sinks = mask.last = low;
    mask.first = high;
  }
  __device__ static RowMask other_lane(const RowMask& mask, int distance) {
    RowMask other;
    other.position = ptx::shuffle_xor(mask.position, distance);
    other.num_sinks = ptx::shuffle_xor(mask.num_sinks, distance);
    other.first = ptx::shuffle_xor(mask.first, distance);
    other.last = ptx::shuffle_xor(mask.last, distance);
    return other;
  }
  __device__ void merge(const RowMask& wider, const RowMask& narrower) {
    const auto smaller = [](int x, int y) { return x < y ? x : y; };
    const auto larger = [](int x, int y) { return x < y ? y : x; };
    widest.position = larger(widest.position, wider.position);
    widest.num_sinks = larger(widest.num_sinks, wider.num_sinks);
    widest.first = smaller(widest.first, wider.first);
    widest.last = larger(widest.last, wider.last);
    narrowest.position = smaller(narrowest.position, narrower.position);
    narrowest.num_sinks = smaller(narrowest.num_sinks, narrower.num_sinks);
    narrowest.first = larger(narrowest.first, narrower.first);
    narrowest.last = smaller(narrowest.last, narrower.last);
  }
};

// Consecutive keys of a block, as a consumer sees them: rows of `chosen` groups all of them (kAll),
// or some.
struct alignas(16) Piece {
  int first_key;
  Visible visible;
  std::uint32_t chosen[2];

  __device__ bool has(int group) const {
    return (group < 32 ? chosen[0] : chosen[1]) >> (group % 32) & 1;
  }
  __device__ std::uint64_t that_chose() const { return chosen[0] | std::uint64_t{chosen[1]} << 32; }
};

// What a consumer has to do for the scores of a chunk.
enum class ChunkKind {
  kEnd,     // there is no chunk
  kUnseen,  // nothing at all: no row sees any of the keys
  kPlain,   // nothing else: all rows see all keys
  kChosen,  // rows see all keys of the pieces that they chose
  kEdge,    // also the token mask
};

template <int kHeadDim, int kBlockSize, int kKeys_, int kStages, int kConsumers_>
class KeyStream {
 public:
  static constexpr int kConsumers = kConsumers_;  // warpgroups
  static constexpr int kKeys = kKeys_;
  static constexpr int kPieceKeys = kBlockSize < kKeys ? kBlockSize : kKeys;
  static constexpr int kPieces = kKeys / kPieceKeys;
  using Chunk = Matrix<kKeys, kHeadDim>;
  // Of a chunk, some row sees something: if there is one consumer, one of its rows.
  static constexpr bool kHasUnseen = kConsumers > 1;

 private:
  static constexpr int kWarps = kWarpgroup / 32;  // of a consumer
  using ChunkRing = Ring<kStages, Chunk::kBytes, kConsumers * kWarps>;
  static constexpr int kKindOffset = kPieces * kConsumers * sizeof(Piece),
                       kHeaderBytes = kKindOffset + 16;
  static_assert(kConsumers * sizeof(ChunkKind) <= 16);
  static constexpr int kSeenBytes = kConsumers * kWarps * 4 * 4;

 public:
  static constexpr int kBytes =
      2 * (ChunkRing::kBytes + ChunkRing::kBarrierBytes) + kStages * kHeaderBytes + kSeenBytes;

  // `base` is a multiple of Chunk::kAlignment.
  __device__ explicit KeyStream(std::uint32_t base)
      : keys_(base, base + 2 * ChunkRing::kBytes),
        values_(base + ChunkRing::kBytes, base + 2 * ChunkRing::kBytes + ChunkRing::kBarrierBytes),
        headers_(base + 2 * (ChunkRing::kBytes + ChunkRing::kBarrierBytes)) {}

  // By one thread, as `Ring::init`.
  __device__ void init() const {
    keys_.init();
    values_.init();
  }

  // By the producer warp: all chunks of a slice from `step` on, and the one without keys. Returns
  // the step after that.
  __device__ int produce(const AttentionInputs& in, const Tile& tile, const TensorMap& key_map,
                         const TensorMap& value_map, int step) const {
    SliceMask masks[kConsumers];
    SPARSE_ATTN_UNROLL
    for (int i = 0; i < kConsumers; ++i)
      masks[i] = SliceMask(in, tile.part(i * kProductRows, kProductRows));
    const Chunks<kPieceKeys> pieces(in, tile);
    int filled = 0;  // pieces of the chunk of this step
    const auto add = [&](const Piece(&piece)[kConsumers]) {
      if (ptx::lane_index() == 0) {
        if (filled == 0) keys_.wait_empty(step);
        SPARSE_ATTN_UNROLL
        for (int i = 0; i < kConsumers; ++i)
          ptx::store_shared(piece_address(step, filled, i), piece[i]);
        if (filled == kPieces - 1) start_copies(in, tile, key_map, value_map, step, masks);
      }
      filled = (filled + 1) % kPieces;
      if (filled == 0) ++step;
    };
    for (int first = 0; first < pieces.count(); first += 32) {
      Piece own[kConsumers];
      const bool is_seen = look_at(own, in, masks, pieces, first + ptx::lane_index());
      const std::uint32_t wanted = ptx::ballot(is_seen);
      for (int lane = 0; lane < 32; ++lane) {
        if ((wanted >> lane & 1) == 0) continue;
        Piece piece[kConsumers];
        SPARSE_ATTN_UNROLL
        for (int i = 0; i < kConsumers; ++i) {
          piece[i] = {ptx::shuffle(own[i].first_key, lane),
                      static_cast<Visible>(ptx::shuffle(static_cast<int>(own[i].visible), lane)),
                      {ptx::shuffle(own[i].chosen[0], lane), ptx::shuffle(own[i].chosen[1], lane)}};
        }
        add(piece);
      }
    }
    // Keys beyond the last are zeros, which no row sees.
    Piece none[kConsumers];
    for (Piece& piece : none) piece = {in.shape.kv_len, Visible::kNone, {0, 0}};
    while (filled != 0) add(none);
    if (ptx::lane_index() == 0) {
      keys_.wait_empty(step);
      for (int i = 0; i < kConsumers; ++i)
        ptx::store_shared(kind_address(step, i), ChunkKind::kEnd);
      ptx::mbarrier_arrive(keys_.full(step));
      values_.wait_empty(step);
      ptx::mbarrier_arrive(values_.full(step));
    }
    return step + 1;
  }

  // By the consumers. The header is there with the keys, and is released with them.
  __device__ ChunkKind wait_keys(int step, int consumer) const {
    keys_.wait_full(step);
    return kind(step, consumer);
  }
  __device__ void wait_values(int step) const { values_.wait_full(step); }
  __device__ std::uint32_t keys(int step) const { return keys_.stage(step); }
  __device__ std::uint32_t values(int step) const { return values_.stage(step); }
  __device__ Piece piece(int step, int i, int consumer) const {
    return ptx::load_shared<Piece>(piece_address(step, i, consumer));
  }
  __device__ int first_key(int step, int i) const {
    return ptx::load_shared<int>(piece_address(step, i, 0));
  }
  __device__ void release_keys(int step) const { keys_.release(step); }
  __device__ void release_values(int step) const { values_.release(step); }
  // A chunk that the consumer has no use for, or the one without keys. Nothing from before may be
  // kept when others follow: after enough of them the copies wait for what is.
  __device__ void skip(int step) const {
    keys_.release(step);
    values_.wait_full(step);  // a stage is released only after it was filled
    values_.release(step);
  }

  // By the consumers that have this chunk, an edge: zeros to the rows of `chunk`, its keys or
  // values that have come, of keys that no row sees. They may hold NaN, and 0 * NaN is not 0. In
  // `seen` bit 2 c + i says that a row of this thread sees key 8 c + 2 (lane % 4) + i. Uses named
  // barriers from 1 on.
  __device__ void zero_unseen(std::uint32_t chunk, std::uint32_t seen, int step,
                              int consumer) const {
    static_assert(kKeys <= 128, "two bits for eight keys");
    static_assert(kConsumers <= 2);
    // One consumer is always all of them.
    const bool is_by_all = kConsumers == 1 || kind(step, 1 - consumer) != ChunkKind::kUnseen;
    const int lane = ptx::lane_index(), barrier = is_by_all ? 1 : consumer + 2,
              first = is_by_all ? 0 : consumer, count = is_by_all ? kConsumers : 1;
    const int thread = static_cast<int>(threadIdx.x) - first * kWarpgroup;
    for (int distance = 4; distance < 32; distance *= 2) seen |= ptx::shuffle_xor(seen, distance);
    const std::uint32_t all_seen = headers_ + kStages * kHeaderBytes;
    if (lane < 4) ptx::store_shared(all_seen + 16 * ptx::warp_index() + 4 * lane, seen);
    ptx::sync_barrier(barrier, count * kWarpgroup);  // the other warps' are there
    zero_rows<Chunk>(chunk, thread, count * kWarpgroup, [&](int key) {
      std::uint32_t by_any = 0;
      for (int warp = first * kWarps; warp < (first + count) * kWarps; ++warp)
        by_any |= ptx::load_shared<std::uint32_t>(all_seen + 16 * warp + key % 8 / 2 * 4);
      return (by_any >> (key / 8 * 2 + key % 2) & 1) == 0;
    });
    ptx::fence_async_proxy();
    ptx::sync_barrier(barrier, count * kWarpgroup);  // products may read all rows
  }

 private:
  __device__ std::uint32_t piece_address(int step, int i, int consumer) const {
    return headers_ + step % kStages * kHeaderBytes + (i * kConsumers + consumer) * sizeof(Piece);
  }
  __device__ std::uint32_t kind_address(int step, int consumer) const {
    return piece_address(step, 0, 0) + kKindOffset + consumer * sizeof(ChunkKind);
  }
  __device__ ChunkKind kind(int step, int consumer) const {
    return ptx::load_shared<ChunkKind>(kind_address(step, consumer));
  }

  // Number `i` of the list, as each consumer sees it. Returns whether any row does.
  __device__ static bool look_at(Piece (&piece)[kConsumers], const AttentionInputs& in,
                                 const SliceMask (&masks)[kConsumers],
                                 const Chunks<kPieceKeys>& pieces, int i) {
    const int first_key = i < pieces.count() ? pieces.first_key(i) : -1;
    bool is_seen = false;
    SPARSE_ATTN_UNROLL
    for (int j = 0; j < kConsumers; ++j) {
      piece[j] = {first_key, Visible::kNone, {0, 0}};
      if (first_key < 0) continue;
      const std::uint64_t chosen =
          masks[j].groups.that_chose(in.plan, pieces.slot(i)) & masks[j].existing;
      if (chosen == 0) continue;
      const Visible visible = masks[j].sees_keys(in, first_key, first_key + kPieceKeys - 1);
      if (visible == Visible::kNone) continue;
      piece[j] = {first_key,
                  visible,
                  {static_cast<std::uint32_t>(chosen), static_cast<std::uint32_t>(chosen >> 32)}};
      is_seen = true;
    }
    return is_seen;
  }

  // By one thread, when all pieces are in the header.
  __device__ void start_copies(const AttentionInputs& in, const Tile& tile,
                               const TensorMap& key_map, const TensorMap& value_map, int step,
                               const SliceMask (&masks)[kConsumers]) const {
    // An edge to one consumer is one to all, which together find the keys that no row sees.
    bool is_edge = false;
    for (int i = 0; i < kPieces * kConsumers; ++i)
      is_edge |= piece(step, i / kConsumers, i % kConsumers).visible == Visible::kSome;
    SPARSE_ATTN_UNROLL
    for (int j = 0; j < kConsumers; ++j) {
      bool is_seen = false, is_plain = true;
      for (int i = 0; i < kPieces; ++i) {
        const std::uint64_t chosen = piece(step, i, j).that_chose();
        is_seen |= chosen != 0;
        is_plain &= chosen == masks[j].existing;
      }
      ptx::store_shared(kind_address(step, j), !is_seen   ? ChunkKind::kUnseen
                                               : is_edge  ? ChunkKind::kEdge
                                               : is_plain ? ChunkKind::kPlain
                                                          : ChunkKind::kChosen);
    }
    const auto copy = [&](const ChunkRing& ring, const TensorMap& map) {
      ptx::mbarrier_arrive_expect(ring.full(step), Chunk::kBytes);
      for (int i = 0; i < kPieces; ++i) {
        load_rows<Chunk, 4>(
            ring.stage(step), i * kPieceKeys, map,
            {0, tile.kv_head, piece(step, i, 0).first_key, tile.batch % in.shape.key_batch},
            ring.full(step));
      }
    };
    copy(keys_, key_map);
    values_.wait_empty(step);
    copy(values_, value_map);
  }

  ChunkRing keys_, values_;
  std::uint32_t headers_;
};

// What a consumer's thread has to know of its two rows to mask scores. `tile`: the consumer's part
// of the slice.
struct ConsumerRows {
  int rows[2];  // of the part
  RowMask masks[2];
  int groups[2];

  __device__ ConsumerRows(const AttentionInputs& in, const Tile& tile)
      : rows{first_row(), first_row() + 8},
        masks{RowMask(in.shape, in.mask, tile, rows[0]),
              RowMask(in.shape, in.mask, tile, rows[1])} {
    const SliceGroups slice(in.plan, tile);
    for (int half = 0; half < 2; ++half) groups[half] = slice.of_row(in.plan, tile, rows[half]);
  }

 private:
  __device__ static int first_row() {
    return static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16 + ptx::lane_index() / 4;
  }
};

// Calls `visit(column, place, is_visible, bias)` for each of the thread's scores of a chunk that is
// not plain; `visit` returns whether the score counts. Returns what `zero_unseen` needs to know,
// which is only needed for an edge.
template <class Stream, class Visit>
__device__ __forceinline__ std::uint32_t visit_scores(const AttentionInputs& in, const Tile& tile,
                                                      const Stream& stream, int step, int consumer,
                                                      const ConsumerRows& rows, Visit visit) {
  constexpr int kColumns = Stream::kPieceKeys / 8;  // of a piece
  std::uint32_t seen = 0;
  SPARSE_ATTN_UNROLL
  for (int i = 0; i < Stream::kPieces; ++i) {
    const Piece piece = stream.piece(step, i, consumer);
    const bool is_chosen[2] = {piece.has(rows.groups[0]), piece.has(rows.groups[1])};
    if (piece.visible != Visible::kSome) {
      SPARSE_ATTN_UNROLL
      for (int column = i * kColumns; column < (i + 1) * kColumns; ++column) {
        SPARSE_ATTN_UNROLL
        for (int place = 0; place < 4; ++place) visit(column, place, is_chosen[place / 2], 0.0f);
        if (piece.visible == Visible::kAll) seen |= 3u << (2 * column);  // by those that chose it
      }
      continue;
    }
    SPARSE_ATTN_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      SPARSE_ATTN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const KeyMask key(in, tile.batch, tile.kv_head,
                          piece.first_key + 8 * column + ptx::lane_index() % 4 * 2 + j);
        SPARSE_ATTN_UNROLL
        for (int half = 0; half < 2; ++half) {
          const bool is_visible = key.is_key && is_chosen[half] && rows.masks[half].is_row &&
                                  rows.masks[half].sees(in.mask, key.position, key.segment);
          const int all_columns = i * kColumns + column;
          if (visit(all_columns, 2 * half + j, is_visible, key.bias))
            seen |= 1u << (2 * all_columns + j);
        }
      }
    }
  }
  return seen;
}

}  // namespace sparse_attn::sm90
