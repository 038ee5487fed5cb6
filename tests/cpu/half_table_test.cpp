// What 16-bit tensors cost: results of 16-bit problems against the float64 oracle on the numbers
// before they were rounded, beside what rounding inputs and outputs alone costs (the float64 oracle
// on the rounded inputs, its results rounded once). docs/numerics.md, section 8 has the tables.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/gka_oracle.hpp"

namespace kalmanet::testing {
namespace {

CaseSpec table_spec(double ridge, double memory) {
  CaseSpec spec;
  spec.T = 400;
  spec.H = 1;
  spec.K = spec.V = 64;
  spec.g = spec.gk = spec.same_gate = spec.alpha = spec.beta = true;
  spec.ridge_ratio = ridge;
  spec.memory = memory;
  spec.seed = 26000;
  return spec;
}

// One result: what rounding alone costs, and what ours comes to.
struct Cost {
  double rounding = 0, ours = 0;
  double ratio() const { return ours / rounding; }
  void take_worse(const Cost& other) {
    if (rounding == 0 || other.ratio() > ratio()) *this = other;
  }
};

Cost cost(const ConstView& got, const ConstView& from_rounded, const ConstView& exact) {
  const std::vector<double> truth = values(exact);
  return {relative_error(rounded(values(from_rounded), got.dtype), truth),
          relative_error(values(got), truth)};
}

template <class T, class G>
void check(const CaseSpec& spec, const char* isa) {
  Case<T, G> c(spec);
  const GkaOptions options = c.options();
  Case<double> exact(spec);  // the same random numbers, not rounded
  exact = oracle_results(exact, options);
  const Case<double> from_rounded = oracle_results(c, options);

  gka_forward(c.inputs(), c.outputs(), options);
  const Cost o = cost(c.o.view(), from_rounded.o.view(), exact.o.view());
  // x is solved for again: saved in 16 bits it would be one more rounded input.
  gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), options);
  Cost gradient;
  std::string which;
  std::vector<ConstView> rounded_views, exact_views;
  for_each_gradient(from_rounded, exact, [&](const char*, ConstView a, ConstView b) {
    rounded_views.push_back(a);
    exact_views.push_back(b);
  });
  size_t i = 0;
  for_each_gradient(c, exact, [&](const char* tensor, ConstView got, ConstView) {
    const Cost one = cost(got, rounded_views[i], exact_views[i]);
    ++i;
    if (which.empty() || one.ratio() > gradient.ratio()) which = tensor;
    gradient.take_worse(one);
  });
  gka_step(c.inputs(), c.outputs(), options);
  const Cost step = cost(c.o.view(), from_rounded.o.view(), exact.o.view());

  std::printf("%-9s %-8s %6g %7g  %8.1e %8.1e %5.2f  %8.1e %5.2f  %8.1e %8.1e %5.2f %s\n",
              name(DTypeOf<T>::value), name(DTypeOf<G>::value), spec.ridge_ratio, spec.memory,
              o.rounding, o.ours, o.ratio(), step.ours, step.ratio(), gradient.rounding,
              gradient.ours, gradient.ratio(), which.c_str());
  const Where where{"16-bit problem", isa, describe(spec)};
  EXPECT_LE(o.ratio(), 2) << text(where, "o");
  EXPECT_LE(step.ratio(), 2) << text(where, "o (step)");
  EXPECT_LE(gradient.ratio(), 2) << text(where, which);
}

TEST(HalfTable, WithinTwiceWhatRoundingAloneCosts) {
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    std::printf(
        "T=400 K=V=64, every gate, chebyshev(30), %s: relative errors, rounding alone and ours\n"
        "%-9s %-8s %6s %7s  %8s %8s %5s  %8s %5s  %8s %8s %5s\n",
        name(isa), "q, k, v", "gates", "ridge", "memory", "o: alone", "ours", "ratio", "step",
        "ratio", "gradient", "ours", "ratio");
    for (double ridge : {0.1, 0.02, 0.005}) {
      for (double memory : {20.0, 200.0, 5000.0}) {
        const CaseSpec spec = table_spec(ridge, memory);
        check<BFloat16, BFloat16>(spec, name(isa));
        check<Float16, Float16>(spec, name(isa));
        check<BFloat16, float>(spec, name(isa));
      }
    }
  }
}

// Why the header says to keep x in float32: the gradients from an x rounded to 16 bits, the worst
// of them over what rounding the other inputs and the results costs.
template <class T>
double worst_gradient_ratio(const CaseSpec& spec, const ConstView& x, Case<T, float>& c,
                            const Case<double>& from_rounded, const Case<double>& exact) {
  gka_backward(c.inputs(), x, c.output_grads(), c.grads(), c.options());
  double worst = 0;
  std::vector<ConstView> views;
  for_each_gradient(from_rounded, exact,
                    [&](const char*, ConstView a, ConstView) { views.push_back(a); });
  size_t i = 0;
  for_each_gradient(c, exact, [&](const char*, ConstView got, ConstView truth) {
    worst = std::max(worst, cost(got, views[i++], truth).ratio());
  });
  EXPECT_TRUE(std::isfinite(worst)) << describe(spec);
  return worst;
}

TEST(HalfTable, SavedSolutions) {
  std::printf("worst gradient over rounding alone, x saved in: bfloat16, float32; solved again\n");
  for (double ridge : {0.1, 0.02, 0.005}) {
    for (double memory : {20.0, 5000.0}) {
      const CaseSpec spec = table_spec(ridge, memory);
      Case<BFloat16, float> c(spec);
      Case<double> exact(spec);
      exact = oracle_results(exact, c.options());
      const Case<double> from_rounded = oracle_results(c, c.options());
      gka_forward(c.inputs(), c.outputs(), c.options());
      const Tensor<BFloat16> narrow = c.x.as<BFloat16>();
      const double in_half = worst_gradient_ratio(spec, narrow.view(), c, from_rounded, exact);
      const double in_float =
          worst_gradient_ratio(spec, std::as_const(c.x).view(), c, from_rounded, exact);
      const double again = worst_gradient_ratio(spec, {}, c, from_rounded, exact);
      std::printf("ridge %-6g memory %-5g  %6.2f %6.2f %6.2f\n", ridge, memory, in_half, in_float,
                  again);
      EXPECT_LE(in_float, 2) << describe(spec);
      EXPECT_LE(again, 2) << describe(spec);
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
