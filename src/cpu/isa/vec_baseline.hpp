// The vector primitives of any processor: 4 float32 lanes by the compiler's vector extension.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa/half_baseline.hpp"

namespace kalmanet::cpu {

// The same with float64 lanes, 2 a register: for the few sums that float32 cannot hold
// (chebyshev.hpp), and for float64 problems. It is its own Wide: there is nothing wider.
struct BaselineWide {
  using Wide = BaselineWide;
  using Elem = double;
  typedef double Reg __attribute__((vector_size(16)));
  typedef int64_t Int __attribute__((vector_size(16)));
  static constexpr int kWidth = 2;
  static constexpr int kRegisters = 16;

  static Reg zero() { return Reg{}; }
  static Reg set1(double a) { return Reg{a, a}; }
  static Reg load(const double* p) {
    Reg a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static Reg load_f32(const float* p) { return Reg{p[0], p[1]}; }
  static void store(double* p, Reg a) { std::memcpy(p, &a, sizeof a); }
  static void store_f32(float* p, Reg a) {
    p[0] = static_cast<float>(a[0]);
    p[1] = static_cast<float>(a[1]);
  }
  // The first n lanes only, as Baseline's.
  static Reg load_n(const double* p, int64_t n) { return Reg{p[0], n > 1 ? p[1] : 0.0}; }
  static void store_n(double* p, Reg a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = a[i];
  }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }   // a b + c, rounded twice
  static Reg fnma(Reg a, Reg b, Reg c) { return c - a * b; }  // c - a b, rounded twice
  static double sum(Reg a) { return a[0] + a[1]; }
  // a0 b0 and a1 b1.
  static Reg interleave_low(Reg a, Reg b) { return Reg{a[0], b[0]}; }
  static Reg interleave_high(Reg a, Reg b) { return Reg{a[1], b[1]}; }
  // Lane r is the sum of row r's lanes.
  static Reg sum_each(const Reg (&row)[kWidth]) {
    return __builtin_shufflevector(row[0], row[1], 0, 2) +
           __builtin_shufflevector(row[0], row[1], 1, 3);
  }
  // To the nearest integer, |a| < 2^51: adding 1.5 * 2^52 leaves no fraction bits.
  static Reg round(Reg a) {
    const Reg magic = set1(0x1.8p52);
    return (a + magic) - magic;
  }
  // 2^n for integral n in [-1022, 1023]: beside 1.5 2^52 the last bits of a sum are its integer.
  static Reg exp2i(Reg n) {
    const Reg biased = n + (0x1.8p52 + 1023.0);
    Int bits;
    std::memcpy(&bits, &biased, sizeof bits);
    bits <<= 52;
    Reg a;
    std::memcpy(&a, &bits, sizeof a);
    return a;
  }
  // a 2^n for integral n in [-2044, 2046], rounded once.
  static Reg scale2(Reg a, Reg n) {
    const Reg half = round(mul(n, set1(0.5)));
    return mul(mul(a, exp2i(half)), exp2i(sub(n, half)));
  }
  // a where x is negative, else b.
  static Reg if_negative(Reg x, Reg a, Reg b) { return x < zero() ? a : b; }
};

struct Baseline {
  using Wide = BaselineWide;
  using Half = HalfBaseline;
  using Elem = float;
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;       // float32 lanes a register
  static constexpr int kRegisters = 16;  // of x86-64's SSE2; AArch64 has 32

  static Reg zero() { return Reg{}; }
  static Reg set1(float a) { return Reg{a, a, a, a}; }
  static Reg load(const float* p) {
    Reg a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(float* p, Reg a) { std::memcpy(p, &a, sizeof a); }
  static Reg load_f32(const float* p) { return load(p); }
  static void store_f32(float* p, Reg a) { store(p, a); }
  // The first n lanes only, 0 < n <= kWidth: nothing past p[n - 1] is touched; the rest load as 0.
  static Reg load_n(const float* p, int64_t n) {
    Reg a{};
    for (int64_t i = 0; i < n; ++i) a[i] = p[i];
    return a;
  }
  static void store_n(float* p, Reg a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = a[i];
  }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg sqrt(Reg a) {
    return Reg{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])};
  }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }   // a b + c, rounded twice
  static Reg fnma(Reg a, Reg b, Reg c) { return c - a * b; }  // c - a b, rounded twice
  static float sum(Reg a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  // a0 b0 a1 b1 and a2 b2 a3 b3.
  static Reg interleave_low(Reg a, Reg b) { return Reg{a[0], b[0], a[1], b[1]}; }
  static Reg interleave_high(Reg a, Reg b) { return Reg{a[2], b[2], a[3], b[3]}; }
  // Lane r is the sum of row r's lanes.
  static Reg sum_each(const Reg (&row)[kWidth]) {
    const Reg a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5) +
                  __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const Reg b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5) +
                  __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  }
  // To the nearest integer, |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
  static Reg round(Reg a) {
    const Reg magic = set1(12582912.0f);
    return (a + magic) - magic;
  }
  // 2^n for integral n in [-126, 127].
  static Reg exp2i(Reg n) {
    const Int biased = (__builtin_convertvector(n, Int) + 127) << 23;
    Reg a;
    std::memcpy(&a, &biased, sizeof a);
    return a;
  }
  // a 2^n for integral n in [-252, 254], rounded once.
  static Reg scale2(Reg a, Reg n) {
    const Reg half = round(mul(n, set1(0.5f)));
    return mul(mul(a, exp2i(half)), exp2i(sub(n, half)));
  }
  // a where x is negative, else b.
  static Reg if_negative(Reg x, Reg a, Reg b) { return x < zero() ? a : b; }
};

}  // namespace kalmanet::cpu
