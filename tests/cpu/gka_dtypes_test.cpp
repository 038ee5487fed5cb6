// float64, bfloat16 and float16 problems, and 16-bit ones with float32 gates, as gka_test.cpp holds
// float32 to the oracle: forward, step and backward of every instruction set.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpu/gka_oracle.hpp"

namespace kalmanet::testing {
namespace {

// The errors of each kind of problem apart.
struct Worst {
  WorstErrors float64, bfloat16, float16, mixed_bfloat16, mixed_float16;
  void print(const std::string& what) const {
    float64.print(("worst relative errors over " + what + ": float64").c_str());
    bfloat16.print("bfloat16");
    float16.print("float16");
    mixed_bfloat16.print("bfloat16, gates and x float32");
    mixed_float16.print("float16, gates and x float32");
  }
};

void check_all(const CaseSpec& spec, const GkaOptions& options, Worst& worst) {
  check_against_oracle<double>(spec, options, worst.float64);
  check_against_oracle<BFloat16>(spec, options, worst.bfloat16);
  check_against_oracle<Float16>(spec, options, worst.float16);
  check_against_oracle<BFloat16, float>(spec, options, worst.mixed_bfloat16);
  check_against_oracle<Float16, float>(spec, options, worst.mixed_float16);
}

TEST(GkaDtypes, MatchOracleOverShapes) {
  Worst worst;
  const double ridges[] = {0.1, 0.02, 0.005};
  int turn = 0;
  for (int64_t T : {1, 2, 16, 33, 130}) {
    for (int64_t K : {1, 5, 60, 64, 100, 256}) {
      CaseSpec spec;
      spec.T = T;
      spec.K = K;
      spec.V = turn % 4 == 3 ? 1 : (K * 7) % 97 + 3;
      spec.H = K < 100 ? 2 : 1;
      spec.ridge_ratio = ridges[turn % 3];
      set_gates(spec, 5 * turn);
      spec.strided = turn % 4 == 1;
      spec.h0 = turn % 3 != 0;
      spec.u0 = turn % 5 != 0;
      spec.memory = turn % 2 == 0 ? 32 : 300;
      spec.seed = 20100 + static_cast<uint64_t>(turn);
      check_all(spec, {}, worst);
      ++turn;
    }
  }
  worst.print("shapes");
}

TEST(GkaDtypes, MatchOracleForEveryCombinationOfGates) {
  Worst worst;
  for (int gates = 0; gates < 64; ++gates) {
    CaseSpec spec;
    spec.B = 2;
    spec.T = 37;
    spec.H = 2;
    spec.K = 20;
    spec.V = 12;
    const double ridges[] = {0.1, 0.02, 0.005};
    spec.ridge_ratio = ridges[gates % 3];
    spec.seed = 21000 + static_cast<uint64_t>(gates);
    set_gates(spec, gates);
    spec.h0 = spec.u0 = gates % 2 == 1;
    spec.strided = gates % 8 == 6;
    check_all(spec, {}, worst);
  }
  worst.print("gates");
}

TEST(GkaDtypes, MatchOracleForPackedSequences) {
  Worst worst;
  int turn = 0;
  for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{
           {0}, {1}, {0, 1, 0, 17, 1, 64, 0}, {16, 16, 1, 0, 33}, {100, 3, 1, 1, 31}}) {
    for (int64_t K : {1, 33}) {
      CaseSpec spec;
      spec.lengths = lengths;
      spec.K = K;
      spec.V = 17;
      spec.H = 4;
      spec.Hk = 2;  // sums over heads start at each sequence's own token
      spec.seed = 22000 + static_cast<uint64_t>(turn);
      set_gates(spec, 63 - turn);
      spec.h0 = spec.u0 = turn % 2 == 0;
      spec.strided = turn % 3 == 0;
      check_all(spec, {}, worst);
      ++turn;
    }
  }
  worst.print("packed sequences");
}

// Gradients of shared heads are sums over heads, which 16-bit numbers must not be rounded in.
TEST(GkaDtypes, MatchOracleForFewerQueryKeyOrValueHeads) {
  Worst worst;
  const int64_t heads[][4] = {{4, 4, 2, 2}, {4, 2, 2, 4}, {6, 3, 2, 6}, {4, 4, 1, 1},
                              {6, 6, 1, 3}, {4, 1, 4, 2}, {6, 1, 1, 1}};
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
    spec.seed = 23000 + static_cast<uint64_t>(turn);
    set_gates(spec, turn % 2 == 0 ? 63 : 21);
    spec.h0 = spec.u0 = true;
    spec.strided = turn % 3 == 2;
    check_all(spec, {}, worst);
    ++turn;
  }
  worst.print("head groups");
}

// float16 holds neither such keys nor their gradients.
TEST(GkaDtypes, MatchOracleForTinyAndLargeKeys) {
  Worst worst;
  for (double size : {1e-8, 1e-5, 1e5}) {
    for (bool states : {false, true}) {
      CaseSpec spec;
      spec.T = 40;
      spec.K = 24;
      spec.V = 8;
      spec.h0 = spec.u0 = states;
      spec.seed = 24000;
      set_gates(spec, 63);
      check_against_oracle<double>(spec, {}, worst.float64, size);
      check_against_oracle<BFloat16>(spec, {}, worst.bfloat16, size);
      check_against_oracle<BFloat16, float>(spec, {}, worst.mixed_bfloat16, size);
    }
  }
  worst.print("the size of keys");
}

TEST(GkaDtypes, MatchOracleForOtherOptions) {
  Worst worst;
  CaseSpec spec;
  spec.T = 70;
  spec.K = 32;
  spec.V = 16;
  spec.seed = 25000;
  set_gates(spec, 63);
  for (int num_iter : {1, 7, 45}) {
    GkaOptions options;
    options.num_iter = num_iter;
    options.scale = 0.7;
    check_all(spec, options, worst);
  }
  GkaOptions constant_norm;
  constant_norm.bp_lambda = false;
  check_all(spec, constant_norm, worst);
  worst.print("options");
}

}  // namespace
}  // namespace kalmanet::testing
