// Products of bfloat16 numbers by AVX512_BF16's instruction, for bf16_chebyshev.hpp: 32 of them,
// summed in pairs into 16 float32 lanes.
#pragma once

#include <cstdint>

#include "cpu/isa/vec_avx512.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/rows.hpp"

namespace kalmanet::cpu {

// A type of its own, so that no code compiled with these instructions bears a name that avx512.cpp
// uses too (docs/architecture.md).
struct Avx512Bf16 : Avx512 {};

// A pair of rows is one row of words, 16 lanes a register: row 2p in the lower half of each word.
struct Avx512Bf16Products {
  using Reg = __m512;
  using Word = uint32_t;
  static constexpr int64_t kRowsOfPair = 1;

  static KALMANET_INLINE void store_pair(Word* to, int64_t /*ld*/, Reg even, Reg odd) {
    // 16 words of `even`, then 16 of `odd`; interleaved.
    const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
  }
  // An instruction's latency is 6 cycles and two start in one, so at least 12 accumulators are
  // needed: a tile has 16, and 8 were measured at three quarters of its speed.
  template <int kRows>
  static KALMANET_INLINE void accumulate(Reg (&acc)[kRows][1], const Word* a, int64_t ld,
                                         int64_t pairs, const Word* y) {
    for (int64_t p = 0; p < pairs; ++p) {
      const auto yp = reinterpret_cast<__m512bh>(_mm512_loadu_si512(y + p * kLanes));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512i b = _mm512_set1_epi32(static_cast<int>(a[p * ld + r]));
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], yp, reinterpret_cast<__m512bh>(b));
      }
    }
  }
};

}  // namespace kalmanet::cpu
