// Conjugate gradients on the CPU: with enough steps every solver has the same answer. (Step by step
// float32 and float64 iterates part, so that fewer steps are compared with nothing.)
#include <gtest/gtest.h>

#include <algorithm>

#include "cpu/gka_cases.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

TEST(ConjugateGradients, ConvergeToTheExactAnswer) {
  for (int64_t T : {1, 16, 65}) {
    for (int64_t K : {5, 64, 100}) {
      CaseSpec spec;
      spec.T = T;
      spec.K = K;
      spec.V = 33;
      spec.ridge_ratio = 0.1;
      spec.seed = 8000 + static_cast<uint64_t>(T * K);
      set_gates(spec, 15);
      Case<float> c(spec);
      GkaOptions options = c.options();
      options.solver = Solver::direct;
      const Case<double> expected = oracle_results(c, options);
      // The largest error after r steps is 2 R^r, R = 0.54 at ratio 0.1: 1e-8.
      options.solver = Solver::cg;
      options.num_iter = 30;
      for (InstructionSet isa : available_instruction_sets()) {
        ForcedInstructionSet forced(isa);
        c.clear_results();
        gka_forward(c.inputs(), c.outputs(), options);
        EXPECT_TRUE(within({"gka_forward cg", name(isa), describe(spec)}, "o", c.o.view(),
                           expected.o.view(), 1e-5));
        gka_backward(c.inputs(), ConstView(), c.output_grads(), c.grads(), options);
        for_each_gradient(c, expected, [&](const char* what, ConstView got, ConstView want) {
          EXPECT_TRUE(
              within({"gka_backward cg", name(isa), describe(spec)}, what, got, want, 1e-4));
        });
        c.clear_results();
        gka_step(c.inputs(), c.outputs(), options);
        EXPECT_TRUE(within({"gka_step cg", name(isa), describe(spec)}, "o", c.o.view(),
                           expected.o.view(), 1e-5));
      }
    }
  }
}

// A solver's answer is checked by what it says, not by how it got there: residuals are recomputed
// from H and x, and the report says which solver had how many chunks.
TEST(Certificate, ResidualAndReportOfEverySolver) {
  CaseSpec spec;
  spec.T = 130;
  spec.K = 40;
  spec.V = 24;
  spec.ridge_ratio = 0.005;
  spec.seed = 8100;
  set_gates(spec, 15);
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    for (Solver solver : {Solver::chebyshev, Solver::direct, Solver::automatic}) {
      Case<float> c(spec);
      GkaOptions options = c.options();
      options.solver = solver;
      options.num_iter = 2;  // by far too few: the certificate must say so, and direct not care
      const GkaReport report = gka_forward(c.inputs(), c.outputs(), options);
      double largest = 0;
      for (double r : c.residual.values()) largest = std::max(largest, r);
      if (solver == Solver::chebyshev) {
        EXPECT_GT(largest, 0.1) << name(solver) << " on " << name(isa);
        EXPECT_EQ(report.direct_solves, 0);
      } else {
        EXPECT_LT(largest, 3e-4) << name(solver) << " on " << name(isa);
        EXPECT_GT(report.direct_solves, 0);
        EXPECT_GT(report.factorizations, 0);
      }
      EXPECT_EQ(report.solves, 2 * 9) << "9 chunks of 2 heads";
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
