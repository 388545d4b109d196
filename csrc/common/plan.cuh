// The plan of a selection: the union of the lists of each query tile, and its inverse. The same on
// every architecture.
#pragma once

#include "common/ptx.cuh"
#include "common/units.cuh"
#include "params.h"

namespace sparse_attn {

// The sum of the values of the lanes up to the calling one.
__device__ __forceinline__ int sum_of_lanes_up_to(int value) {
  const int lane = ptx::lane_index();
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = ptx::shuffle(value, lane < distance ? lane : lane - distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// ---- Unions.

struct UnionConfig {
  static constexpr int kThreads = 128;
};

// Shared memory of a CTA: for the blocks of a window, those that are listed as bits, how many are
// listed before each word, and the membership of those that are listed.
struct UnionMemory {
  std::uint32_t listed = 0, before, count, membership;
  std::uint64_t bytes;

  SPARSE_ATTN_HOST_DEVICE UnionMemory(int window_blocks, int num_words) {
    const std::uint32_t words = window_blocks / 32;
    before = 4 * words;
    count = before + 4 * words;
    membership = count + 4;
    bytes = membership + std::uint64_t{4} * window_blocks * num_words;
  }
};

// One CTA per tile. It marks the blocks that any list names, in windows of the blocks if they are
// very many, counts the marks before each, which gives the slots, and then collects the bits of
// each row group.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 12)
    plan_unions(const __grid_constant__ UnionParams p) {
  const int thread = static_cast<int>(threadIdx.x), lane = ptx::lane_index();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.z) * p.heads + blockIdx.y;
  const std::int64_t tile = row * p.num_tiles + blockIdx.x;
  const int first_token = static_cast<int>(blockIdx.x) * p.tile_size;
  const std::int32_t* lists =
      p.indices + row * p.lists_per_head.value * p.num_rows * p.num_slots.value;
  std::int32_t* blocks = p.blocks + tile * p.capacity;
  std::uint32_t* membership =
      p.membership == nullptr ? nullptr : p.membership + tile * p.capacity * p.num_words;

  const UnionMemory memory(p.window_blocks, p.num_words);
  const std::uint32_t base = ptx::shared_base();
  const auto word_at = [&](std::uint32_t place, int i) {
    return ptx::load_shared<std::uint32_t>(base + place + 4 * i);
  };
  // Calls `use(row group, block)` for the blocks in [begin, end) that the tile's lists name.
  const auto for_each_listed = [&](int begin, int end, auto use) {
    for (int i = thread; i < p.num_groups * p.num_slots.value; i += Config::kThreads) {
      const int group = p.num_slots.divide(i), slot = i - group * p.num_slots.value;
      const int tokens = p.lists_per_head.divide(group);
      const int list = group - tokens * p.lists_per_head.value;
      const int list_row = p.q_block_size.divide(first_token + tokens * p.row_group_tokens);
      if (list_row >= p.num_rows) continue;
      const std::int64_t place = static_cast<std::int64_t>(list) * p.num_rows + list_row;
      const int block = ptx::load_global(lists + place * p.num_slots.value + slot);
      if (block >= begin && block < end) use(group, block);
    }
  };

  int num_listed = 0;  // in the windows before
  for (int begin = 0; begin < p.num_kv_blocks; begin += p.window_blocks) {
    const int end = smaller(p.num_kv_blocks, begin + p.window_blocks);
    const int num_words = (end - begin + 31) / 32;
    for (int i = thread; i < num_words; i += Config::kThreads)
      ptx::store_shared<std::uint32_t>(base + memory.listed + 4 * i, 0);
    ptx::sync_threads();  // nothing is marked
    for_each_listed(begin, end, [&](int, int block) {
      const int i = block - begin;
      ptx::atomic_or_shared(base + memory.listed + i / 32 * 4, 1u << (i % 32));
    });
    ptx::sync_threads();  // all marks are there
    if (thread < 32) {
      int total = 0;
      for (int first = 0; first < num_words; first += 32) {
        const int i = first + lane;
        const int marks = i < num_words ? ptx::count_bits(word_at(memory.listed, i)) : 0;
        const int up_to = sum_of_lanes_up_to(marks);
        if (i < num_words) ptx::store_shared(base + memory.before + 4 * i, total + up_to - marks);
        total += ptx::shuffle(up_to, 31);
      }
      if (lane == 0) ptx::store_shared(base + memory.count, total);
    }
    ptx::sync_threads();  // the slots are known
    // Of a marked block, after those of the windows before.
    const auto slot_of = [&](int i) {
      const std::uint32_t below = word_at(memory.listed, i / 32) & ((1u << (i % 32)) - 1);
      return static_cast<int>(word_at(memory.before, i / 32)) + ptx::count_bits(below);
    };
    for (int i = thread; i < end - begin; i += Config::kThreads) {
      if (word_at(memory.listed, i / 32) >> (i % 32) & 1)
        ptx::store_global(blocks + num_listed + slot_of(i), begin + i);
    }
    const int count = static_cast<int>(word_at(memory.count, 0));
    if (membership != nullptr) {
      const int size = count * p.num_words;
      for (int i = thread; i < size; i += Config::kThreads)
        ptx::store_shared<std::uint32_t>(base + memory.membership + 4 * i, 0);
      ptx::sync_threads();  // no row group is a member
      for_each_listed(begin, end, [&](int group, int block) {
        const int word = slot_of(block - begin) * p.num_words + group / 32;
        ptx::atomic_or_shared(base + memory.membership + 4 * word, 1u << (group % 32));
      });
      ptx::sync_threads();  // all members are there
      for (int i = thread; i < size; i += Config::kThreads) {
        ptx::store_global(membership + static_cast<std::int64_t>(num_listed) * p.num_words + i,
                          word_at(memory.membership, i));
      }
    }
    num_listed += count;
    ptx::sync_threads();  // the window's memory may be written again
  }
  for (int i = num_listed + thread; i < p.capacity; i += Config::kThreads)
    ptx::store_global(blocks + i, -1);
  if (membership != nullptr) {
    const std::int64_t size = static_cast<std::int64_t>(p.capacity) * p.num_words;
    for (std::int64_t i = static_cast<std::int64_t>(num_listed) * p.num_words + thread; i < size;
         i += Config::kThreads) {
      ptx::store_global(membership + i, 0u);
    }
  }
  if (thread == 0) ptx::store_global(p.counts + tile, num_listed);
}

// ---- The inverse: a counting sort of (tile, slot) by block.
//
// Neighbouring tiles form a part. Each part counts its blocks; sums over the parts before, and over
// the blocks before, say where the part's entries of a block go. A part then walks its tiles in
// their order. A tile names a block once, so its entries do not meet, and the result does not
// depend on the order in which anything runs.

struct InversionConfig {
  static constexpr int kThreads = 128;
  static constexpr std::uint32_t kSharedBytes = 0;
};

struct Inversion {
  std::int64_t num_entries;
  const std::int32_t* blocks;
  std::int32_t *offsets, *tiles, *slots, *cursors;

  __device__ Inversion(const InversionParams& p, int row)
      : num_entries(static_cast<std::int64_t>(p.num_tiles) * p.capacity),
        blocks(p.blocks + row * num_entries),
        offsets(p.offsets + static_cast<std::int64_t>(row) * (p.num_kv_blocks + 1)),
        tiles(p.tiles + row * num_entries),
        slots(p.slots + row * num_entries),
        cursors(p.cursors + static_cast<std::int64_t>(row) * p.num_parts * p.num_kv_blocks) {}
};

// cursors[part, block]: how often the part names the block.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    count_blocks(const __grid_constant__ InversionParams p) {
  const int part = static_cast<int>(blockIdx.x);
  const Inversion of(p, static_cast<int>(blockIdx.y));
  std::int32_t* cursors = of.cursors + static_cast<std::int64_t>(part) * p.num_kv_blocks;
  for (int block = static_cast<int>(threadIdx.x); block < p.num_kv_blocks;
       block += Config::kThreads) {
    ptx::store_global(cursors + block, 0);
  }
  ptx::sync_threads();  // the counts are 0
  const int first_tile = part * p.tiles_per_part,
            end_tile = smaller(first_tile + p.tiles_per_part, p.num_tiles);
  const std::int64_t end = static_cast<std::int64_t>(end_tile) * p.capacity;
  for (std::int64_t i = static_cast<std::int64_t>(first_tile) * p.capacity + threadIdx.x; i < end;
       i += Config::kThreads) {
    const int block = ptx::load_global(of.blocks + i);
    if (block >= 0 && block < p.num_kv_blocks) ptx::atomic_add_global(cursors + block, 1);
  }
}

// cursors[part, block]: how often the parts before name the block; offsets[block]: how often all
// do.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    sum_over_parts(const __grid_constant__ InversionParams p) {
  constexpr int kTogether = 8;  // loads that do not wait for each other
  const Inversion of(p, static_cast<int>(blockIdx.y));
  const int block = static_cast<int>(blockIdx.x * Config::kThreads + threadIdx.x);
  if (block >= p.num_kv_blocks) return;
  int before = 0;
  for (int first = 0; first < p.num_parts; first += kTogether) {
    std::int32_t* cursors = of.cursors + static_cast<std::int64_t>(first) * p.num_kv_blocks + block;
    int counts[kTogether];
    SPARSE_ATTN_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      counts[i] = first + i < p.num_parts
                      ? ptx::load_global(cursors + static_cast<std::int64_t>(i) * p.num_kv_blocks)
                      : 0;
    }
    SPARSE_ATTN_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < p.num_parts)
        ptx::store_global(cursors + static_cast<std::int64_t>(i) * p.num_kv_blocks, before);
      before += counts[i];
    }
  }
  ptx::store_global(of.offsets + block, before);
}

