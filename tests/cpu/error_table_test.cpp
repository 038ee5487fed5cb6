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

// float64 problems have no wider oracle. Naive float32 code's error scaled by the precisions'
// ratio, 2^-29, is what naive float64 code's is; kernel and oracle are measured together: 2. The
// chunked form rounds a token's norm and its operator apart, which the iteration magnifies
// (chunk.hpp), and float64 has nothing wider for the first tokens, where that shows: 8 more.
TEST(ErrorTable, Float64NearNaive) {
  std::printf(
      "float64, T 1, 16, 130, K = V = 64: kernel, and naive float32 times 2^-29\n%-8s %-10s %9s "
      "%9s %9s %9s %9s\n",
      "ridge", "", "o", "o (step)", "naive o", "gradients", "naive");
  for (double ridge : {0.1, 0.02, 0.005, 0.001, 0.0002}) {
    struct Problem {
      CaseSpec spec;
      Case<double> expected;
    };
    std::vector<Problem> problems;
    Row naive;
    const auto largest = [](double& to, double error) { to = std::max(to, error); };
    // The error of a single token depends on how its query meets its key: many of them.
    for (int i = 0; i < 13; ++i) {
      for (bool gates : {false, true}) {
        CaseSpec spec;
        spec.T = i < 6 ? 1 : i < 12 ? 16 : 130;
        spec.K = spec.V = 64;
        spec.H = 1;
        set_gates(spec, gates ? 63 - 16 : 0);
        spec.ridge_ratio = ridge;
        spec.seed = 6500 + static_cast<uint64_t>(i);
        Case<float> plain(spec);
        const Case<double> expected = oracle_results(plain, plain.options());
        run_forward<float>(plain, plain.options());
        run_backward<float>(plain, plain.options());
        largest(naive.o, 0x1p-29 * relative_error(plain.o.view(), expected.o.view()));
        for_each_gradient(plain, expected, [&](const char*, ConstView got, ConstView want) {
          largest(naive.gradients, 0x1p-29 * relative_error(got, want));
        });
        const Case<double> wide(spec);
        problems.push_back({spec, oracle_results(wide, wide.options())});
      }
    }
    for (InstructionSet isa : available_instruction_sets()) {
      ForcedInstructionSet forced(isa);
      Row row;
      for (const Problem& problem : problems) {
        Case<double> c(problem.spec);
        gka_forward(c.inputs(), c.outputs(), c.options());
        largest(row.o, relative_error(c.o.view(), problem.expected.o.view()));
        gka_backward(c.inputs(), c.x.view(), c.output_grads(), c.grads(), c.options());
        for_each_gradient(c, problem.expected, [&](const char*, ConstView got, ConstView want) {
          largest(row.gradients, relative_error(got, want));
        });
        gka_step(c.inputs(), c.outputs(), c.options());
        largest(row.step, relative_error(c.o.view(), problem.expected.o.view()));
      }
      std::printf("%-8g %-10s %9.1e %9.1e %9.1e %9.1e %9.1e\n", ridge, name(isa), row.o, row.step,
                  naive.o, row.gradients, naive.gradients);
      EXPECT_LE(row.o, 16 * naive.o) << "ridge ratio " << ridge << " on " << name(isa);
      EXPECT_LE(row.step, 16 * naive.o) << "ridge ratio " << ridge << " on " << name(isa);
      EXPECT_LE(row.gradients, 16 * naive.gradients)
          << "ridge ratio " << ridge << " on " << name(isa);
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
