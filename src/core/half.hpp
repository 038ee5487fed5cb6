// bfloat16 and float16 as numbers: the plain conversions, one element at a time, that the vector
// code of each instruction set is tested against, and that everything off the hot paths uses.
//
// A 16-bit number is exactly a float32. The other way rounds to the nearest, ties to the even one;
// what is beyond the largest finite number by half its last place or more becomes infinity; results
// too small for a normal number are subnormal, rounded once like all others; a NaN stays a NaN with
// its sign and the upper bits of its payload, made quiet.
#pragma once

#include <cstdint>

#include "kalmanet/tensor.hpp"

namespace kalmanet::core {

// Whether a dtype is one of the two.
constexpr bool is_half(DType dtype) {
  return dtype == DType::bfloat16 || dtype == DType::float16;
}

float from_bfloat16(uint16_t bits) noexcept;
float from_float16(uint16_t bits) noexcept;
uint16_t to_bfloat16(float value) noexcept;
uint16_t to_float16(float value) noexcept;

// Element `at` of an array of any dtype.
double load_element(DType dtype, const void* data, int64_t at) noexcept;
// The same for arrays of at most 32 bits an element.
float load_float(DType dtype, const void* data, int64_t at) noexcept;
// Rounded once, from float64.
void store_element(DType dtype, void* data, int64_t at, double value) noexcept;

}  // namespace kalmanet::core
