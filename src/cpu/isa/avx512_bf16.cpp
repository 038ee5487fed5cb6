// Chebyshev's iteration with bfloat16 products, compiled for AVX-512 with AVX512_BF16 (flags:
// src/cpu/CMakeLists.txt).
#include "cpu/bf16_chebyshev.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/isa/bf16_avx512.hpp"

namespace kalmanet::cpu {

const Bf16Kernels& kernels_avx512_bf16() {
  static constexpr Bf16Kernels table = bf16_kernels_of<Avx512Bf16, Avx512Bf16Products>(true);
  return table;
}

}  // namespace kalmanet::cpu
