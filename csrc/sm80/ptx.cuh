// One function per instruction of compute capability 8.0 that matrix kernels need. Fragments and
// addresses are those of the PTX manual, sections "Matrix multiply-accumulate operation using mma
// instruction" and "ldmatrix".
#pragma once

#include "common/ptx.cuh"

namespace sparse_attn::ptx {

// ---- cp.async. What is copied may be read after `copy_wait` by the copying thread, and after a
// barrier by the others.

// 16 bytes of global memory to shared memory, both aligned to 16; zeros if not `is_valid`, and
// nothing is read then.
__device__ __forceinline__ void copy_async16(std::uint32_t to, const void* from,
                                             bool is_valid SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::async_copy(to, from, 16, !is_valid, location);
#else
  const int bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the calling thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_wait(SPARSE_ATTN_ONLY_AT) {
#if SPARSE_ATTN_HOST_SIM
  ::host_sim::async_wait(kPending, location);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i
// / 8, aligned to 16 bytes.

struct Fragment4 {
  std::uint32_t x[4];
};

#if SPARSE_ATTN_HOST_SIM
namespace sim {

struct MatrixLoad {
  std::uint32_t address;
  ::host_sim::Location location;
  Fragment4 result;
};

// Matrix j to register j: lane i has elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4, or of
// column i / 4 if transposed.
template <bool kTransposed>
void load_matrices(void* const* slots) {
  std::uint16_t rows[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& slot = *static_cast<MatrixLoad*>(slots[lane]);
    std::memcpy(
        rows[lane],
        ::host_sim::at_shared(slot.address, 16, ::host_sim::Access::kRead, slot.location, true),
        16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int line = lane / 4, first = 2 * (lane % 4);
      const auto element = [&](int i) {
        return std::uint32_t{kTransposed ? rows[8 * matrix + i][line] : rows[8 * matrix + line][i]};
      };
      static_cast<MatrixLoad*>(slots[lane])->result.x[matrix] = element(first) | element(first + 1)
                                                                                     << 16;
    }
  }
  ::host_sim::counters().operand_bytes_loaded += 32 * 16;
}

template <bool kTransposed>
Fragment4 load_matrices(std::uint32_t address, const char* operation,
                        ::host_sim::Location location) {
  MatrixLoad slot{address, location, {}};
  ::host_sim::rendezvous(kAllLanes, operation, &slot, load_matrices<kTransposed>, location);
  return slot.result;
}

}  // namespace sim
#endif

__device__ __forceinline__ Fragment4 load_matrix(std::uint32_t row SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  return sim::load_matrices<false>(row, "ldmatrix", location);
#else
  Fragment4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x[0]), "=r"(r.x[1]), "=r"(r.x[2]), "=r"(r.x[3])
               : "r"(row)
               : "memory");
  return r;
#endif
}

__device__ __forceinline__ Fragment4 load_matrix_transposed(std::uint32_t row SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  return sim::load_matrices<true>(row, "ldmatrix.trans", location);
#else
  Fragment4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x[0]), "=r"(r.x[1]), "=r"(r.x[2]), "=r"(r.x[3])
               : "r"(row)
               : "memory");
  return r;
#endif
}

// ---- mma.m16n8k16: sums[16, 8] += a[16, 16] b[16, 8], products and sums in float32.

#if SPARSE_ATTN_HOST_SIM
namespace sim {

struct MatrixMultiply {
  float* sums;             // [4]
  const std::uint32_t* a;  // [4]
  const std::uint32_t* b;  // [2]
};

template <class T>
float half_of(std::uint32_t packed, int which) {
  return to_float(T{static_cast<std::uint16_t>(which == 0 ? packed : packed >> 16)});
}

// Lane i, with g = i / 4 and t = i % 4, holds: a[g + 8 (r % 2), 2t + 8 (r / 2) + h] in half h of
// register r of a; b[2t + 8r + h, g] in half h of register r of b; sums[g + 8 (r / 2), 2t + r % 2]
// in register r of the sums.
template <class T>
void multiply(void* const* slots) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& slot = *static_cast<MatrixMultiply*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + h] = half_of<T>(slot.a[r], h);
      for (int r = 0; r < 2; ++r) b[2 * t + 8 * r + h][g] = half_of<T>(slot.b[r], h);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& slot = *static_cast<MatrixMultiply*>(slots[lane]);
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      float sum = slot.sums[r];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      slot.sums[r] = sum;
    }
  }
  ++::host_sim::counters().matrix_instructions;
  ::host_sim::counters().matrix_flops += 2 * 16 * 8 * 16;
}

}  // namespace sim
#endif

template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2] SPARSE_ATTN_AT) {
#if SPARSE_ATTN_HOST_SIM
  sim::MatrixMultiply slot{sums, a, b};
  ::host_sim::rendezvous(kAllLanes, "mma", &slot, sim::multiply<T>, location);
#else
  if constexpr (__is_same(T, BFloat16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace sparse_attn::ptx
