// The vector primitives of AVX-512 (F, VL, DQ, BW and FMA): 16 float32 lanes, 32 registers.
#pragma once

#include <cstdint>

#include "cpu/isa/avx512_intrinsics.hpp"
#include "cpu/isa/half_avx512.hpp"

namespace kalmanet::cpu {

// The same with float64 lanes, 8 a register: for the few sums that float32 cannot hold
// (chebyshev.hpp), and for float64 problems. It is its own Wide: there is nothing wider.
struct Avx512Wide {
  using Wide = Avx512Wide;
  using Elem = double;
  using Reg = __m512d;
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 32;

  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg set1(double a) { return _mm512_set1_pd(a); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static Reg load_f32(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static void store(double* p, Reg a) { _mm512_storeu_pd(p, a); }
  static void store_f32(float* p, Reg a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
  // The first n lanes only, as Avx512's.
  static Reg load_n(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(mask_n(n), p); }
  static void store_n(double* p, Reg a, int64_t n) { _mm512_mask_storeu_pd(p, mask_n(n), a); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }    // a b + c
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm512_fnmadd_pd(a, b, c); }  // c - a b
  static double sum(Reg a) { return _mm512_reduce_add_pd(a); }
  // a0 b0 a1 b1 ... of the lower and of the upper halves.
  static Reg interleave_low(Reg a, Reg b) {
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
  }
  static Reg interleave_high(Reg a, Reg b) {
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
  }
  // Lane r is the sum of row r's lanes.
  static Reg sum_each(const Reg (&row)[kWidth]) {
    Reg pair[4];  // lanes of 128 bits: two rows' sums of two
    for (int i = 0; i < 4; ++i) {
      pair[i] = add(_mm512_unpacklo_pd(row[2 * i], row[2 * i + 1]),
                    _mm512_unpackhi_pd(row[2 * i], row[2 * i + 1]));
    }
    const Reg low = fold(pair[0], pair[1]), high = fold(pair[2], pair[3]);
    return fold(low, high);
  }
  static Reg round(Reg a) {
    return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // a 2^n for integral n, rounded once.
  static Reg scale2(Reg a, Reg n) { return _mm512_scalef_pd(a, n); }
  // a where x is negative, else b (the sign bit decides).
  static Reg if_negative(Reg x, Reg a, Reg b) {
    return _mm512_mask_blend_pd(_mm512_movepi64_mask(_mm512_castpd_si512(x)), b, a);
  }

 private:
  // Lanes of 128 bits: a0 + a1, a2 + a3, b0 + b1, b2 + b3.
  static Reg fold(Reg a, Reg b) {
    return add(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
  }
  static __mmask8 mask_n(int64_t n) { return static_cast<__mmask8>((1u << n) - 1u); }
};

struct Avx512 {
  using Wide = Avx512Wide;
  using Half = HalfAvx512;
  using Elem = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;      // float32 lanes a register
  static constexpr int kRegisters = 32;  // architectural vector registers

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float a) { return _mm512_set1_ps(a); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static Reg load_f32(const float* p) { return load(p); }
  static void store_f32(float* p, Reg a) { store(p, a); }
  // The first n lanes only, 0 < n <= kWidth: nothing past p[n - 1] is touched; the rest load as 0.
  static Reg load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask_n(n), p); }
  static void store_n(float* p, Reg a, int64_t n) { _mm512_mask_storeu_ps(p, mask_n(n), a); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg sqrt(Reg a) { return _mm512_sqrt_ps(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  // a0 b0 a1 b1 ... of the lower and of the upper halves.
  static Reg interleave_low(Reg a, Reg b) {
    return _mm512_permutex2var_ps(
        a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
  }
  static Reg interleave_high(Reg a, Reg b) {
    return _mm512_permutex2var_ps(
        a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
  }
  // Lane r is the sum of row r's lanes.
  static Reg sum_each(const Reg (&row)[kWidth]) {
    Reg quad[4];  // lanes of 128 bits: four rows' sums of four
    for (int i = 0; i < 4; ++i) {
      const Reg* r = row + 4 * i;
      const Reg a = add(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
      const Reg b = add(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
      quad[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return fold(fold(quad[0], quad[1]), fold(quad[2], quad[3]));
  }
  static Reg round(Reg a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^n for integral n in [-126, 127].
  static Reg exp2i(Reg n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }
  // a 2^n for integral n in [-252, 254], rounded once.
  static Reg scale2(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
  // a where x is negative, else b (the sign bit decides).
  static Reg if_negative(Reg x, Reg a, Reg b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
  }

 private:
  // Lanes of 128 bits: a0 + a1, a2 + a3, b0 + b1, b2 + b3.
  static Reg fold(Reg a, Reg b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static __mmask16 mask_n(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
};

}  // namespace kalmanet::cpu
