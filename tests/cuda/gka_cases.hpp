// What the CUDA room's tests share: problems, and the float64 oracle with the published bounds.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>

#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

// Six combinations of gates, layouts, states and head counts, by turns.
inline CaseSpec small_case(int turn) {
  CaseSpec spec;
  spec.B = 1 + turn % 2;
  spec.T = 6;
  spec.H = 2;
  spec.Hk = turn % 3 == 1 ? 1 : 0;
  spec.Hq = turn % 5 == 2 ? 1 : 0;
  spec.Hv = turn % 7 == 3 ? 1 : 0;
  const int bits = turn * 11 + 7;
  spec.g = bits & 1;
  spec.gk = bits & 2;
  spec.alpha = bits & 4;
  spec.beta = bits & 8;
  spec.ridge_tensor = bits & 16;
  spec.h0 = spec.u0 = turn % 3 != 0;
  spec.strided = turn % 4 == 1;
  spec.ridge_ratio = turn % 2 == 0 ? 0.02 : 0.05;
  spec.seed = 9000 + static_cast<uint64_t>(turn);
  return spec;
}

// The published bounds of docs/numerics.md: 1e-5 for float32 at ridge ratios from 0.005 up (direct:
// 2e-5); float64 what its unit roundoff makes of that, and 16-bit tensors one rounding of what is
// stored in addition. States are float32 sums of products, which are rounded once a token: 16 units
// for what a segment's sums are made of, and what a walk of so many roundings comes to.
template <class T, class G>
void expect_oracle(const Case<T, G>& c, GkaOptions options, const Where& where) {
  Case<double> d = to_double(c);
  d.clear_results();
  options.backend = Backend::reference;
  gka_forward(d.inputs(), d.outputs(), options);
  const bool float64 = std::is_same_v<T, double>;
  const double computed = float64 ? 1e-9 : (options.solver == Solver::direct ? 2e-5 : 1e-5);
  const double state =
      (float64 ? 0x1p-53 : 0x1p-24) * (16 + std::sqrt(static_cast<double>(c.spec.T)));
  EXPECT_TRUE(
      within(where, "o", c.o.view(), d.o.view(), computed + (kIsHalf<T> ? 2 * kRoundoff<T> : 0)));
  EXPECT_TRUE(within(where, "x", c.x.view(), d.x.view(),
                     5 * computed + (kIsHalf<G> ? 2 * kRoundoff<G> : 0)));
  EXPECT_TRUE(within(where, "h_final", c.h_final.view(), d.h_final.view(), state));
  EXPECT_TRUE(within(where, "u_final", c.u_final.view(), d.u_final.view(), state));
  // The certificate is what is left of the system: of chebyshev its truncation, of both rounding.
  const std::vector<double> got = c.residual.values(), want = d.residual.values();
  for (size_t i = 0; i < got.size(); ++i) {
    const double slack = 1e-3 * want[i] + (float64 ? 1e-10 : 1e-4) + 2 * kRoundoff<G> * want[i];
    EXPECT_NEAR(got[i], want[i], slack) << text(where, "residual") << " at " << i;
  }
}

// Gradients: of the same inputs, with x solved for (16-bit results may also have what rounding the
// right answer once costs). The CPU's published bounds (tests/cpu/gka_oracle.hpp): 1e-4 at ridge
// ratios from 0.005 up; direct ten times its tolerance in addition. Or another `bound`.
template <class T, class G>
void expect_oracle_gradients(const Case<T, G>& c, GkaOptions options, const Where& where,
                             WorstErrors& worst, double bound = 0) {
  Case<double> d = to_double(c);
  d.clear_results();
  options.backend = Backend::reference;
  options.arithmetic = Arithmetic::standard;
  gka_backward(d.inputs(), {}, d.output_grads(), d.grads(), options);
  const bool float64 = std::is_same_v<T, double>;
  if (bound == 0) {
    bound = float64 ? 1e-8 : 1e-4;
    if (options.solver == Solver::direct && !float64) bound += 1e-4;
  }
  for_each_gradient(c, d, [&](const char* tensor, ConstView got, ConstView expected) {
    std::vector<double> want = values(expected), rounded = want;
    for (double& e : rounded) {
      if (got.dtype == DType::bfloat16) e = BFloat16(e);
      if (got.dtype == DType::float16) e = Float16(e);
    }
    const double rounding = 1.05 * relative_error(rounded, want);
    EXPECT_TRUE(within(where, tensor, values(got), want, bound + rounding));
    worst.add(std::string(tensor) + (float64 ? " float64" : ""),
              relative_error(values(got), want) - (rounding > 0 ? rounding : 0));
  });
}

}  // namespace kalmanet::testing
