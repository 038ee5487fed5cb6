// The float32 kernels against the float64 oracle of the same solver and iteration count, on every
// instruction set this machine has.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cpu/gka_cases.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

// DESIGN's bounds: of chebyshev against the same iteration in float64, of direct against exact.
double output_bound(Solver solver) {
  return solver == Solver::direct ? 2e-5 : 1e-5;
}
double gradient_bound(Solver solver) {
  return solver == Solver::direct ? 2e-4 : 1e-4;
}

// Residuals are small differences of numbers near 1: what float32 x leaves of them is about
// 1e-7 / ridge_ratio; beyond that they agree.
::testing::AssertionResult residuals_agree(const Where& where, const Case<float>& c,
                                           const Case<double>& expected, Solver solver) {
  const std::vector<double> got = c.residual.values(), want = expected.residual.values();
  // What direct leaves of x by its tolerance, it leaves of the residual.
  const double floor = 4e-7 / c.spec.ridge_ratio + (solver == Solver::direct ? 1e-5 : 0.0);
  for (size_t i = 0; i < want.size(); ++i) {
    if (!(std::abs(got[i] - want[i]) <= floor + 1e-2 * want[i])) {
      return ::testing::AssertionFailure() << text(where, "residual") << ": " << got[i]
                                           << ", expected " << want[i] << " within " << floor;
    }
  }
  return ::testing::AssertionSuccess();
}

// Forward, decode step and backward of one problem on every instruction set against the oracle.
// Keys, and the states made of them, are multiplied by `key_size`.
void check_against_oracle(const CaseSpec& spec, const GkaOptions& base, WorstErrors& worst,
                          double key_size = 1.0) {
  Case<float> c(spec);
  if (key_size != 1.0) {
    const auto scale = [](Tensor<float>& tensor, double by) {
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
  Case<double> expected = oracle_results(c, options);
  options.backend = Backend::cpu;
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    const Where where{"gka_forward", name(isa), describe(spec)};
    c.clear_results();
    const GkaReport report = gka_forward(c.inputs(), c.outputs(), options);
    EXPECT_EQ(report.instruction_set, isa);
    EXPECT_EQ(report.backend, Backend::cpu);
    for_each_output(c, expected, [&](const char* tensor, ConstView got, ConstView want) {
      EXPECT_TRUE(within(where, tensor, got, want, output_bound(options.solver)));
      worst.add(std::string(tensor), relative_error(got, want));
    });
    EXPECT_TRUE(residuals_agree(where, c, expected, options.solver));

    for (bool saved : {true, false}) {
      const Where back{saved ? "gka_backward (x saved)" : "gka_backward (x solved for)", name(isa),
                       describe(spec)};
      const ConstView x = saved ? ConstView(c.x.view()) : ConstView();
      gka_backward(c.inputs(), x, c.output_grads(), c.grads(), options);
      for_each_gradient(c, expected, [&](const char* tensor, ConstView got, ConstView want) {
        EXPECT_TRUE(within(back, tensor, got, want, gradient_bound(options.solver)));
        worst.add(std::string(tensor), relative_error(got, want));
      });
    }
    EXPECT_TRUE(c.gaps_intact()) << where.operation << ", " << where.problem;

    c.clear_results();
    const Where step{"gka_step", name(isa), describe(spec)};
    gka_step(c.inputs(), c.outputs(), options);
    for_each_output(c, expected, [&](const char* tensor, ConstView got, ConstView want) {
      EXPECT_TRUE(within(step, tensor, got, want, output_bound(options.solver)));
      worst.add("step " + std::string(tensor), relative_error(got, want));
    });
    EXPECT_TRUE(residuals_agree(step, c, expected, options.solver));
    EXPECT_TRUE(c.gaps_intact()) << step.operation << ", " << step.problem;
  }
}

class GkaCpu : public ::testing::TestWithParam<Solver> {
 protected:
  GkaOptions options() const {
    GkaOptions options;
    options.solver = GetParam();
    return options;
  }
};
INSTANTIATE_TEST_SUITE_P(Solvers, GkaCpu, ::testing::Values(Solver::chebyshev, Solver::direct),
                         [](const auto& solver) { return std::string(name(solver.param)); });

// Every length with every key width; gates, ridges, layouts and value widths take turns, so that
// each combination of gates meets several shapes.
TEST_P(GkaCpu, MatchesOracleOverShapes) {
  WorstErrors worst;
  const double ridges[] = {0.1, 0.02, 0.005};
  int turn = 0;
  for (int64_t T : {1, 2, 63, 64, 65, 500}) {
    for (int64_t K : {1, 5, 60, 64, 100, 128, 256}) {
      CaseSpec spec;
      spec.T = T;
      spec.K = K;
      spec.V = K == 128 ? 128 : (K * 7) % 97 + 3;
      spec.H = K * T <= 64 * 128 ? 2 : 1;
      spec.ridge_ratio = ridges[turn % 3];
      set_gates(spec, turn);
      spec.strided = turn % 4 == 1;
      spec.h0 = turn % 3 != 0;
      spec.u0 = turn % 5 != 0;
      spec.memory = turn % 2 == 0 ? 32 : 300;
      spec.seed = 100 + static_cast<uint64_t>(turn);
      check_against_oracle(spec, options(), worst);
      ++turn;
    }
  }
  worst.print("worst relative errors over shapes:");
}

TEST_P(GkaCpu, MatchesOracleForEveryCombinationOfGates) {
  WorstErrors worst;
  for (int gates = 0; gates < 64; ++gates) {
    for (double ridge : {0.1, 0.02, 0.005}) {
      CaseSpec spec;
      spec.B = 2;
      spec.T = 37;
      spec.H = 2;
      spec.K = 20;
      spec.V = 12;
      spec.ridge_ratio = ridge;
      spec.seed = 1000 + static_cast<uint64_t>(gates);
      set_gates(spec, gates);
      spec.h0 = spec.u0 = gates % 2 == 1;
      check_against_oracle(spec, options(), worst);
    }
  }
  worst.print("worst relative errors over gates:");
}

TEST_P(GkaCpu, MatchesOracleForPackedSequences) {
  WorstErrors worst;
  int turn = 0;
  for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{
           {0}, {1}, {0, 1, 0, 17, 1, 64, 0}, {16, 16, 1, 0, 33}, {100, 3, 1, 1, 31}}) {
    for (int64_t K : {5, 60, 64}) {
      CaseSpec spec;
      spec.lengths = lengths;
      spec.K = K;
      spec.V = 33;
      spec.H = 2;
      spec.seed = 2000 + static_cast<uint64_t>(turn);
      set_gates(spec, 63 - turn);
      spec.h0 = spec.u0 = turn % 2 == 0;
      spec.strided = turn % 3 == 0;
      check_against_oracle(spec, options(), worst);
      ++turn;
    }
  }
  worst.print("worst relative errors over packed sequences:");
}

