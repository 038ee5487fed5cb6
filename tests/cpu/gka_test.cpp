// The float32 kernels against the float64 oracle of the same solver and iteration count, on every
// instruction set this machine has.
#include <gtest/gtest.h>

#include <vector>

#include "cpu/gka_oracle.hpp"

namespace kalmanet::testing {
namespace {

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
      check_against_oracle<float>(spec, options(), worst);
      ++turn;
    }
  }
  worst.print("worst relative errors over shapes:");
}

// Decays far apart from token to token: now and then the shifts of one window's last block fit the
// first chunk of another window, with whose factors the backward must not go on (it takes the
// windows from the last to the first). Without the line that parts them dk and dq of some heads are
// wrong by their own size.
TEST(GkaCpuDirect, MatchesOracleForUnevenDecays) {
  GkaOptions options;
  options.solver = Solver::direct;
  WorstErrors worst;
  CaseSpec spec;
  spec.T = 300;
  spec.H = 16;
  spec.K = 128;
  spec.V = 3;
  spec.g = spec.gk = spec.same_gate = true;
  spec.memory = 50;
  spec.gate_spread = 1.2;
  spec.seed = 1;
  check_against_oracle<float>(spec, options, worst);
  worst.print("worst relative errors for uneven decays:");
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
      check_against_oracle<float>(spec, options(), worst);
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
      check_against_oracle<float>(spec, options(), worst);
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
    check_against_oracle<float>(spec, options(), worst);
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
      check_against_oracle<float>(spec, options(), worst, size);
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
    check_against_oracle<float>(spec, other, worst);
  }
  GkaOptions constant_norm = options();
  constant_norm.bp_lambda = false;
  check_against_oracle<float>(spec, constant_norm, worst);
  worst.print("worst relative errors over options:");
}

}  // namespace
}  // namespace kalmanet::testing
