// The key-major walk: which query tiles chose a KV block.
#pragma once

#include "common/ptx.cuh"
#include "common/work_queue.cuh"
#include "params.h"

namespace sparse_attn {

__host__ __device__ inline int num_kv_blocks(const AttentionShape& shape) {
  return static_cast<int>((std::int64_t{shape.kv_len} + shape.kv_block_size - 1) /
                          shape.kv_block_size);
}

// Of a key in [rows, kv_len, num_kv_heads].
__device__ __forceinline__ std::int64_t key_row(const AttentionShape& shape, int row, int kv_head,
                                                int key) {
  return (static_cast<std::int64_t>(row) * shape.kv_len + key) * shape.num_kv_heads + kv_head;
}

// Of a key in [batch, num_kv_heads, kv_len].
__device__ __forceinline__ std::int64_t bias_offset(const AttentionShape& shape, int batch,
                                                    int kv_head, int key) {
  return (static_cast<std::int64_t>(batch) * shape.num_kv_heads + kv_head) * shape.kv_len + key;
}

// A row of partial sums: d_key, d_value, d_key_bias, and one that aligns the next row to 8 bytes.
template <int kHeadDim>
constexpr int kPartialWidth = 2 * kHeadDim + 2;

// A part of a KV block's list of (tile, slot). Blocks have as many parts as their lists need, at
// least one; parts are numbered through, block by block.
class InverseList {
 public:
  struct Entry {
    int tile, slot;  // negative if the plan names a tile or slot that does not exist
  };

  // The list of part `part`.
  __device__ InverseList(const AttentionInputs& in, const InverseParams& inverse, int batch,
                         int kv_head, int part)
      : InverseList(in, inverse, batch, kv_head) {
    // The last block whose parts start at or before this one.
    int low = 0, high = num_kv_blocks_;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_part(middle) <= part ? low : high) = middle;
    }
    set_block(low);
    part_ = part - first_part(low);
    exists_ = part_ >= 0 && part_ < num_parts_ && has_partials();
    if (!exists_) return;
    const std::int64_t begin = ptx::load_global(offsets_ + block_),
                       end = ptx::load_global(offsets_ + block_ + 1);
    const std::int64_t first = begin < 0 ? 0 : begin,
                       last = end < num_entries_ ? end : num_entries_;
    // Not above 0 if there are none.
    const std::int64_t size = (last - first + num_parts_ - 1) / num_parts_;
    first_entry_ = first + part_ * size;
    count_ = last - first_entry_ < size ? last - first_entry_ : size;
  }

  // All parts of a block, without their entries.
  __device__ static InverseList of_block(const AttentionInputs& in, const InverseParams& inverse,
                                         int batch, int kv_head, int block) {
    InverseList list(in, inverse, batch, kv_head);
    list.set_block(block);
    list.exists_ = list.has_partials();
    return list;
  }

  // False for a part that no block has.
  __device__ bool exists() const { return exists_; }
  __device__ int block() const { return block_; }
  __device__ bool is_whole() const { return num_parts_ == 1; }
  __device__ int num_parts() const { return num_parts_; }
  __device__ std::int64_t count() const { return count_; }

  __device__ Entry at(std::int64_t i) const {
    const int tile = ptx::load_global(tiles_ + first_entry_ + i),
              slot = ptx::load_global(slots_ + first_entry_ + i);
    const bool exists = tile >= 0 && tile < num_tiles_ && slot >= 0 && slot < capacity_;
    return exists ? Entry{tile, slot} : Entry{-1, -1};
  }

  // Of a key of this part in [batch, num_kv_heads, num_partials, kv_block_size].
  __device__ std::int64_t partial_row(const AttentionShape& shape, const InverseParams& inverse,
                                      int key) const {
    return (pair_ * inverse.num_partials + first_partial_ + part_) * shape.kv_block_size +
           key % shape.kv_block_size;
  }

 private:
  __device__ InverseList(const AttentionInputs& in, const InverseParams& inverse, int batch,
                         int kv_head)
      : inverse_(&inverse),
        num_kv_blocks_(num_kv_blocks(in.shape)),
        num_tiles_(in.plan.num_tiles),
        capacity_(in.plan.capacity),
        num_entries_(static_cast<std::int64_t>(num_tiles_) * capacity_),
        pair_(static_cast<std::int64_t>(batch) * in.shape.num_kv_heads + kv_head) {
    const int plan_batch = batch % in.plan.plan_batch,
              plan_head = in.plan.plan_heads == 1 ? 0 : kv_head;
    const std::int64_t row = static_cast<std::int64_t>(plan_batch) * in.plan.plan_heads + plan_head;
    offsets_ = inverse.offsets + row * (num_kv_blocks_ + 1);
    parts_ = inverse.parts + row * (num_kv_blocks_ + 1);
    first_partials_ = inverse.first_partials + row * num_kv_blocks_;
    tiles_ = inverse.tiles + row * num_entries_;
    slots_ = inverse.slots + row * num_entries_;
  }

  __device__ int first_part(int block) const { return ptx::load_global(parts_ + block); }
  __device__ void set_block(int block) {
    block_ = block;
    num_parts_ = first_part(block + 1) - first_part(block);
    first_partial_ = ptx::load_global(first_partials_ + block);
  }
  // Whether there is room for the sums of the block's parts, if it has several.
  __device__ bool has_partials() const {
    return num_parts_ == 1 ||
           (first_partial_ >= 0 && first_partial_ <= inverse_->num_partials - num_parts_);
  }

  const InverseParams* inverse_;
  int num_kv_blocks_, num_tiles_, capacity_;
  std::int64_t num_entries_, pair_;
  const std::int32_t *offsets_, *parts_, *first_partials_, *tiles_, *slots_;
  int block_ = 0, num_parts_ = 0, part_ = 0, first_partial_ = 0;
  bool exists_ = false;
  std::int64_t first_entry_ = 0, count_ = 0;
};

// The work of a kernel that is key-major: chunks of keys of a block, for each part of its list.
class KeyChunks : public WorkQueue {
 public:
  static constexpr const char* kKind =
      "chunks of keys (batch * num_kv_heads * (kv_len and parts of split lists) / keys of a chunk)";

  struct Chunk {
    int batch, kv_head, part;
    int first_key;  // in the block
  };

  __device__ KeyChunks(const AttentionBackwardParams& p, int keys)
      : WorkQueue(p.num_taken, count(p, keys)), p_(p), keys_(keys) {}

  // Blocks with several parts have at most as many as there is room for their sums.
  __host__ __device__ static std::int64_t count(const AttentionBackwardParams& p, int keys) {
    return static_cast<std::int64_t>(p.in.shape.batch) * p.in.shape.num_kv_heads *
           per_head(p, keys);
  }

  // All chunks of a head follow each other, because they share rows; first blocks first, as most
  // rows see them.
  __device__ Chunk chunk(int piece) const {
    const auto chunks = static_cast<int>(per_head(p_, keys_));
    const int pair = piece / chunks, heads = p_.in.shape.num_kv_heads,
              per_block = p_.in.shape.kv_block_size / keys_;
    return {pair / heads, pair % heads, piece % chunks / per_block,
            piece % chunks % per_block * keys_};
  }

 private:
  __host__ __device__ static std::int64_t per_head(const AttentionBackwardParams& p, int keys) {
    return (std::int64_t{num_kv_blocks(p.in.shape)} + p.inverse.num_partials) *
           (p.in.shape.kv_block_size / keys);
  }

  const AttentionBackwardParams& p_;
  int keys_;
};

}  // namespace sparse_attn