TEST_P(GkaCpu, MatchesOracleForFewerQueryKeyOrValueHeads) {
  WorstErrors worst;
  const int64_t heads[][4] = {{4, 4, 2, 2}, {4, 2, 2, 4}, {6, 3, 2, 6},
                              {4, 4, 1, 1}, {6, 6, 1, 3}, {4, 1, 4, 2}};
  int turn = 0;
  for (const auto& h : heads) {
    CaseSpec spec;
    spec.B = turn % 2 + 1;
    spec.T = 50;
    spec.H = h[0];
    spec.Hq = h[1];
    spec.Hk = h[2];
    spec.Hv = h[3];
    spec.K = 24;
    spec.V = 40;
    spec.seed = 3000 + static_cast<uint64_t>(turn);
    set_gates(spec, turn % 2 == 0 ? 63 : 21);
    spec.h0 = spec.u0 = true;
    check_against_oracle(spec, options(), worst);
    ++turn;
  }
  worst.print("worst relative errors over head counts:");
}

// Keys so small that H, f and the gradients' 1 / f^3 come near the ends of float32's range.
TEST_P(GkaCpu, MatchesOracleForTinyAndLargeKeys) {
  WorstErrors worst;
  for (double size : {1e-8, 1e-5, 1e5}) {
    for (bool states : {false, true}) {
      CaseSpec spec;
      spec.T = 40;
      spec.K = 24;
      spec.V = 8;
      spec.h0 = spec.u0 = states;
      spec.seed = 7000;
      set_gates(spec, 63);
      check_against_oracle(spec, options(), worst, size);
    }
  }
  worst.print("worst relative errors over the size of keys:");
}

TEST_P(GkaCpu, MatchesOracleForOtherOptions) {
  WorstErrors worst;
  CaseSpec spec;
  spec.T = 70;
  spec.K = 32;
  spec.V = 16;
  spec.seed = 4000;
  set_gates(spec, 63);
  for (int num_iter : {1, 2, 7, 45}) {
    GkaOptions other = options();
    other.num_iter = num_iter;
    other.scale = 0.7;
    check_against_oracle(spec, other, worst);
  }
  GkaOptions constant_norm = options();
  constant_norm.bp_lambda = false;
  check_against_oracle(spec, constant_norm, worst);
  worst.print("worst relative errors over options:");
}

}  // namespace
}  // namespace kalmanet::testing
