// What a tensor copy (TMA) knows of an array in global memory: a `TensorMap`, made on the host and
// given to the kernel as a part of its `const __grid_constant__` parameters.
#pragma once

#include "common/ptx.cuh"

#if SPARSE_ATTN_HOST_SIM
#include "host_sim/hopper.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

namespace sparse_attn {

#if SPARSE_ATTN_HOST_SIM
using TensorMap = ::host_sim::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// In units of 16 bytes, how the bytes of a row are permuted in shared memory: of each line of 128
// bytes, chunk c goes to c ^ (line % 8) for k128, to c ^ (line / 2 % 4) for k64 where lines have 64
// bytes, to c ^ (line / 4 % 2) for k32. In terms of addresses: bits 4-6 ^= bits 7-9 (k128), bits
// 4-5 ^= bits 7-8 (k64), bit 4 ^= bit 7 (k32). The values are those of a matrix descriptor.
enum class Swizzle { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// The bytes after which the pattern repeats: tiles are aligned to them.
constexpr int swizzle_period(Swizzle swizzle) {
  return swizzle == Swizzle::kNone  ? 128
         : swizzle == Swizzle::k128 ? 1024
         : swizzle == Swizzle::k64  ? 512
                                    : 256;
}

#if !SPARSE_ATTN_HOST_SIM
// Asked for at run time, so that the library does not need the driver to be loaded.
inline decltype(&cuTensorMapEncodeTiled) find_tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
    throw std::runtime_error(
        "the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}
#endif

// An array of T (BFloat16, Float16 or float) of `kRank` dimensions, the contiguous one first.
// `strides` are those of the other dimensions, in bytes. A copy moves `box` elements, or those of
// them that exist: the others are read as zeros, and not written. Raises std::runtime_error if the
// hardware cannot do it:
//  - base and strides are multiples of 16 bytes, strides less than 2^40, dimensions 1 to 2^32;
//  - box dimensions are 1 to 256, and the first takes a multiple of 16 bytes; with a swizzle, its
//  32,
//    64 or 128.
template <class T, int kRank>
TensorMap make_tensor_map(const void* base, const std::uint64_t (&shape)[kRank],
                          const std::uint64_t (&strides)[kRank - 1],
                          const std::uint32_t (&box)[kRank], Swizzle swizzle) {
  static_assert(kRank >= 2 && kRank <= 5);
  constexpr bool kIsFloat = __is_same(T, float), kIsBFloat16 = __is_same(T, ptx::BFloat16);
  static_assert(kIsFloat || kIsBFloat16 || __is_same(T, ptx::Float16));
#if SPARSE_ATTN_HOST_SIM
  using ::host_sim::TensorElement;
  constexpr TensorElement kElement = kIsFloat      ? TensorElement::kFloat32
                                     : kIsBFloat16 ? TensorElement::kBFloat16
                                                   : TensorElement::kFloat16;
  constexpr int kSpans[] = {0, 128, 64, 32};
  return ::host_sim::make_tensor_map(kElement, kRank, base, shape, strides, box,
                                     kSpans[static_cast<int>(swizzle)]);
#else
  static const auto encode = find_tensor_map_encoder();
  constexpr CUtensorMapDataType kType = kIsFloat      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                        : kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE,
                                              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B,
                                              CU_TENSOR_MAP_SWIZZLE_32B};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult status =
      encode(&map, kType, kRank, const_cast<void*>(base), shape, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refuses the tensor map: CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
#endif
}

}  // namespace sparse_attn