struct OffsetsConfig {
  static constexpr int kThreads = 1024;
  static constexpr std::uint32_t kSharedBytes = 4 * kThreads / 32;
};

// offsets[block]: how often the blocks before are named.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    sum_over_blocks(const __grid_constant__ InversionParams p) {
  const Inversion of(p, static_cast<int>(blockIdx.x));
  const int thread = static_cast<int>(threadIdx.x), lane = ptx::lane_index(),
            warp = ptx::warp_index();
  const std::uint32_t sums = ptx::shared_base();
  int before = 0;
  for (int first = 0; first <= p.num_kv_blocks; first += Config::kThreads) {
    const int block = first + thread;
    const int count = block < p.num_kv_blocks ? ptx::load_global(of.offsets + block) : 0;
    const int up_to = sum_of_lanes_up_to(count);
    if (lane == 31) ptx::store_shared(sums + 4 * warp, up_to);
    ptx::sync_threads();  // the sums of all warps are there
    const int of_warp = ptx::load_shared<int>(sums + 4 * lane);
    const int up_to_warp = sum_of_lanes_up_to(of_warp);
    const int before_warp = ptx::shuffle(up_to_warp - of_warp, warp);
    if (block <= p.num_kv_blocks)
      ptx::store_global(of.offsets + block, before + before_warp + up_to - count);
    before += ptx::shuffle(up_to_warp, 31);
    ptx::sync_threads();  // the sums may be written again
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    place_entries(const __grid_constant__ InversionParams p) {
  const int part = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Inversion of(p, static_cast<int>(blockIdx.y));
  std::int32_t* cursors = of.cursors + static_cast<std::int64_t>(part) * p.num_kv_blocks;
  const int first_tile = part * p.tiles_per_part,
            end_tile = smaller(first_tile + p.tiles_per_part, p.num_tiles);
  for (int tile = first_tile; tile < end_tile; ++tile) {
    for (int slot = thread; slot < p.capacity; slot += Config::kThreads) {
      const int block =
          ptx::load_global(of.blocks + static_cast<std::int64_t>(tile) * p.capacity + slot);
      if (block < 0 || block >= p.num_kv_blocks) continue;
      const int before = ptx::load_global(cursors + block);
      const std::int64_t place = ptx::load_global(of.offsets + block) + before;
      ptx::store_global(of.tiles + place, tile);
      ptx::store_global(of.slots + place, slot);
      ptx::store_global(cursors + block, before + 1);
    }
    ptx::sync_threads();  // the next tile's entries come after these
  }
  // Places that no entry has, as far as they are the part's own.
  const std::int64_t begin = static_cast<std::int64_t>(first_tile) * p.capacity,
                     end = static_cast<std::int64_t>(end_tile) * p.capacity,
                     used = ptx::load_global(of.offsets + p.num_kv_blocks);
  for (std::int64_t i = (begin < used ? used : begin) + thread; i < end; i += Config::kThreads) {
    ptx::store_global(of.tiles + i, -1);
    ptx::store_global(of.slots + i, -1);
  }
}

}  // namespace sparse_attn
