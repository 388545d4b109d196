// Instructions of compute capability 9.0a: mbarriers, bulk and tensor copies, warpgroups.
//
// They are as late and as early as the hardware may make them: a copy lands at some time drawn from
// the seed, and products are NaN until they have been waited for. An error is
//  - an mbarrier that is used before its initialisation is known to the thread, and fenced if it
//  counts a copy; one whose phase cannot end, because arrivals or bytes are missing or too many; an
//  arrival while nobody has seen the end of the phase before; copies that nobody waits for;
//  - what a copy brings read by a thread that has not waited for its phase, itself or through a
//  barrier; a copy over bytes whose readers are not known to be done;
//  - an operand of a copy or a product that was written by ordinary instructions without
//  fence_async_proxy by the writer, or that is written before a wait for the product;
//  - sums or fragments in registers that no warpgroup_fence has named, or that change between the
//  fence and the wait; a wait that names sums which it does not wait for;
//  - four warps that do not execute the same instructions of a warpgroup;
//  - registers that nobody has released.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "host_sim/simulator.h"

namespace host_sim {

enum class TensorElement { kBFloat16, kFloat16, kFloat32 };

// An array of up to five dimensions, the contiguous one first, and the box that a copy moves.
struct TensorMap {
  TensorElement element;
  int rank;
  const void* base;
  std::uint64_t shape[5];
  std::uint64_t strides[5];  // bytes
  std::uint32_t box[5];
  int swizzle_span;  // 32, 64 or 128 bytes; 0: none
};

// `strides` has rank - 1 elements: the first dimension is contiguous. Raises `Error` where the
// hardware's encoder refuses.
TensorMap make_tensor_map(TensorElement element, int rank, const void* base,
                          const std::uint64_t* shape, const std::uint64_t* strides,
                          const std::uint32_t* box, int swizzle_span);

void mbarrier_init(std::uint32_t barrier, int arrivals, Location location);
void mbarrier_init_fence(Location location);
void mbarrier_arrive(std::uint32_t barrier, std::uint32_t expected_bytes, Location location);
void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity, Location location);

void fence_async_proxy(Location location);

void prefetch_tensor_map(const TensorMap& map, Location location);
void tensor_load(std::uint32_t to, const TensorMap& map, const int* at, int rank,
                 std::uint32_t barrier, Location location);
void bulk_load(std::uint32_t to, const void* from, std::uint32_t bytes, std::uint32_t barrier,
               Location location);
void tensor_store(const TensorMap& map, const int* at, int rank, std::uint32_t from, bool is_added,
                  Location location);
void store_commit(Location location);
void store_wait(int most_pending, bool is_for_reads, Location location);

bool elect_one(Location location);
void set_registers(int count, bool is_increase, Location location);

// An array that stands for registers of the calling thread.
struct Registers {
  void* begin;
  std::size_t bytes;
};
void warpgroup_fence(std::initializer_list<Registers> registers, Location location);
void warpgroup_commit(Location location);
void warpgroup_wait(int most_pending, std::initializer_list<Registers> registers,
                    Location location);

struct WarpgroupProduct {
  float* sums;  // [columns / 8][4]
  int columns;
  const std::uint32_t* a_registers;  // [4], or null: `a` is a descriptor
  std::uint64_t a, b;
  bool is_a_mn_major, is_b_mn_major;
  bool accumulates;
  bool is_bfloat16;  // else float16
};
void warpgroup_multiply(const WarpgroupProduct& product, Location location);

}  // namespace host_sim
