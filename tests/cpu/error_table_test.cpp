// The table of docs/numerics.md, section 6: errors of the float32 kernels by ridge ratio, beside
// those of a naive float32 token loop with the same solver, and the bound that holds below ridge
// 0.005.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "cpu/gka_cases.hpp"
#include "kalmanet/kalmanet.hpp"
#include "reference/run.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

struct Row {
  double o = 0, states = 0, gradients = 0, step = 0;
};

TEST(ErrorTable, OutputsWithinTwiceNaiveFloat32) {
  std::vector<InstructionSet> sets = available_instruction_sets();
  std::printf(
      "worst relative error over T 1, 16, 65, 300, K = V = 64, 128, memory 32 and unlimited, "
      "chebyshev(30)\n"
      "%-8s %-10s %9s %9s %9s %9s\n",
      "ridge", "", "o", "o (step)", "states", "gradients");
  for (double ridge : {0.1, 0.02, 0.005, 0.001, 0.0002}) {
    Row naive;
    std::vector<Row> rows(sets.size());
    for (int64_t T : {1, 16, 65, 300}) {
      for (int64_t K : {64, 128}) {
        for (bool gates : {false, true}) {
          CaseSpec spec;
          spec.T = T;
          spec.K = spec.V = K;
          spec.H = 1;
          set_gates(spec, gates ? 63 - 16 : 0);
          spec.ridge_ratio = ridge;
          spec.seed = 6000 + static_cast<uint64_t>(K + T);
          Case<float> plain(spec);
          const GkaOptions options = plain.options();
          const Case<double> expected = oracle_results(plain, options);
          run_forward<float>(plain, options);
          const double naive_o = relative_error(plain.o.view(), expected.o.view());
          naive.o = std::max(naive.o, naive_o);
          const double bound = ridge >= 0.005 ? 1e-5 : std::max(1e-5, 2 * naive_o);
          for (size_t i = 0; i < sets.size(); ++i) {
            ForcedInstructionSet forced(sets[i]);
            Case<float> c(spec);
            const auto largest = [](double& to, double error) { to = std::max(to, error); };
            gka_forward(c.inputs(), c.outputs(), options);
            EXPECT_TRUE(within({"gka_forward", name(sets[i]), describe(spec)}, "o", c.o.view(),
                               expected.o.view(), bound));
            largest(rows[i].o, relative_error(c.o.view(), expected.o.view()));
            largest(rows[i].states, relative_error(c.h_final.view(), expected.h_final.view()));
            largest(rows[i].states, relative_error(c.u_final.view(), expected.u_final.view()));
            gka_backward(c.inputs(), c.x.view(), c.output_grads(), c.grads(), options);
            for_each_gradient(c, expected, [&](const char*, ConstView got, ConstView want) {
              largest(rows[i].gradients, relative_error(got, want));
            });
            gka_step(c.inputs(), c.outputs(), options);
            EXPECT_TRUE(within({"gka_step", name(sets[i]), describe(spec)}, "o", c.o.view(),
                               expected.o.view(), bound));
            largest(rows[i].step, relative_error(c.o.view(), expected.o.view()));
          }
        }
      }
    }
    for (size_t i = 0; i < sets.size(); ++i) {
      std::printf("%-8g %-10s %9.1e %9.1e %9.1e %9.1e\n", ridge, name(sets[i]), rows[i].o,
                  rows[i].step, rows[i].states, rows[i].gradients);
    }
    std::printf("%-8g %-10s %9.1e\n", ridge, "naive", naive.o);
  }
}

}  // namespace
}  // namespace kalmanet::testing
