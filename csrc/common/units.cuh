// Where units and blocks of keys lie, and which of them a query at some position sees or keeps.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace sparse_attn {

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

// How many units a query sees: the first ones, up to the last that ends at or before its position.
__device__ __forceinline__ int num_visible(const UnitParams& units, bool is_causal, int position) {
  if (!is_causal || units.count == 0) return units.count;
  if (position < units.size - 1) return 0;
  return smaller(units.stride.divide(position - (units.size - 1)), units.count - 1) + 1;
}

// The units that overlap a block: [first, end), empty where a block lies between units.
struct UnitRange {
  int first, end;

  __device__ UnitRange(const UnitParams& units, const Divisor& block_size, int block) {
    const int begin = block * block_size.value;
    first = begin < units.size ? 0 : units.stride.divide(begin - units.size) + 1;
    end = smaller(units.stride.divide(begin + (block_size.value - 1)), units.count - 1) + 1;
  }
};

// The blocks that a unit overlaps: [first, end).
struct BlockRange {
  int first, end;

  __device__ BlockRange(const UnitParams& units, const Divisor& block_size, int unit) {
    const int begin = unit * units.stride.value;
    first = block_size.divide(begin);
    end = block_size.divide(begin + (units.size - 1)) + 1;
  }
};

// How many tokens a unit and a block that overlap have in common.
__device__ __forceinline__ int num_shared_tokens(const UnitParams& units, const Divisor& block_size,
                                                 int unit, int block) {
  const int unit_begin = unit * units.stride.value, block_begin = block * block_size.value;
  return smaller(unit_begin + units.size, block_begin + block_size.value) -
         larger(unit_begin, block_begin);
}

// How many blocks, from the first, have or may have a visible unit: up to the last that overlaps
// the last of `num_visible` units.
__device__ __forceinline__ int num_scored_blocks(const UnitParams& units, const Divisor& block_size,
                                                 int num_visible) {
  return num_visible == 0 ? 0 : BlockRange(units, block_size, num_visible - 1).end;
}

// The blocks that a query keeps whatever their scores are: the sinks [0, num_sinks), and the local
// ones [local_begin, local_end).
struct ForcedBlocks {
  int num_sinks, local_begin, local_end;

  __device__ ForcedBlocks(const SelectionParams& p, int position) {
    const int own = position < 0 ? -1 : p.block_size.divide(position);
    local_end = smaller(own, p.num_blocks - 1) + 1;
    num_sinks = smaller(p.num_sink_blocks, p.is_causal ? local_end : p.num_blocks);
    local_begin = smaller(larger(own - p.num_local_blocks + 1, num_sinks), local_end);
  }
  __device__ bool has(int block) const {
    return block < num_sinks || (block >= local_begin && block < local_end);
  }
  __device__ int count() const { return num_sinks + local_end - local_begin; }
};

}  // namespace sparse_attn
