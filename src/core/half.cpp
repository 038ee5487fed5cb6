// The plain conversions of 16-bit numbers.
#include "core/half.hpp"

#include <bit>
#include <cmath>

namespace kalmanet::core {
namespace {

// float64 to float32 rounded to odd: of the two neighbours of a number that is none, the one whose
// last bit is set. Rounding that to 16 bits gives what rounding the float64 at once would have
// (float32 has more than two bits more than either), where rounding twice to the nearest may not.
float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = nearest;
  if (back == value || std::isnan(value)) return nearest;
  const uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if ((bits & 1) != 0) return nearest;
  // The other neighbour: one step away from zero, or towards it (a zero's is the smallest number).
  if (std::abs(value) > std::abs(back)) return std::bit_cast<float>(bits + 1);
  return std::bit_cast<float>(bits - 1);
}

}  // namespace

float from_bfloat16(uint16_t bits) noexcept {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

float from_float16(uint16_t bits) noexcept {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023u;
  if (exponent == 31) {  // infinity, NaN
    const uint32_t quiet = fraction == 0 ? 0 : 0x400000u;
    return std::bit_cast<float>(sign | 0x7F800000u | quiet | (fraction << 13));
  }
  if (exponent == 0) {  // zero, subnormal: fraction 2^-24, exactly
    const uint32_t magnitude = std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f);
    return std::bit_cast<float>(sign | magnitude);
  }
  return std::bit_cast<float>(sign | ((exponent + 127 - 15) << 23) | (fraction << 13));
}

uint16_t to_bfloat16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  // The upper half's last bit makes a tie go to the even one. A carry goes on into the exponent,
  // and from the largest of them to infinity.
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_float16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  uint32_t result;
  if (magnitude > 0x7F800000) {  // NaN
    result = 0x7E00 | ((magnitude >> 13) & 0x3FF);
  } else if (magnitude >= 0x477FF000) {  // 65520, half way from the largest, and up
    result = 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: subnormal
    // 0.5 has the last place 2^-24, that of the subnormal numbers: the sum is rounded there.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    result = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t rebiased = magnitude - (uint32_t{127 - 15} << 23);
    result = (rebiased + 0xFFF + ((rebiased >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

float load_float(DType dtype, const void* data, int64_t at) noexcept {
  switch (dtype) {
    case DType::bfloat16:
      return from_bfloat16(static_cast<const uint16_t*>(data)[at]);
    case DType::float16:
      return from_float16(static_cast<const uint16_t*>(data)[at]);
    case DType::float32:
      return static_cast<const float*>(data)[at];
    case DType::float64:
      break;
  }
  return static_cast<float>(static_cast<const double*>(data)[at]);
}

double load_element(DType dtype, const void* data, int64_t at) noexcept {
  return dtype == DType::float64 ? static_cast<const double*>(data)[at]
                                 : load_float(dtype, data, at);
}

void store_element(DType dtype, void* data, int64_t at, double value) noexcept {
  switch (dtype) {
    case DType::bfloat16:
      static_cast<uint16_t*>(data)[at] = to_bfloat16(round_to_odd(value));
      return;
    case DType::float16:
      static_cast<uint16_t*>(data)[at] = to_float16(round_to_odd(value));
      return;
    case DType::float32:
      static_cast<float*>(data)[at] = static_cast<float>(value);
      return;
    case DType::float64:
      static_cast<double*>(data)[at] = value;
  }
}

}  // namespace kalmanet::core
