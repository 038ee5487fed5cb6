// The direct solver's table (docs/numerics.md, section 9): errors of the float32 kernels against
// the exact float64 oracle, beside those of a plain float32 Cholesky factorisation a token.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/gka_cases.hpp"
#include "kalmanet/kalmanet.hpp"
#include "reference/run.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

// Worst over a row's problems: of the output (chunked and step by step) and of the gradients.
struct Errors {
  double o = 0, step = 0, gradients = 0;
};

struct Row {
  double ridge, memory, correlation;
};

CaseSpec spec_of(const Row& row, int64_t T, int64_t K) {
  CaseSpec spec;
  spec.T = T;
  spec.H = 1;
  spec.K = spec.V = K;
  spec.ridge_ratio = row.ridge;
  spec.memory = row.memory;
  spec.g = spec.gk = spec.same_gate = row.memory > 0;
  spec.alpha = spec.beta = true;
  spec.key_correlation = row.correlation;
  spec.seed = 7000 + static_cast<uint64_t>(K + T);
  return spec;
}

double worst_gradient(const Case<float>& c, const Case<double>& expected) {
  double worst = 0;
  for_each_gradient(c, expected, [&](const char*, ConstView got, ConstView want) {
    worst = std::max(worst, relative_error(got, want));
  });
  return worst;
}

TEST(DirectTable, WithinTwicePlainFloat32Cholesky) {
  const std::vector<InstructionSet> sets = available_instruction_sets();
  std::printf(
      "worst relative error over T 1, 16, 65, 200 and K = V = 64, 128; direct, tolerance 1e-5\n"
      "%-7s %-7s %-5s | %9s %9s %9s | plain Cholesky: %9s %9s\n",
      "ridge", "memory", "corr", "o", "o (step)", "gradients", "o", "gradients");
  for (double ridge : {0.1, 0.02, 0.005, 0.001, 0.0001}) {
    for (double memory : {8.0, 32.0, 256.0, 0.0}) {
      for (double correlation : {0.0, 0.99}) {
        Errors worst, plain;
        for (int64_t K : {64, 128}) {
          for (int64_t T : {1, 16, 65, 200}) {
            const CaseSpec spec = spec_of({ridge, memory, correlation}, T, K);
            Case<float> naive(spec);
            GkaOptions options = naive.options();
            options.solver = Solver::direct;
            const Case<double> expected = oracle_results(naive, options);
            run_forward<float>(naive, options);
            const double naive_o = relative_error(naive.o.view(), expected.o.view());
            run_backward<float>(naive, options);
            const double naive_gradient = worst_gradient(naive, expected);
            plain.o = std::max(plain.o, naive_o);
            plain.gradients = std::max(plain.gradients, naive_gradient);
            for (InstructionSet isa : sets) {
              ForcedInstructionSet forced(isa);
              Case<float> c(spec);
              const double bound = std::max(2e-5, 2 * naive_o);
              gka_forward(c.inputs(), c.outputs(), options);
              EXPECT_TRUE(within({"gka_forward direct", name(isa), describe(spec)}, "o", c.o.view(),
                                 expected.o.view(), bound));
              worst.o = std::max(worst.o, relative_error(c.o.view(), expected.o.view()));
              gka_backward(c.inputs(), ConstView(), c.output_grads(), c.grads(), options);
              for_each_gradient(c, expected, [&](const char* what, ConstView got, ConstView want) {
                const double gradient_bound = std::max(2e-4, 2 * naive_gradient);
                EXPECT_TRUE(within({"gka_backward direct", name(isa), describe(spec)}, what, got,
                                   want, gradient_bound));
              });
              worst.gradients = std::max(worst.gradients, worst_gradient(c, expected));
              gka_step(c.inputs(), c.outputs(), options);
              EXPECT_TRUE(within({"gka_step direct", name(isa), describe(spec)}, "o", c.o.view(),
                                 expected.o.view(), bound));
              worst.step = std::max(worst.step, relative_error(c.o.view(), expected.o.view()));
            }
          }
        }
        std::printf("%-7g %-7s %-5g | %9.1e %9.1e %9.1e | %16s %9.1e %9.1e\n", ridge,
                    memory > 0 ? std::to_string(static_cast<int>(memory)).c_str() : "all",
                    correlation, worst.o, worst.step, worst.gradients, "", plain.o,
                    plain.gradients);
      }
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
