// One problem through every kernel of every instruction set, in any dtype, against the float64
// oracle of the same solver and iteration count on the same (already rounded) inputs.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/gka_cases.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {

// What the arithmetic may do to outputs and gradients, relative, at ridge ratios from 0.005 up.
// 16-bit problems are computed in float32. float64 kernels have nothing wider for a sequence's
// first tokens, so they are measured against plain code: naive float32 errs by up to 2.9e-4 there
// on o (docs/numerics.md, section 7), so naive float64 by 2^-29 of that; the kernel and the oracle
// may both, and gradients by four times as much (float32's by ten times). Lone tokens whose query
// hardly meets their key can be worse: ErrorTable.Float64NearNaive has many of them.
template <class T>
inline constexpr double kOutputBound = std::is_same_v<T, double> ? 2 * 0x1p-29 * 2.9e-4 : 1e-5;
template <class T>
inline constexpr double kGradientBound = std::is_same_v<T, double> ? 4 * kOutputBound<T> : 1e-4;

// What the direct solver may add, being compared with the exact answer: a few times its tolerance
// (kDtypeTolerance of the dtype) on outputs and residuals, and ten times that on gradients.
template <class T>
double solver_slack(Solver solver) {
  if (solver != Solver::direct) return 0.0;
  if (std::is_same_v<T, double>) return 1e-9;
  return std::is_same_v<T, float> ? 1e-5 : 1e-4;
}

// The same values in another dtype: what rounding alone makes of them.
inline std::vector<double> rounded(std::vector<double> numbers, DType dtype) {
  for (double& e : numbers) {
    if (dtype == DType::bfloat16) e = BFloat16(e);
    if (dtype == DType::float16) e = Float16(e);
  }
  return numbers;
}

// As within(), where a 16-bit result may also have what rounding the right answer once costs: a
// sum that was rounded twice on the way would not pass.
inline ::testing::AssertionResult rounded_once(const Where& where, const std::string& tensor,
                                               const ConstView& got, const ConstView& expected,
                                               double bound) {
  const std::vector<double> want = values(expected);
  const double rounding = relative_error(rounded(want, got.dtype), want);
  return within(where, tensor, values(got), want, bound + 1.05 * rounding);
}

// Residuals are small differences of numbers near 1: what float32 x leaves of them is about
// 1e-7 / ridge_ratio; beyond that they agree.
template <class T, class G>
::testing::AssertionResult residuals_agree(const Where& where, const Case<T, G>& c,
                                           const Case<double>& expected, Solver solver) {
  const std::vector<double> got = c.residual.values(), want = expected.residual.values();
  const double floor = 7 * kRoundoff<StateOf<T>> / c.spec.ridge_ratio + solver_slack<T>(solver);
  for (size_t i = 0; i < want.size(); ++i) {
    if (!(std::abs(got[i] - want[i]) <= floor + (1e-2 + kRoundoff<G>)*want[i])) {
      return ::testing::AssertionFailure() << text(where, "residual") << ": " << got[i]
                                           << ", expected " << want[i] << " within " << floor;
    }
  }
  return ::testing::AssertionSuccess();
}

// The oracle's gradients where x_t is what the forward saved, rounded to 16 bits: but for a
// sequence's first chunk of `chunk` tokens without a state before it, which the backward solves
// again in float64 (gka_backward_solve.hpp), so that its x_t are as good as the oracle's `own`.
template <class T, class G>
Case<double> oracle_from_saved_x(const Case<T, G>& c, const Case<double>& own, int64_t chunk,
                                 GkaOptions options) {
  Case<double> d = to_double(c);
  const CaseSpec& spec = c.spec;
  Case<double> solved = own;
  for (int64_t n = 0; n < spec.num_sequences() && !spec.h0; ++n) {
    const bool packed = !c.cu_seqlens.empty();
    const int64_t begin = packed ? c.cu_seqlens[static_cast<size_t>(n)] : n * spec.T;
    const int64_t end = packed ? c.cu_seqlens[static_cast<size_t>(n + 1)] : begin + spec.T;
    const int64_t row = spec.H * spec.K;
    for (int64_t i = begin * row; i < std::min(end, begin + chunk) * row; ++i) {
      d.x[i] = solved.x[i];
    }
  }
  options.backend = Backend::reference;
  gka_backward(d.inputs(), d.x.view(), d.output_grads(), d.grads(), options);
  return d;
}

