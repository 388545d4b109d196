// One function per instruction of compute capability 9.0a that matrix kernels need: mbarrier, bulk
// and tensor copies (TMA), wgmma, setmaxnreg. Fragments, descriptors and phases are those of the
// PTX manual.
#pragma once

#include "common/ptx.cuh"
#include "sm90/tensor_map.h"

namespace sparse_attn::ptx {

// ---- mbarrier: 8 bytes of shared memory, aligned to 8. Its phase ends when `arrivals` threads
// have arrived and all bytes that were expected have come; then the next phase begins, with as many
// arrivals. Phases are counted from 0. An arrival releases what its thread did, a wait acquires it.

// By one thread. Before others, or copies, use the barrier: `mbarrier_init_fence` by the same
// thread, then a barrier of all of them.
__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, int arrivals SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::mbarrier_init(barrier, arrivals, location);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// Makes the calling thread's `mbarrier_init` visible to copies.
__device__ __forceinline__ void mbarrier_init_fence(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::mbarrier_init_fence(location);
#else
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                   : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::mbarrier_arrive(barrier, 0, location);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Arrives, and makes the current phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint32_t barrier,
                                                       std::uint32_t bytes SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::mbarrier_arrive(barrier, bytes, location);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// Waits until the current phase is not one of this parity (phase % 2): until the phase ends that
// the caller means, if it is at most one phase behind. At first, parity 1 does not wait.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier,
                                              std::uint32_t parity SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::mbarrier_wait(barrier, parity, location);
#else
  std::uint32_t is_over;
  do {
    asm volatile(
        "{\n\t"
        ".reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t"
        "}"
        : "=r"(is_over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (is_over == 0);
#endif
}

// ---- The asynchronous proxy: copies below, and operands that wgmma takes from shared memory.

// What the calling thread wrote to shared memory by ordinary instructions can be read by copies and
// wgmma, its own and, after a barrier, others'. Every thread that wrote calls it, before the
// barrier.
__device__ __forceinline__ void fence_async_proxy(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::fence_async_proxy(location);
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- Copies by one thread. Coordinates are elements, the contiguous dimension first, and may be
// negative or beyond the array. The copy has the shape of the map's box, dense in shared memory and
// then swizzled, and its address there is a multiple of the swizzle's period.

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::prefetch_tensor_map(map, location);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// Global to shared memory. Elements outside of the array are zeros, and count as bytes that come.
// `barrier` is told of the bytes, and the copy may be read after a wait for its phase.
template <int kRank>
__device__ __forceinline__ void tensor_load(std::uint32_t to, const TensorMap& map,
                                            const int (&at)[kRank],
                                            std::uint32_t barrier SPARSE_ATTN_AT) {
  static_assert(kRank >= 2 && kRank <= 5);
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::tensor_load(to, map, at, kRank, barrier, location);
#else
#define SPARSE_ATTN_LOAD(rank, names, ...)                                                     \
  asm volatile("cp.async.bulk.tensor." #rank                                                   \
               "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" names \
               "}], [%2];" ::"r"(to),                                                          \
               "l"(&map), "r"(barrier), __VA_ARGS__                                            \
               : "memory")
  if constexpr (kRank == 2) {
    SPARSE_ATTN_LOAD(2, "%3, %4", "r"(at[0]), "r"(at[1]));
  } else if constexpr (kRank == 3) {
    SPARSE_ATTN_LOAD(3, "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  } else if constexpr (kRank == 4) {
    SPARSE_ATTN_LOAD(4, "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  } else {
    SPARSE_ATTN_LOAD(5, "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                     "r"(at[4]));
  }
#undef SPARSE_ATTN_LOAD
#endif
}

// So many bytes of global memory, a multiple of 16, between addresses that are multiples of 16.
__device__ __forceinline__ void bulk_load(std::uint32_t to, const void* from, std::uint32_t bytes,
                                          std::uint32_t barrier SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::bulk_load(to, from, bytes, barrier, location);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

#if !SPARSE_ATTN_HOST_SIM
#define SPARSE_ATTN_STORE(operation, rank, names, ...)                                             \
  asm volatile(operation ".async.bulk.tensor." #rank "d.global.shared::cta" SPARSE_ATTN_STORE_KIND \
                         ".tile.bulk_group [%0, {" names "}], [%1];" ::"l"(&map),                  \
               "r"(from), __VA_ARGS__                                                              \
               : "memory")
#define SPARSE_ATTN_STORES(operation)                                                         \
  if constexpr (kRank == 2) {                                                                 \
    SPARSE_ATTN_STORE(operation, 2, "%2, %3", "r"(at[0]), "r"(at[1]));                        \
  } else if constexpr (kRank == 3) {                                                          \
    SPARSE_ATTN_STORE(operation, 3, "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]));        \
  } else if constexpr (kRank == 4) {                                                          \
    SPARSE_ATTN_STORE(operation, 4, "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]),     \
                      "r"(at[3]));                                                            \
  } else {                                                                                    \
    SPARSE_ATTN_STORE(operation, 5, "%2, %3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), \
                      "r"(at[3]), "r"(at[4]));                                                \
  }
#endif

// Shared to global memory; elements outside of the array are not written. Belongs to the calling
// thread's open group of copies.
template <int kRank>
__device__ __forceinline__ void tensor_store(const TensorMap& map, const int (&at)[kRank],
                                             std::uint32_t from SPARSE_ATTN_AT) {
  static_assert(kRank >= 2 && kRank <= 5);
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::tensor_store(map, at, kRank, from, false, location);
#else
#define SPARSE_ATTN_STORE_KIND ""
  SPARSE_ATTN_STORES("cp")
#undef SPARSE_ATTN_STORE_KIND
#endif
}

// As `tensor_store`, but adds to what is in global memory, element by element, atomically and in
// any order. 16-bit elements are rounded to nearest after each addition.
template <int kRank>
__device__ __forceinline__ void tensor_add(const TensorMap& map, const int (&at)[kRank],
                                           std::uint32_t from SPARSE_ATTN_AT) {
  static_assert(kRank >= 2 && kRank <= 5);
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::tensor_store(map, at, kRank, from, true, location);
#else
#define SPARSE_ATTN_STORE_KIND ".add"
  SPARSE_ATTN_STORES("cp.reduce")
#undef SPARSE_ATTN_STORE_KIND
#endif
}

#if !SPARSE_ATTN_HOST_SIM
#undef SPARSE_ATTN_STORE
#undef SPARSE_ATTN_STORES
#endif

// Ends a group of the calling thread's stores.
__device__ __forceinline__ void store_commit(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::store_commit(location);
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the calling thread's latest groups have not yet read what they
// store: then shared memory may be written again.
template <int kPending>
__device__ __forceinline__ void store_wait_read(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::store_wait(kPending, true, location);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits until at most `kPending` of the calling thread's latest groups have not yet written.
template <int kPending>
__device__ __forceinline__ void store_wait(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::store_wait(kPending, false, location);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- stmatrix: 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix
// i / 8, aligned to 16 bytes, and in x[j] elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of
// matrix j: sums of a product, packed in pairs.

#if SPARSE_ATTN_HOST_SIM
namespace sim {

struct MatrixStore {
  std::uint32_t address;
  const std::uint32_t* x;  // [4]
  ::host_sim::Location location;
};

template <bool kTransposed>
void store_matrices(void* const* slots) {
  std::uint16_t rows[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const std::uint32_t pair = static_cast<MatrixStore*>(slots[lane])->x[matrix];
      for (int h = 0; h < 2; ++h) {
        const int line = lane / 4, i = 2 * (lane % 4) + h;
        rows[8 * matrix + (kTransposed ? i : line)][kTransposed ? line : i] =
            static_cast<std::uint16_t>(pair >> (16 * h));
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& slot = *static_cast<MatrixStore*>(slots[lane]);
    std::memcpy(
        ::host_sim::at_shared(slot.address, 16, ::host_sim::Access::kWrite, slot.location, true),
        rows[lane], 16);
  }
}

}  // namespace sim
#endif

__device__ __forceinline__ void store_matrix(std::uint32_t row,
                                             const std::uint32_t (&x)[4] SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  sim::MatrixStore slot{row, x, location};
  ::host_sim::rendezvous(kAllLanes, "stmatrix", &slot, sim::store_matrices<false>, location);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#endif
}

// x[j] has elements of a column, not of a row.
__device__ __forceinline__ void store_matrix_transposed(
    std::uint32_t row, const std::uint32_t (&x)[4] SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  sim::MatrixStore slot{row, x, location};
  ::host_sim::rendezvous(kAllLanes, "stmatrix.trans", &slot, sim::store_matrices<true>, location);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#endif
}

// ---- Warps and warpgroups.

// True in one lane of the warp, always the same one, and not known which.
__device__ __forceinline__ bool elect_one(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  return ::host_sim::elect_one(location);
#else
  std::uint32_t is_elected;
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "elect.sync _|p, %1;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t"
      "}"
      : "=r"(is_elected)
      : "r"(kAllLanes));
  return is_elected != 0;
#endif
}

// From now on, each thread of the warpgroup has at most so many registers: 24 to 256, a multiple of
// 8. The rest can be taken by other warpgroups of the CTA. All four warps call it. Needs a kernel
// with __launch_bounds__(threads, blocks): then a thread starts with 65536 / (threads * blocks)
// registers, rounded down to a multiple of 8. Without such bounds the assembler ignores it.
template <int kRegisters>
__device__ __forceinline__ void release_registers(SPARSE_ATTN_ONLY_AT) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::set_registers(kRegisters, false, location);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Waits for registers that others release, and takes them.
template <int kRegisters>
__device__ __forceinline__ void take_registers(SPARSE_ATTN_ONLY_AT) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::set_registers(kRegisters, true, location);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- wgmma.m64nNk16: sums[64, N] += a[64, 16] b[16, N], products of 16-bit floats, sums in
// float32, by the 128 threads of four warps, the first of which is a multiple of 4. Asynchronous:
//
//   warpgroup_fence(sums, ...);      // all registers that the products use, as they are now
//   warpgroup_multiply<T>(sums, a, b, ...);  // any number; products of the same sums are in order
//   warpgroup_commit();
//   warpgroup_wait<0>(sums, ...);    // the sums that are read next
//
// Between fence and wait no thread touches the registers, and none writes the operands in shared
// memory. Sums that no wait names stay undefined: the compiler would not know when they change.
//
// Thread i of the warpgroup, with w = i / 32, g = i % 32 / 4 and t = i % 4, holds sums[16 w + g +
// 8 (r / 2), 8 c + 2 t + r % 2] in x[c][r], as mma.m16n8k16 has them, and a[16 w + g + 8 (r % 2),
// 2 t + 8 (r / 2) + h] in half h of register r of a fragment of a.

// Of two dimensions of an operand in shared memory, the one that is contiguous.
enum class Major { kK = 0, kMN = 1 };

// Where an operand lies: [rows, 16] for a, [columns, 16] for b, both called [mn, k] here. In
// elements of 16 bits, before swizzling, with `leading` and `stride` in bytes, multiples of 16:
//   K-major, kNone: (mn, k) at mn / 8 * stride + k / 8 * leading + mn % 8 * 16 + k % 8 * 2.
//   K-major, swizzled: (mn, k) at mn / 8 * stride + mn % 8 * span + k * 2; leading is not used.
//   MN-major, kNone: (mn, k) at mn / 8 * stride + k / 8 * leading + k % 8 * 16 + mn % 8 * 2.
//   MN-major, swizzled: (mn, k) at mn / (span / 2) * leading + k / 8 * stride + k % 8 * span +
//     mn % (span / 2) * 2.
// where span is the swizzle's 32, 64 or 128 bytes. Then the address bits are swizzled as those of
// tensor copies are, so tiles that these have written, rows of span bytes, fit: for K-major
// `stride` is 8 * span; for MN-major `stride` is 8 * span, and `leading` the distance of two tiles
// of span / 2 columns. The next 16 k of the same tile are 32 bytes further if K-major, and 2 *
// stride bytes if MN-major.
__host__ __device__ __forceinline__ constexpr std::uint64_t matrix_descriptor(
    std::uint32_t address, std::uint32_t leading, std::uint32_t stride,
    Swizzle swizzle SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  if (((address | leading | stride) & ~0x3fff0u) != 0)
    ::host_sim::fail(location, "the numbers of a matrix descriptor are multiples of 16 below 2^18");
#endif
  return static_cast<std::uint64_t>(address >> 4) | static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(stride >> 4) << 32 | static_cast<std::uint64_t>(swizzle) << 62;
}

// The same layout, so many bytes further, a multiple of 16.
__host__ __device__ __forceinline__ constexpr std::uint64_t advance_descriptor(
    std::uint64_t descriptor, std::uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// In place of an array of registers where there is none.
struct NoRegisters {};

#if SPARSE_ATTN_HOST_SIM
namespace sim {

inline ::host_sim::Registers registers(NoRegisters&) { return {nullptr, 0}; }
template <class X, std::size_t kCount>
::host_sim::Registers registers(X (&x)[kCount]) {
  static_assert(sizeof(std::remove_all_extents_t<X>) == 4);
  return {x, sizeof(x)};
}

}  // namespace sim
#else
// The compiler must have the registers ready here, and takes it that they change.
__device__ __forceinline__ void touch(NoRegisters&) {}
__device__ __forceinline__ void touch(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void touch(std::uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class X, std::size_t kCount>
__device__ __forceinline__ void touch(X (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount); ++i) touch(x[i]);
}
#endif

// Orders what was done with these registers, arrays of float or std::uint32_t, before the products
// that follow.
template <class A = NoRegisters, class B = NoRegisters, class C = NoRegisters,
          class D = NoRegisters>
__device__ __forceinline__ void warpgroup_fence(
    A&& a = {}, B&& b = {}, C&& c = {}, D&& d = {} SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::warpgroup_fence(
      {sim::registers(a), sim::registers(b), sim::registers(c), sim::registers(d)}, location);
#else
  touch(a);
  touch(b);
  touch(c);
  touch(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
__device__ __forceinline__ void warpgroup_commit(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::warpgroup_commit(location);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the latest groups are under way. Of the others, the sums that
// are named here can be read.
template <int kPending, class A = NoRegisters, class B = NoRegisters, class C = NoRegisters,
          class D = NoRegisters>
__device__ __forceinline__ void warpgroup_wait(
    A&& a = {}, B&& b = {}, C&& c = {}, D&& d = {} SPARSE_ATTN_AT) {
  static_assert(kPending >= 0 && kPending <= 7);
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::warpgroup_wait(
      kPending, {sim::registers(a), sim::registers(b), sim::registers(c), sim::registers(d)},
      location);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  touch(a);
  touch(b);
  touch(c);
  touch(d);
#endif
}

#if !SPARSE_ATTN_HOST_SIM
// Operands of the assembler, four for eight columns, and their numbers.
#define SPARSE_ATTN_ROWS_1(c) "+f"(sums[c][0]), "+f"(sums[c][1]), "+f"(sums[c][2]), "+f"(sums[c][3])
#define SPARSE_ATTN_ROWS_2(c) SPARSE_ATTN_ROWS_1(c), SPARSE_ATTN_ROWS_1(c + 1)
#define SPARSE_ATTN_ROWS_4(c) SPARSE_ATTN_ROWS_2(c), SPARSE_ATTN_ROWS_2(c + 2)
#define SPARSE_ATTN_ROWS_8(c) SPARSE_ATTN_ROWS_4(c), SPARSE_ATTN_ROWS_4(c + 4)
#define SPARSE_ATTN_ROWS_12(c) SPARSE_ATTN_ROWS_8(c), SPARSE_ATTN_ROWS_4(c + 8)
#define SPARSE_ATTN_ROWS_16(c) SPARSE_ATTN_ROWS_8(c), SPARSE_ATTN_ROWS_8(c + 8)
#define SPARSE_ATTN_ROWS_24(c) SPARSE_ATTN_ROWS_16(c), SPARSE_ATTN_ROWS_8(c + 16)
#define SPARSE_ATTN_ROWS_32(c) SPARSE_ATTN_ROWS_16(c), SPARSE_ATTN_ROWS_16(c + 16)
#define SPARSE_ATTN_NAMES_4 "%0, %1, %2, %3"
#define SPARSE_ATTN_NAMES_8 SPARSE_ATTN_NAMES_4 ", %4, %5, %6, %7"
#define SPARSE_ATTN_NAMES_16 SPARSE_ATTN_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SPARSE_ATTN_NAMES_32                                                      \
  SPARSE_ATTN_NAMES_16                                                            \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
  "%31"
#define SPARSE_ATTN_NAMES_48                                                      \
  SPARSE_ATTN_NAMES_32                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47"
#define SPARSE_ATTN_NAMES_64                                                      \
  SPARSE_ATTN_NAMES_48                                                            \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63"
#define SPARSE_ATTN_NAMES_96                                                      \
  SPARSE_ATTN_NAMES_64                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, " \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "   \
  "%94, %95"
#define SPARSE_ATTN_NAMES_128                                                      \
  SPARSE_ATTN_NAMES_96                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "   \
  "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
  "%122, %123, %124, %125, %126, %127"
// The numbers of the operands that come after the sums.
#define SPARSE_ATTN_WGMMA_SHAPES(X)                                                \
  X(8, SPARSE_ATTN_NAMES_4, SPARSE_ATTN_ROWS_1, 4, 5, 6, 7, 8, 9, 10)              \
  X(16, SPARSE_ATTN_NAMES_8, SPARSE_ATTN_ROWS_2, 8, 9, 10, 11, 12, 13, 14)         \
  X(32, SPARSE_ATTN_NAMES_16, SPARSE_ATTN_ROWS_4, 16, 17, 18, 19, 20, 21, 22)      \
  X(64, SPARSE_ATTN_NAMES_32, SPARSE_ATTN_ROWS_8, 32, 33, 34, 35, 36, 37, 38)      \
  X(96, SPARSE_ATTN_NAMES_48, SPARSE_ATTN_ROWS_12, 48, 49, 50, 51, 52, 53, 54)     \
  X(128, SPARSE_ATTN_NAMES_64, SPARSE_ATTN_ROWS_16, 64, 65, 66, 67, 68, 69, 70)    \
  X(192, SPARSE_ATTN_NAMES_96, SPARSE_ATTN_ROWS_24, 96, 97, 98, 99, 100, 101, 102) \
  X(256, SPARSE_ATTN_NAMES_128, SPARSE_ATTN_ROWS_32, 128, 129, 130, 131, 132, 133, 134)
#define SPARSE_ATTN_WGMMA_SHARED(type, columns, names, rows, i0, i1, i2, i3, i4)                  \
  asm volatile(                                                                                   \
      "{\n\t"                                                                                     \
      ".reg .pred p;\n\t"                                                                         \
      "setp.ne.b32 p, %" #i2                                                                      \
      ", 0;\n\t"                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, %" #i0 \
      ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4                                                      \
      ";\n\t"                                                                                     \
      "}"                                                                                         \
      : rows(0)                                                                                   \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)), "n"(static_cast<int>(kMajorA)),       \
        "n"(static_cast<int>(kMajorB)))
#define SPARSE_ATTN_WGMMA_REGISTERS(type, columns, names, rows, i0, i1, i2, i3, i4, i5, i6)        \
  asm volatile(                                                                                    \
      "{\n\t"                                                                                      \
      ".reg .pred p;\n\t"                                                                          \
      "setp.ne.b32 p, %" #i5                                                                       \
      ", 0;\n\t"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, {%" #i0 \
      ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6                                  \
      ";\n\t"                                                                                      \
      "}"                                                                                          \
      : rows(0)                                                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)),    \
        "n"(static_cast<int>(kMajorB)))
#endif

template <class T>
__host__ __device__ constexpr bool is_wgmma_shape(int columns) {
  if (!__is_same(T, BFloat16) && !__is_same(T, Float16)) return false;
  for (int known : {8, 16, 32, 64, 96, 128, 192, 256}) {
    if (columns == known) return true;
  }
  return false;
}

// a and b in shared memory, by their descriptors. Without `accumulates`, sums = a b.
template <class T, Major kMajorA, Major kMajorB, int kEights>
__device__ __forceinline__ void warpgroup_multiply(float (&sums)[kEights][4], std::uint64_t a,
                                                   std::uint64_t b,
                                                   bool accumulates SPARSE_ATTN_AT) {
  static_assert(is_wgmma_shape<T>(8 * kEights));
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::warpgroup_multiply({.sums = &sums[0][0],
                                  .columns = 8 * kEights,
                                  .a_registers = nullptr,
                                  .a = a,
                                  .b = b,
                                  .is_a_mn_major = kMajorA == Major::kMN,
                                  .is_b_mn_major = kMajorB == Major::kMN,
                                  .accumulates = accumulates,
                                  .is_bfloat16 = std::is_same_v<T, BFloat16>},
                                 location);
#else
#define SPARSE_ATTN_CASE(columns, names, rows, i0, i1, i2, i3, i4, i5, i6)      \
  if constexpr (8 * kEights == columns && __is_same(T, BFloat16))               \
    SPARSE_ATTN_WGMMA_SHARED("bf16", columns, names, rows, i0, i1, i2, i3, i4); \
  if constexpr (8 * kEights == columns && __is_same(T, Float16))                \
    SPARSE_ATTN_WGMMA_SHARED("f16", columns, names, rows, i0, i1, i2, i3, i4);
  SPARSE_ATTN_WGMMA_SHAPES(SPARSE_ATTN_CASE)
#undef SPARSE_ATTN_CASE
#endif
}

// a in registers, which stay as they are until the wait.
template <class T, Major kMajorB, int kEights>
__device__ __forceinline__ void warpgroup_multiply(float (&sums)[kEights][4],
                                                   const std::uint32_t (&a)[4], std::uint64_t b,
                                                   bool accumulates SPARSE_ATTN_AT) {
  static_assert(is_wgmma_shape<T>(8 * kEights));
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::warpgroup_multiply({.sums = &sums[0][0],
                                  .columns = 8 * kEights,
                                  .a_registers = a,
                                  .a = 0,
                                  .b = b,
                                  .is_a_mn_major = false,
                                  .is_b_mn_major = kMajorB == Major::kMN,
                                  .accumulates = accumulates,
                                  .is_bfloat16 = std::is_same_v<T, BFloat16>},
                                 location);
#else
#define SPARSE_ATTN_CASE(columns, names, rows, ...)                         \
  if constexpr (8 * kEights == columns && __is_same(T, BFloat16))           \
    SPARSE_ATTN_WGMMA_REGISTERS("bf16", columns, names, rows, __VA_ARGS__); \
  if constexpr (8 * kEights == columns && __is_same(T, Float16))            \
    SPARSE_ATTN_WGMMA_REGISTERS("f16", columns, names, rows, __VA_ARGS__);
  SPARSE_ATTN_WGMMA_SHAPES(SPARSE_ATTN_CASE)
#undef SPARSE_ATTN_CASE
#endif
}

}  // namespace sparse_attn::ptx
