// Every function of sm90/ptx.cuh, to see that nvcc turns them into the instructions that they are
// named after.
#include "sm90/ptx.cuh"

namespace sparse_attn {

// Sums of every width, with both sources of a.
template <class T, int kColumns>
__global__ void multiply(float* to) {
  const std::uint32_t base = ptx::shared_base();
  const std::uint64_t k_major = ptx::matrix_descriptor(base, 0, 1024, Swizzle::k128);
  const std::uint64_t mn_major = ptx::matrix_descriptor(base + 8192, 8192, 1024, Swizzle::k128);
  float sums[kColumns / 8][4];
  std::uint32_t a[4] = {1, 2, 3, 4};
  using ptx::Major;
  ptx::warpgroup_fence(sums, a);
  ptx::warpgroup_multiply<T, Major::kK, Major::kMN>(sums, k_major, mn_major, false);
  ptx::warpgroup_multiply<T, Major::kMN, Major::kK>(sums, mn_major,
                                                    ptx::advance_descriptor(k_major, 32), true);
  ptx::warpgroup_multiply<T, Major::kMN>(sums, a, mn_major, threadIdx.y == 0);
  ptx::warpgroup_multiply<T, Major::kK>(sums, a, k_major, true);
  ptx::warpgroup_commit();
  ptx::warpgroup_wait<0>(sums);
  for (int c = 0; c < kColumns / 8; ++c) {
    for (int i = 0; i < 4; ++i) ptx::store_global(to + 128 * (4 * c + i) + threadIdx.x, sums[c][i]);
  }
}

#define SPARSE_ATTN_INSTANTIATE(columns)                             \
  template __global__ void multiply<ptx::BFloat16, columns>(float*); \
  template __global__ void multiply<ptx::Float16, columns>(float*);
SPARSE_ATTN_INSTANTIATE(8)
SPARSE_ATTN_INSTANTIATE(16)
SPARSE_ATTN_INSTANTIATE(32)
SPARSE_ATTN_INSTANTIATE(64)
SPARSE_ATTN_INSTANTIATE(96)
SPARSE_ATTN_INSTANTIATE(128)
SPARSE_ATTN_INSTANTIATE(192)
SPARSE_ATTN_INSTANTIATE(256)

template <int kRank>
__global__ void __launch_bounds__(256, 1)
    copy(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
         const void* bytes, int x) {
  const std::uint32_t base = ptx::shared_base(), barrier = base + 65536;
  int at[kRank] = {x};
  at[kRank - 1] = -1;
  if (threadIdx.x < 128) {
    ptx::release_registers<24>();
    if (threadIdx.x < 32 && ptx::elect_one()) {
      ptx::prefetch_tensor_map(from);
      ptx::mbarrier_init(barrier, 1);
      ptx::mbarrier_init_fence();
      ptx::mbarrier_arrive_expect(barrier, 32768 + 16);
      ptx::tensor_load(base, from, at, barrier);
      ptx::bulk_load(base + 32768, bytes, 16, barrier);
    }
    return;
  }
  ptx::take_registers<240>();
  ptx::mbarrier_wait(barrier, x & 1);
  ptx::mbarrier_arrive(barrier);
  ptx::store_matrix(base + 16 * threadIdx.x, {1, 2, 3, 4});
  ptx::store_matrix_transposed(base + 16384 + 16 * threadIdx.x, {5, 6, 7, 8});
  ptx::fence_async_proxy();
  ptx::sync_barrier(1, 128);
  if (threadIdx.x == 128) {
    ptx::tensor_store(to, at, base);
    ptx::tensor_add(to, at, base + 16384);
    ptx::store_commit();
    ptx::store_wait_read<1>();
    ptx::store_wait<0>();
  }
}

template __global__ void copy<2>(const __grid_constant__ TensorMap,
                                 const __grid_constant__ TensorMap, const void*, int);
template __global__ void copy<3>(const __grid_constant__ TensorMap,
                                 const __grid_constant__ TensorMap, const void*, int);
template __global__ void copy<4>(const __grid_constant__ TensorMap,
                                 const __grid_constant__ TensorMap, const void*, int);
template __global__ void copy<5>(const __grid_constant__ TensorMap,
                                 const __grid_constant__ TensorMap, const void*, int);

// The host's side.
TensorMap map_of(const ptx::BFloat16* keys) {
  return make_tensor_map<ptx::BFloat16, 3>(keys, {128, 2, 1000}, {256, 512}, {64, 1, 64},
                                           Swizzle::k128);
}

}  // namespace sparse_attn
