// The vector primitives of AVX2 with FMA and F16C: 8 float32 lanes, 16 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/isa/half_avx2.hpp"

namespace kalmanet::cpu {

// The same with float64 lanes, 4 a register: for the few sums that float32 cannot hold
// (chebyshev.hpp), and for float64 problems. It is its own Wide: there is nothing wider.
struct Avx2Wide {
  using Wide = Avx2Wide;
  using Elem = double;
  using Reg = __m256d;
  static constexpr int kWidth = 4;
  static constexpr int kRegisters = 16;

  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg set1(double a) { return _mm256_set1_pd(a); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static Reg load_f32(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static void store(double* p, Reg a) { _mm256_storeu_pd(p, a); }
  static void store_f32(float* p, Reg a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a)); }
  // The first n lanes only, as Avx2's.
  static Reg load_n(const double* p, int64_t n) { return _mm256_maskload_pd(p, mask_n(n)); }
  static void store_n(double* p, Reg a, int64_t n) { _mm256_maskstore_pd(p, mask_n(n), a); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }    // a b + c
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm256_fnmadd_pd(a, b, c); }  // c - a b
  static double sum(Reg a) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  // a0 b0 a1 b1 ... of the lower and of the upper halves.
  static Reg interleave_low(Reg a, Reg b) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
  }
  static Reg interleave_high(Reg a, Reg b) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
  }
  // Lane r is the sum of row r's lanes.
  static Reg sum_each(const Reg (&row)[kWidth]) {
    const Reg a = add(_mm256_unpacklo_pd(row[0], row[1]), _mm256_unpackhi_pd(row[0], row[1]));
    const Reg b = add(_mm256_unpacklo_pd(row[2], row[3]), _mm256_unpackhi_pd(row[2], row[3]));
    return add(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31));
  }
  static Reg round(Reg a) {
    return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^n for integral n in [-1022, 1023]: beside 1.5 2^52 the last bits of a sum are its integer.
  static Reg exp2i(Reg n) {
    const Reg biased = _mm256_add_pd(n, _mm256_set1_pd(0x1.8p52 + 1023.0));
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52));
  }
  // a 2^n for integral n in [-2044, 2046], rounded once.
  static Reg scale2(Reg a, Reg n) {
    const Reg half = round(mul(n, set1(0.5)));
    return mul(mul(a, exp2i(half)), exp2i(sub(n, half)));
  }
  // a where x is negative, else b (the sign bit decides).
  static Reg if_negative(Reg x, Reg a, Reg b) { return _mm256_blendv_pd(b, a, x); }

 private:
  static __m256i mask_n(int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
};

struct Avx2 {
  using Wide = Avx2Wide;
  using Half = HalfAvx2;
  using Elem = float;
  using Reg = __m256;
  static constexpr int kWidth = 8;       // float32 lanes a register
  static constexpr int kRegisters = 16;  // architectural vector registers

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float a) { return _mm256_set1_ps(a); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  static Reg load_f32(const float* p) { return load(p); }
  static void store_f32(float* p, Reg a) { store(p, a); }
  // The first n lanes only, 0 < n <= kWidth: nothing past p[n - 1] is touched; the rest load as 0.
  static Reg load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, mask_n(n)); }
  static void store_n(float* p, Reg a, int64_t n) { _mm256_maskstore_ps(p, mask_n(n), a); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg sqrt(Reg a) { return _mm256_sqrt_ps(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
  static float sum(Reg a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // a0 b0 a1 b1 ... of the lower and of the upper halves.
  static Reg interleave_low(Reg a, Reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static Reg interleave_high(Reg a, Reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
  // Lane r is the sum of row r's lanes.
  static Reg sum_each(const Reg (&row)[kWidth]) {
    Reg quad[2];  // lanes of 128 bits: four rows' sums of four
    for (int i = 0; i < 2; ++i) {
      const Reg* r = row + 4 * i;
      const Reg a = add(_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
      const Reg b = add(_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
      quad[i] = add(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    }
    return add(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
               _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
  }
  static Reg round(Reg a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^n for integral n in [-126, 127].
  static Reg exp2i(Reg n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  // a 2^n for integral n in [-252, 254], rounded once.
  static Reg scale2(Reg a, Reg n) {
    const Reg half = round(mul(n, set1(0.5f)));
    return mul(mul(a, exp2i(half)), exp2i(sub(n, half)));
  }
  // a where x is negative, else b (the sign bit decides).
  static Reg if_negative(Reg x, Reg a, Reg b) { return _mm256_blendv_ps(b, a, x); }

 private:
  static __m256i mask_n(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }
};

}  // namespace kalmanet::cpu
