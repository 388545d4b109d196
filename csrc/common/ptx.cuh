// One function per instruction that every architecture has. Device code uses these, and nothing
// else, to touch memory, other threads, or the special function units: on a CPU the same functions
// are those of the simulator.
//
// Shared memory is addressed by 32-bit byte offsets, as the instructions do it.
#pragma once

#include "common/target.h"

#if !SPARSE_ATTN_HOST_SIM
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
// The call's place in the source, which the simulator reports: a last parameter, and what hands it
// on.
#define SPARSE_ATTN_AT
#define SPARSE_ATTN_ONLY_AT
#define SPARSE_ATTN_HERE
// Before a loop whose indices have to be known when it is compiled: registers have no addresses.
#define SPARSE_ATTN_UNROLL _Pragma("unroll")
#define SPARSE_ATTN_NO_UNROLL _Pragma("unroll 1")
#else
#include <array>
#include <bit>
#include <cstring>
#include <source_location>

#include "host_sim/cuda.h"
#include "host_sim/floats.h"
#define SPARSE_ATTN_ONLY_AT std::source_location location = std::source_location::current()
#define SPARSE_ATTN_AT , SPARSE_ATTN_ONLY_AT
#define SPARSE_ATTN_HERE , location
#define SPARSE_ATTN_UNROLL
#define SPARSE_ATTN_NO_UNROLL
#endif

namespace sparse_attn::ptx {

constexpr std::uint32_t kAllLanes = 0xffffffff;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// ---- Global memory. T has 1, 2, 4, 8 or 16 bytes and the pointer is aligned to them.

struct alignas(16) Words4 {
  std::uint32_t x[4];
};

template <class T>
__device__ __forceinline__ T load_global(const T* from SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::check_global(from, sizeof(T), ::host_sim::Access::kRead, location);
#endif
  return *from;
}

template <class T>
__device__ __forceinline__ void store_global(T* to, T value SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::check_global(to, sizeof(T), ::host_sim::Access::kWrite, location);
#endif
  *to = value;
}

// `x`, of which the compiler does not see that it is the same each time: it would compute what
// follows from it before the loop that this is in, and hold it in registers.
__device__ __forceinline__ std::uint32_t computed_here(std::uint32_t x) {
#if !SPARSE_ATTN_HOST_SIM
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Returns what was there before.
__device__ __forceinline__ int atomic_add_global(int* to, int value SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::check_global(to, sizeof(int), ::host_sim::Access::kAtomic, location);
  const int before = *to;
  *to = before + value;
  return before;
#else
  return atomicAdd(to, value);
#endif
}

// ---- Shared memory.

#if !SPARSE_ATTN_HOST_SIM
extern __shared__ __align__(1024) unsigned char shared_memory[];
#endif

// Where the dynamic shared memory starts.
__device__ __forceinline__ std::uint32_t shared_base() {
#if SPARSE_ATTN_HOST_SIM
  return 0;
#else
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_memory));
#endif
}

template <class T>
__device__ __forceinline__ T load_shared(std::uint32_t from SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  T value;
  std::memcpy(&value, ::host_sim::at_shared(from, sizeof(T), ::host_sim::Access::kRead, location),
              sizeof(T));
  return value;
#else
  return *reinterpret_cast<const T*>(__cvta_shared_to_generic(from));
#endif
}

template <class T>
__device__ __forceinline__ void store_shared(std::uint32_t to, T value SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  std::memcpy(::host_sim::at_shared(to, sizeof(T), ::host_sim::Access::kWrite, location), &value,
              sizeof(T));
#else
  *reinterpret_cast<T*>(__cvta_shared_to_generic(to)) = value;
#endif
}

// Sets bits of a word.
__device__ __forceinline__ void atomic_or_shared(std::uint32_t to,
                                                 std::uint32_t bits SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  unsigned char* word = ::host_sim::at_shared(to, 4, ::host_sim::Access::kAtomic, location);
  std::uint32_t value;
  std::memcpy(&value, word, 4);
  value |= bits;
  std::memcpy(word, &value, 4);
#else
  asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(to), "r"(bits) : "memory");
#endif
}

// ---- Other threads.

// All threads of the CTA wait for each other; orders their accesses to shared and global memory.
__device__ __forceinline__ void sync_threads(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::barrier_sync(0, 0, location);
#else
  __syncthreads();
#endif
}

