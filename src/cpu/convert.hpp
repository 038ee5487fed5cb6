// Rows of 16-bit numbers to float32 and back, generic over a vector type; core/half.hpp is the
// plain version.
#pragma once

#include <cstdint>

#include "kalmanet/tensor.hpp"

namespace kalmanet::cpu {

// to[i] = load(from[i * stride]) for i < n, registers at a time where numbers are adjacent.
template <class Vec, class Load>
[[gnu::always_inline]] inline void load_halves_by(const uint16_t* from, int64_t stride, int64_t n,
                                                  float* to, Load load) {
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

template <class Vec, class Store>
[[gnu::always_inline]] inline void store_halves_by(const float* from, int64_t n, uint16_t* to,
                                                   int64_t stride, Store store) {
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

// to[i] = from[i * stride] for i < n: every 16-bit number is a float32.
template <class Vec>
void load_halves(DType dtype, const void* data, int64_t stride, int64_t n, float* to) {
  using Half = typename Vec::Half;
  const auto* from = static_cast<const uint16_t*>(data);
  if (dtype == DType::bfloat16) {
    load_halves_by<Vec>(from, stride, n, to, [](const uint16_t* p) __attribute__((always_inline)) {
      return Half::load_bf16(p);
    });
  } else {
    load_halves_by<Vec>(from, stride, n, to, [](const uint16_t* p) __attribute__((always_inline)) {
      return Half::load_f16(p);
    });
  }
}

// to[i * stride] = from[i] for i < n, rounded to the nearest, ties to even.
template <class Vec>
void store_halves(DType dtype, const float* from, int64_t n, void* data, int64_t stride) {
  using Half = typename Vec::Half;
  using Reg = typename Vec::Reg;
  auto* to = static_cast<uint16_t*>(data);
  if (dtype == DType::bfloat16) {
    store_halves_by<Vec>(from, n, to, stride,
                         [](uint16_t* p, Reg a)
                             __attribute__((always_inline)) { Half::store_bf16(p, a); });
  } else {
    store_halves_by<Vec>(from, n, to, stride,
                         [](uint16_t* p, Reg a)
                             __attribute__((always_inline)) { Half::store_f16(p, a); });
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