// Forward, decode step and backward of one problem on every instruction set against the oracle.
// Keys, and the states made of them, are multiplied by `key_size`.
template <class T, class G = T>
void check_against_oracle(const CaseSpec& spec, const GkaOptions& base, WorstErrors& worst,
                          double key_size = 1.0) {
  Case<T, G> c(spec);
  if (key_size != 1.0) {
    const auto scale = [](auto& tensor, double by) {
      const std::vector<double> old = tensor.values();
      tensor.fill([&](int64_t i) { return by * old[static_cast<size_t>(i)]; });
    };
    scale(c.k, key_size);
    scale(c.h0, key_size * key_size);
    scale(c.u0, key_size);
    // Else the first token's D would come out at 1 / key_size^3 or be drowned by it.
    scale(c.d_h_final, 1.0 / (key_size * key_size));
  }
  GkaOptions options = base;
  options.ridge_ratio = spec.ridge_ratio;
  options.tolerance = kDtypeTolerance;
  const double slack = solver_slack<T>(options.solver);
  const Case<double> expected = oracle_results(c, options);
  options.backend = Backend::cpu;
  const std::string types =
      std::string(" of ") + name(DTypeOf<T>::value) +
      (std::is_same_v<T, G> ? "" : std::string(" with gates of ") + name(DTypeOf<G>::value));
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    const Where where{"gka_forward" + types, name(isa), describe(spec)};
    c.clear_results();
    const GkaReport report = gka_forward(c.inputs(), c.outputs(), options);
    EXPECT_EQ(report.instruction_set, isa);
    EXPECT_EQ(report.backend, Backend::cpu);
    for_each_output(c, expected, [&](const char* tensor, ConstView got, ConstView want) {
      EXPECT_TRUE(rounded_once(where, tensor, got, want, kOutputBound<T> + slack));
      worst.add(std::string(tensor), relative_error(got, want));
    });
    EXPECT_TRUE(residuals_agree(where, c, expected, options.solver));

    for (bool saved : {true, false}) {
      const Where back{(saved ? "gka_backward (x saved)" : "gka_backward (x solved for)") + types,
                       name(isa), describe(spec)};
      const ConstView x = saved ? ConstView(c.x.view()) : ConstView();
      const bool rounded_x = saved && kIsHalf<G>;
      const Case<double> from_x =
          rounded_x ? oracle_from_saved_x(c, expected, report.chunk_size, options) : Case<double>();
      gka_backward(c.inputs(), x, c.output_grads(), c.grads(), options);
      const auto compare = [&](const char* tensor, ConstView got, ConstView want) {
        EXPECT_TRUE(rounded_once(back, tensor, got, want, kGradientBound<T> + 10 * slack));
        worst.add(std::string(tensor), relative_error(got, want));
      };
      for_each_gradient(c, rounded_x ? from_x : expected, compare);
    }
    EXPECT_TRUE(c.gaps_intact()) << where.operation << ", " << where.problem;

    c.clear_results();
    const Where step{"gka_step" + types, name(isa), describe(spec)};
    gka_step(c.inputs(), c.outputs(), options);
    for_each_output(c, expected, [&](const char* tensor, ConstView got, ConstView want) {
      EXPECT_TRUE(rounded_once(step, tensor, got, want, kOutputBound<T> + slack));
      worst.add("step " + std::string(tensor), relative_error(got, want));
    });
    EXPECT_TRUE(residuals_agree(step, c, expected, options.solver));
    EXPECT_TRUE(c.gaps_intact()) << step.operation << ", " << step.problem;
  }
}

}  // namespace kalmanet::testing
