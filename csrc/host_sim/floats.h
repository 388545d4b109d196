// 16-bit floating types by their bits.
#pragma once

#include <bit>
#include <cstdint>

namespace host_sim {

inline float float_of_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

inline float float_of_float16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  // The exponent's bias grows by 112; so do those of subnormal numbers, by a product.
  const float magnitude = (bits & 0x7c00) == 0x7c00
                              ? std::bit_cast<float>(0x7f800000u | (bits & 0x3ffu) << 13)
                              : std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

// To nearest, ties to even.
inline std::uint16_t bfloat16_of(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::uint16_t float16_of(float x) {
  return std::bit_cast<std::uint16_t>(static_cast<_Float16>(x));
}

}  // namespace host_sim
