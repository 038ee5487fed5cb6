// Rows of 16-bit numbers to float32 and back, generic over a vector type; core/half.hpp is the
// plain version.
#pragma once

#include <cstdint>

#include "kalmanet/tensor.hpp"

namespace kalmanet::cpu {

// to[i] = from[i * stride] for i < n: every 16-bit number is a float32.
template <class Vec>
void load_halves(DType dtype, const void* data, int64_t stride, int64_t n, float* to) {
  const auto* from = static_cast<const uint16_t*>(data);
  const auto load = [dtype](const uint16_t* p) __attribute__((always_inline)) {
    return dtype == DType::bfloat16 ? Vec::Half::load_bf16(p) : Vec::Half::load_f16(p);
  };
  int64_t i = 0;
  if (stride == 1) {
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::store(to + i, load(from + i));
  }
  for (; i < n; i += Vec::kWidth) {
    const int64_t lanes = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    uint16_t few[Vec::kWidth] = {};
    for (int64_t j = 0; j < lanes; ++j) few[j] = from[(i + j) * stride];
    Vec::store_n(to + i, load(few), lanes);
  }
}

// to[i * stride] = from[i] for i < n, rounded to the nearest, ties to even.
template <class Vec>
void store_halves(DType dtype, const float* from, int64_t n, void* data, int64_t stride) {
  auto* to = static_cast<uint16_t*>(data);
  const auto store = [dtype](uint16_t* p, typename Vec::Reg a) __attribute__((always_inline)) {
    dtype == DType::bfloat16 ? Vec::Half::store_bf16(p, a) : Vec::Half::store_f16(p, a);
  };
  int64_t i = 0;
  if (stride == 1) {
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(to + i, Vec::load(from + i));
  }
  for (; i < n; i += Vec::kWidth) {
    const int64_t lanes = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    uint16_t few[Vec::kWidth];
    store(few, Vec::load_n(from + i, lanes));
    for (int64_t j = 0; j < lanes; ++j) to[(i + j) * stride] = few[j];
  }
}

// The two over arrays, for what is compiled for no instruction set of its own.
struct ConvertKernels {
  void (*load)(DType dtype, const void* from, int64_t stride, int64_t n, float* to);
  void (*store)(DType dtype, const float* from, int64_t n, void* to, int64_t stride);
};

template <class Vec>
constexpr ConvertKernels convert_kernels() {
  return {.load = &load_halves<Vec>, .store = &store_halves<Vec>};
}

}  // namespace kalmanet::cpu