// The warps of a named barrier, 1 to 15, wait for each other; `count` threads, a multiple of 32.
__device__ __forceinline__ void sync_barrier(int id, int count SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::barrier_sync(id, count, location);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

// Arrives at a named barrier for those that wait there, and goes on.
__device__ __forceinline__ void arrive_barrier(int id, int count SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::barrier_arrive(id, count, location);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

__device__ __forceinline__ void sync_warp(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::warp_sync(kAllLanes, location);
#else
  __syncwarp();
#endif
}

#if SPARSE_ATTN_HOST_SIM
namespace sim {

struct Exchange {
  std::uint32_t value;
  int source;
  std::uint32_t result;
};

inline void exchange(void* const* slots) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& own = *static_cast<Exchange*>(slots[lane]);
    own.result = static_cast<Exchange*>(slots[own.source & 31])->value;
  }
}

}  // namespace sim
#endif

// The value of lane `source` of the warp. T has 4 bytes.
template <class T>
__device__ __forceinline__ T shuffle(T value, int source SPARSE_ATTN_AT) {
  static_assert(sizeof(T) == 4);
#if SPARSE_ATTN_HOST_SIM
  sim::Exchange slot{std::bit_cast<std::uint32_t>(value), source, 0};
  ::host_sim::rendezvous(kAllLanes, "shfl", &slot, sim::exchange, location);
  return std::bit_cast<T>(slot.result);
#else
  return __shfl_sync(kAllLanes, value, source);
#endif
}

// The value of the lane whose index differs in the bits of `distance`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int distance SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  return ptx::shuffle(value, lane_index() ^ distance, location);
#else
  return __shfl_xor_sync(kAllLanes, value, distance);
#endif
}

// One bit per lane.
__device__ __forceinline__ std::uint32_t ballot(bool vote SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  struct Slot {
    bool vote;
    std::uint32_t result;
  } slot{vote, 0};
  ::host_sim::rendezvous(
      kAllLanes, "vote", &slot,
      [](void* const* slots) {
        std::uint32_t result = 0;
        for (int lane = 0; lane < 32; ++lane) {
          result |= static_cast<std::uint32_t>(static_cast<Slot*>(slots[lane])->vote) << lane;
        }
        for (int lane = 0; lane < 32; ++lane) static_cast<Slot*>(slots[lane])->result = result;
      },
      location);
  return slot.result;
#else
  return __ballot_sync(kAllLanes, vote);
#endif
}

// ---- Arithmetic.

__device__ __forceinline__ float exp2_approx(float x) {
#if SPARSE_ATTN_HOST_SIM
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float log2_approx(float x) {
#if SPARSE_ATTN_HOST_SIM
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ std::uint32_t bits_of(float x) {
#if SPARSE_ATTN_HOST_SIM
  return std::bit_cast<std::uint32_t>(x);
#else
  return __float_as_uint(x);
#endif
}

__device__ __forceinline__ float float_of(std::uint32_t bits) {
#if SPARSE_ATTN_HOST_SIM
  return std::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

// How many bits are set.
__device__ __forceinline__ int count_bits(std::uint32_t x) {
#if SPARSE_ATTN_HOST_SIM
  return std::popcount(x);
#else
  return __popc(x);
#endif
}

// The index of the highest bit that is set; -1 for 0.
__device__ __forceinline__ int highest_bit(std::uint32_t x) {
#if SPARSE_ATTN_HOST_SIM
  return 31 - std::countl_zero(x);
#else
  return 31 - __clz(static_cast<int>(x));
#endif
}

__device__ __forceinline__ float reciprocal_approx(float x) {
#if SPARSE_ATTN_HOST_SIM
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The two 16-bit floating types, by their bits.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

#if SPARSE_ATTN_HOST_SIM
namespace sim {

inline float to_float(BFloat16 x) { return ::host_sim::float_of_bfloat16(x.bits); }
inline float to_float(Float16 x) { return ::host_sim::float_of_float16(x.bits); }

template <class T>
T round_to(float x);
template <>
inline BFloat16 round_to<BFloat16>(float x) {
  return {::host_sim::bfloat16_of(x)};
}
template <>
inline Float16 round_to<Float16>(float x) {
  return {::host_sim::float16_of(x)};
}

}  // namespace sim
#endif

template <class T>
__device__ __forceinline__ float to_float(T x) {
#if SPARSE_ATTN_HOST_SIM
  return sim::to_float(x);
#else
  if constexpr (sizeof(T) == sizeof(BFloat16) && __is_same(T, BFloat16)) {
    return __bfloat162float(__ushort_as_bfloat16(x.bits));
  } else {
    return __half2float(__ushort_as_half(x.bits));
  }
#endif
}

// Two values rounded to T, `low` in the lower half: how matrix instructions take them.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
#if SPARSE_ATTN_HOST_SIM
  return sim::round_to<T>(low).bits | std::uint32_t{sim::round_to<T>(high).bits} << 16;
#else
  std::uint32_t packed;
  if constexpr (__is_same(T, BFloat16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#endif
}

}  // namespace sparse_attn::ptx
