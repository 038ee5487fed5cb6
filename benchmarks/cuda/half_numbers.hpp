// Numbers of 16 bits, to and from.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kalmanet::benchmark {

inline uint16_t to_bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline double from_bfloat16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_float16(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  const int exponent = a < 0x1p-14f ? -14 : std::ilogb(a);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));
  return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units));
}
inline double from_float16(uint16_t h) {
  const int exponent = h >> 10 & 31, units = (h & 1023) + (exponent == 0 ? 0 : 1024);
  if (exponent == 31) return NAN;  // (or infinite)
  return std::ldexp(h & 0x8000 ? -units : units, (exponent == 0 ? 1 : exponent) - 25);
}

}  // namespace kalmanet::benchmark
