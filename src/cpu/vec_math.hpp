// Elementary functions of whole vector registers: exp, sigmoid, SiLU and its derivative. Templates
// over the vector type, so that every instruction set compiles its own copy.
#pragma once

#include <cstdint>

namespace kalmanet::cpu {

// e^x within 2 ulp where the result is normal. Beyond where it would be (float32: above 88.73,
// float64: above 709.79) it is infinity; far enough below (-103.98, -745.14) it is 0; subnormal
// results are rounded once more, NaN stays NaN.
//
// x = n ln 2 + r with n the nearest integer and |r| <= ln(2)/2; e^r = 1 + r + r^2 q(r).
//
// float32: q is the minimax polynomial of degree 4 for the relative error of the whole, 4.5e-9 with
// its coefficients in float32: a thirteenth of a unit roundoff.
template <class Vec>
[[gnu::always_inline]] inline typename Vec::Reg vec_exp32(typename Vec::Reg x) {
  using Reg = typename Vec::Reg;
  // Beyond these the result is 0 or infinity already. In this order of operands min and max hand a
  // NaN through.
  x = Vec::max(Vec::set1(-104.0f), Vec::min(Vec::set1(89.0f), x));
  const Reg n = Vec::round(Vec::mul(x, Vec::set1(0x1.715476p+0f)));  // 1 / ln 2
  // ln 2 in two parts: the first has 10 bits, so that n times it is exact without a fused
  // operation.
  Reg r = Vec::fnma(n, Vec::set1(0x1.63p-1f), x);
  r = Vec::fnma(n, Vec::set1(-0x1.bd0106p-13f), r);
  Reg q = Vec::set1(0x1.6a23dcp-10f);
  q = Vec::fma(q, r, Vec::set1(0x1.123a24p-7f));
  q = Vec::fma(q, r, Vec::set1(0x1.5558f2p-5f));
  q = Vec::fma(q, r, Vec::set1(0x1.55549p-3f));
  q = Vec::fma(q, r, Vec::set1(0x1.fffffcp-2f));
  const Reg p = Vec::add(Vec::set1(1.0f), Vec::fma(Vec::mul(q, r), r, r));
  return Vec::scale2(p, n);
}

// float64: q is Taylor's, up to r^13 / 13! of the whole; what follows is below r^14 / 14! = 4e-18,
// a twentieth of a unit roundoff.
template <class Vec>
[[gnu::always_inline]] inline typename Vec::Reg vec_exp64(typename Vec::Reg x) {
  using Reg = typename Vec::Reg;
  x = Vec::max(Vec::set1(-746.0), Vec::min(Vec::set1(710.0), x));
  const Reg n = Vec::round(Vec::mul(x, Vec::set1(0x1.71547652b82fep+0)));
  // The first part of ln 2 has 33 bits, and n at most 11.
  Reg r = Vec::fnma(n, Vec::set1(0x1.62e42fefp-1), x);
  r = Vec::fnma(n, Vec::set1(0x1.473de6af278edp-34), r);
  Reg q = Vec::set1(1.0 / 6227020800.0);  // 13!
  q = Vec::fma(q, r, Vec::set1(1.0 / 479001600.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 39916800.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 3628800.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 362880.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 40320.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 5040.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 720.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 120.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 24.0));
  q = Vec::fma(q, r, Vec::set1(1.0 / 6.0));
  q = Vec::fma(q, r, Vec::set1(0.5));
  const Reg p = Vec::add(Vec::set1(1.0), Vec::fma(Vec::mul(q, r), r, r));
  return Vec::scale2(p, n);
}

template <class Vec>
[[gnu::always_inline]] inline typename Vec::Reg vec_exp(typename Vec::Reg x) {
  if constexpr (sizeof(typename Vec::Elem) == sizeof(double)) {
    return vec_exp64<Vec>(x);
  } else {
    return vec_exp32<Vec>(x);
  }
}

// sigmoid(x) and 1 - sigmoid(x) = sigmoid(-x), both to a few ulp. From e^-|x|, which never
// overflows and lets neither of the two be the small difference of large numbers.
template <class Vec>
struct SigmoidPair {
  typename Vec::Reg sigmoid, complement;
};

template <class Vec>
[[gnu::always_inline]] inline SigmoidPair<Vec> vec_sigmoid_pair(typename Vec::Reg x) {
  using Reg = typename Vec::Reg;
  const Reg one = Vec::set1(1.0f);
  const Reg e = vec_exp<Vec>(Vec::min(x, Vec::sub(Vec::zero(), x)));
  const Reg large = Vec::div(one, Vec::add(one, e));
  const Reg small = Vec::mul(e, large);
  return {Vec::if_negative(x, small, large), Vec::if_negative(x, large, small)};
}

template <class Vec>
[[gnu::always_inline]] inline typename Vec::Reg vec_sigmoid(typename Vec::Reg x) {
  using Reg = typename Vec::Reg;
  const Reg one = Vec::set1(1.0f);
  const Reg e = vec_exp<Vec>(Vec::min(x, Vec::sub(Vec::zero(), x)));
  return Vec::div(Vec::if_negative(x, e, one), Vec::add(one, e));
}

// silu(x) = x sigmoid(x)
template <class Vec>
[[gnu::always_inline]] inline typename Vec::Reg vec_silu(typename Vec::Reg x) {
  return Vec::mul(x, vec_sigmoid<Vec>(x));
}

// silu'(x) = s (1 + x (1 - s)), s = sigmoid(x)
template <class Vec>
[[gnu::always_inline]] inline typename Vec::Reg silu_derivative(typename Vec::Reg x,
                                                                const SigmoidPair<Vec>& s) {
  return Vec::mul(s.sigmoid, Vec::fma(x, s.complement, Vec::set1(1.0f)));
}

template <class Vec>
[[gnu::always_inline]] inline typename Vec::Reg vec_silu_derivative(typename Vec::Reg x) {
  return silu_derivative<Vec>(x, vec_sigmoid_pair<Vec>(x));
}

// The functions above over arrays, for the tests of each instruction set: y[i] = f(x[i]), i < n.
template <class S>
struct VecMathKernels {
  void (*exp)(const S* x, S* y, int64_t n);
  void (*sigmoid)(const S* x, S* y, int64_t n);
  void (*silu)(const S* x, S* y, int64_t n);
  void (*silu_derivative)(const S* x, S* y, int64_t n);
};

template <class Vec, typename Vec::Reg (*kFunction)(typename Vec::Reg)>
void map_array(const typename Vec::Elem* x, typename Vec::Elem* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    const int64_t lanes = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    Vec::store_n(y + i, kFunction(Vec::load_n(x + i, lanes)), lanes);
  }
}

template <class Vec>
constexpr VecMathKernels<typename Vec::Elem> vec_math_kernels() {
  return {
      .exp = &map_array<Vec, &vec_exp<Vec>>,
      .sigmoid = &map_array<Vec, &vec_sigmoid<Vec>>,
      .silu = &map_array<Vec, &vec_silu<Vec>>,
      .silu_derivative = &map_array<Vec, &vec_silu_derivative<Vec>>,
  };
}

}  // namespace kalmanet::cpu
