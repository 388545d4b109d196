// 16-bit floating types by their bits.
#pragma once

#include <bit>
#include <cstdint>

namespace host_sim {

inline float float_of_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

inline float float_of_float16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31,
                      fraction = bits & 0x3ffu;
  // Those that are subnormal here are not so in 32 bits, and no step on the way may be: XLA's
  // threads take subnormal numbers for zero.
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
  }
  const std::uint32_t wider = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wider << 23 | fraction << 13);
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
