// Every function of the two ptx.cuh in one kernel, to see that nvcc turns them into the
// instructions that they are named after.
#include "sm80/ptx.cuh"

namespace sparse_attn {

template <class T>
__global__ void use_every_instruction(const T* from, float* to, int* counter) {
  const std::uint32_t base = ptx::shared_base(), own = base + 16 * threadIdx.x;
  ptx::copy_async16(own, from + 8 * threadIdx.x, ptx::lane_index() < 30);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  ptx::sync_threads();
  const ptx::Fragment4 a = ptx::load_matrix(own);
  const ptx::Fragment4 b = ptx::load_matrix_transposed(own);
  float sums[4] = {ptx::to_float(ptx::load_global(from)), 0, 0, 0};
  ptx::multiply_add<T>(sums, a.x, {b.x[0], b.x[1]});
  ptx::sync_warp();
  ptx::atomic_or_shared(own, ptx::count_bits(ptx::bits_of(sums[2])));
  ptx::store_shared(own, ptx::pack<T>(sums[0], ptx::exp2_approx(sums[1])));
  ptx::sync_barrier(1, 64);
  ptx::arrive_barrier(2, 96);
  const bool is_odd = ptx::load_shared<std::uint32_t>(own ^ 16) & 1;
  const float sum = ptx::shuffle_xor(ptx::shuffle(sums[2], 3), 1) + ptx::log2_approx(sums[3]) +
                    ptx::float_of(ptx::highest_bit(ptx::bits_of(sums[1])));
  ptx::store_global(
      to + ptx::atomic_add_global(counter, 1),
      sum + static_cast<float>(ptx::ballot(is_odd)) + static_cast<float>(ptx::warp_index()));
}

template __global__ void use_every_instruction(const ptx::BFloat16*, float*, int*);
template __global__ void use_every_instruction(const ptx::Float16*, float*, int*);

}  // namespace sparse_attn
