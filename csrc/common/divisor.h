// Division by a number that is known when a kernel is launched, without a divide instruction.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPARSE_ATTN_HOST_DEVICE __host__ __device__
#else
#define SPARSE_ATTN_HOST_DEVICE
#endif

namespace sparse_attn {

// Floors n / value for 0 <= n < 2^31. The multiplier is 2^shift / value, rounded up by less than 1;
// with value <= 2^(shift - 31) that makes the product of n and the multiplier too large by less
// than 2^shift / value, which no floor notices.
struct Divisor {
  int value = 1;
  int shift = 31;
  std::uint32_t multiplier = 1u << 31;

  Divisor() = default;
  explicit Divisor(int positive) : value(positive) {
    while ((std::int64_t{1} << (shift - 31)) < value) ++shift;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + value - 1) / value);
  }

  SPARSE_ATTN_HOST_DEVICE int divide(int n) const {
    return static_cast<int>(
        static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * multiplier >> shift);
  }
};

}  // namespace sparse_attn
