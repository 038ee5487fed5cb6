// The bodies of the backward's kernels, run by the CPU with the GPU's index arithmetic, against the
// float64 oracle; and in the other order of a block's threads, bit for bit.
#include "cuda/backward_emulation.hpp"

#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "cuda/gka_cases.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

WorstErrors worst;

template <class T, class G>
void run(Case<T, G>& c, GkaOptions options, const cuda::Emulation& how) {
  options.backend = Backend::cuda;
  const GkaInputGrads grads = c.grads();
  cuda::emulate_backward(core::validate_backward(c.inputs(), {}, c.output_grads(), grads, options),
                         c.output_grads(), grads, how);
}

template <class T, class G = T>
void check(const CaseSpec& spec, const GkaOptions& options) {
  Case<T, G> c(spec), other(spec);
  run(c, options, {});
  run(other, options, {.backwards = true, .spill_is_shared = true});
  const Where where{"emulated backward", name(options.solver),
                    describe(spec) + " " + name(DTypeOf<T>::value)};
  for_each_gradient(c, other, [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b)) << "depends on the order of threads";
  });
  EXPECT_TRUE(c.gaps_intact()) << text(where, "gaps");
  expect_oracle_gradients(c, options, where, worst);
}

TEST(CudaBackwardEmulation, MatchesTheOracleOverShapes) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (const auto& [T, K, V] : std::vector<std::array<int64_t, 3>>{{1, 1, 1},
                                                                     {2, 5, 3},
                                                                     {35, 64, 64},
                                                                     {17, 60, 33},
                                                                     {21, 128, 128},
                                                                     {16, 100, 20},
                                                                     {9, 256, 200},
                                                                     {3, 131, 256}}) {
      GkaOptions options;
      options.solver = solver;
      CaseSpec spec = small_case(turn++);
      spec.T = T, spec.K = K, spec.V = V;
      check<float>(spec, options);
      check<BFloat16, float>(spec, options);
      check<Float16>(spec, options);
      if (K <= 128) check<double>(spec, options);
    }
  }
  worst.print("worst gradients over shapes");
}

TEST(CudaBackwardEmulation, MatchesTheOracleForEveryCombinationOfGates) {
  for (int gates = 0; gates < 64; ++gates) {
    CaseSpec spec = small_case(gates);
    spec.T = 21, spec.K = 12, spec.V = 10;
    spec.g = gates & 1, spec.gk = gates & 2, spec.alpha = gates & 4, spec.beta = gates & 8;
    spec.ridge_tensor = gates & 16;
    spec.same_gate = (gates & 32) && spec.g && spec.gk;
    GkaOptions options;
    options.bp_lambda = gates % 3 != 0;
    check<float>(spec, options);
  }
}

TEST(CudaBackwardEmulation, CutsLongSequences) {
  for (int turn : {0, 1, 2}) {
    CaseSpec spec = small_case(turn);
    spec.T = 2 * kSegmentTokens + 3;
    spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
    spec.K = 12, spec.V = 70;
    check<float>(spec, {});
  }
}

TEST(CudaBackwardEmulation, PackedSequences) {
  CaseSpec spec = small_case(63);
  spec.lengths = {0, 3, 0, kSegmentTokens + 1, 1, 17, 0};
  spec.K = 10, spec.V = 6;
  check<float>(spec, {});
  check<BFloat16>(spec, {});
}

// Gates that wipe the memory: what is left of a decay's gradient is exact, not a difference.
TEST(CudaBackwardEmulation, StrongDecays) {
  for (double memory : {1.0, 0.3, 0.1}) {
    CaseSpec spec = small_case(3);
    spec.T = 40, spec.K = 16, spec.V = 8, spec.g = spec.gk = true, spec.memory = memory;
    check<float>(spec, {});
  }
  CaseSpec spec = small_case(3);
  spec.T = 20, spec.K = 8, spec.V = 8, spec.g = spec.gk = true;
  Case<float> c(spec);
  c.gk.fill([](int64_t i) { return i == 9 ? -INFINITY : -0.1; });
  run(c, {}, {});
  const Where where{"emulated backward", "a gate of minus infinity", describe(spec)};
  WorstErrors unused;
  expect_oracle_gradients(c, {}, where, unused);
}

// Gradients that nobody asks for are not computed, and the others do not change.
TEST(CudaBackwardEmulation, OnlyWhatIsAskedFor) {
  CaseSpec spec = small_case(62);
  spec.T = 530, spec.K = 8, spec.V = 8, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
  Case<float> all(spec), some(spec);
  run(all, {}, {});
  GkaOptions options;
  options.backend = Backend::cuda;
  GkaInputGrads grads;
  grads.dk = some.dk.view(), grads.dalpha = some.dalpha.view();
  GkaOutputGrads output_grads;
  output_grads.d_o = some.d_o.view();
  output_grads.d_h_final = some.d_h_final.view(), output_grads.d_u_final = some.d_u_final.view();
  cuda::emulate_backward(core::validate_backward(some.inputs(), {}, output_grads, grads, options),
                         output_grads, grads, {});
  const Where where{"emulated backward", "", describe(spec)};
  EXPECT_TRUE(identical(where, "dk", some.dk.view(), all.dk.view()));
  EXPECT_TRUE(identical(where, "dalpha", some.dalpha.view(), all.dalpha.view()));
  for (double e : some.dq.values()) EXPECT_TRUE(std::isnan(e)) << "dq was written";
}

// x and z on matrix units. `bound`: of what is left beside rounding a gradient to its own dtype.
// is_short: what part of pieces and heads is of short memory, if that is known.
template <class G, class T = BFloat16>
void check_chunks(const CaseSpec& spec, GkaOptions options, double bound, double left_over = 0,
                  double is_short = -1) {
  options.backend = Backend::cuda;
  options.ridge_ratio = spec.ridge_ratio;
  Case<T, G> c(spec), other(spec);
  const auto emulate = [&](Case<T, G>& into, const cuda::Emulation& how) {
    const GkaInputGrads grads = into.grads();
    const core::GkaProblem problem =
        core::validate_backward(into.inputs(), {}, into.output_grads(), grads, options);
    double found = 0;
    const double left =
        cuda::emulate_backward_chunks(problem, into.output_grads(), grads, how, &found);
    if (left_over >= 0) {
      EXPECT_EQ(left, left_over) << describe(spec);
    }
    if (is_short >= 0) {
      EXPECT_EQ(found, is_short) << describe(spec);
    }
  };
  emulate(c, {});
  emulate(other, {.backwards = true});
  const Where where{"emulated backward by chunks", name(options.solver), describe(spec)};
  for_each_gradient(c, other, [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b)) << "depends on the order of threads";
  });
  EXPECT_TRUE(c.gaps_intact()) << text(where, "gaps");
  WorstErrors errors;
  expect_oracle_gradients(c, options, where, errors, bound);
  errors.print((std::string(name(DTypeOf<T>::value)) + " " + describe(spec)).c_str());
}

TEST(CudaBackwardEmulation, ChunksMatchTheOracle) {
  int turn = 0;
  for (int64_t T : {1, 63, 64, 130, 200}) {
    CaseSpec spec = small_case(turn++);
    spec.T = T, spec.K = spec.V = 128, spec.B = 1, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
    spec.strided = false;
    check_chunks<float>(spec, {}, 1e-3);
    check_chunks<BFloat16>(spec, {}, 1e-3);
  }
}

// Where one token's z . x is the whole of a gradient, no other's error makes up for its own.
TEST(CudaBackwardEmulation, ChunksOfALoneTokenAtSmallRidges) {
  for (double ridge : {0.005, 0.01}) {
    CaseSpec spec = small_case(10);
    spec.T = 1, spec.K = spec.V = 128, spec.strided = false;
    spec.ridge_ratio = ridge, spec.memory = 200;
    check_chunks<float>(spec, {}, 1e-3);
  }
}

TEST(CudaBackwardEmulation, DirectChunksMatchTheOracle) {
  int turn = 0;
  GkaOptions options;
  options.solver = Solver::direct;
  for (int64_t T : {1, 63, 64, 130, 200}) {
    CaseSpec spec = small_case(turn++);
    spec.T = T, spec.K = spec.V = 128, spec.B = 1, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
    spec.strided = false;
    if (turn % 2 == 0) spec.ridge_ratio = 0.005;
    check_chunks<float>(spec, options, 1e-3);
    check_chunks<BFloat16>(spec, options, 1e-3);
  }
}

// What would magnify dk's error goes to chebyshev's kernel (backward_direct_kernel.hpp).
TEST(CudaBackwardEmulation, DirectChunksAtSmallRidges) {
  GkaOptions options;
  options.solver = Solver::direct;
  for (const auto& [ridge, memory] : {std::pair{0.001, 6.0}, {0.002, 20.0}}) {
    CaseSpec spec = small_case(3);
    spec.T = 70, spec.K = spec.V = 128, spec.B = 1, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
    spec.strided = false, spec.g = spec.gk = spec.same_gate = spec.alpha = spec.beta = true;
    spec.h0 = spec.u0 = false;
    spec.ridge_ratio = ridge, spec.memory = memory, spec.seed = 900;
    check_chunks<float>(spec, options, 1e-3);
  }
}

// Fewer dims than 128, rows with gaps, and float16 (cuda/any_rows.hpp).
template <class T>
void check_any_rows(Solver solver) {
  GkaOptions options;
  options.solver = solver;
  int turn = 0;
  for (const auto& [K, V] : std::vector<std::array<int64_t, 2>>{
           {64, 64}, {96, 64}, {128, 72}, {80, 80}, {72, 128}, {8, 16}, {128, 128}}) {
    CaseSpec spec = small_case(turn++);
    spec.K = K, spec.V = V, spec.B = 1, spec.strided = false;
    if (K == 128 && V == 128 && std::is_same_v<T, BFloat16>) continue;
    spec.row_gap = turn % 2 == 0 ? 8 : 0;
    spec.T = turn % 3 == 0 ? 65 : 100;
    if (turn <= 2) {
      spec.lengths = {0, 70, 1, 0, 17, 0};
      spec.Hq = spec.Hk = spec.Hv = 1;
    } else if (turn == 3) {
      spec.T = cuda::kBackwardTokens + 70;
      spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
    }
    check_chunks<float, T>(spec, options, 1e-3);
    if (turn == 1) check_chunks<T, T>(spec, options, 1e-3);
  }
}
TEST(CudaBackwardEmulation, ChunksOfFewerDims) {
  check_any_rows<BFloat16>(Solver::chebyshev);
}
TEST(CudaBackwardEmulation, DirectChunksOfFewerDims) {
  check_any_rows<BFloat16>(Solver::direct);
}
TEST(CudaBackwardEmulation, DirectChunksOfFloat16) {
  check_any_rows<Float16>(Solver::direct);
}

TEST(CudaBackwardEmulation, ChunksOfCutPackedAndSharedHeads) {
  CaseSpec spec = small_case(0);
  spec.K = spec.V = 128, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
  spec.B = 1, spec.T = cuda::kBackwardTokens + 70;
  check_chunks<float>(spec, {}, 1e-3);
  GkaOptions direct;
  direct.solver = Solver::direct;
  check_chunks<float>(spec, direct, 1e-3);
  spec.lengths = {0, 70, 1, 130};
  spec.H = 2, spec.Hq = 1, spec.Hk = 1, spec.Hv = 1;
  check_chunks<float>(spec, {}, 1e-3);
  check_chunks<float>(spec, direct, 1e-3);
  spec.lengths = {70, 130};
  spec.memory = 0.3;  // forgets more in a chunk than float32 can hold: the token kernel's
  check_chunks<float>(spec, {}, 1e-3, 1.0);
}

// Gates of a layer that was not trained yet (short_plan.hpp), some of which forget more in 64
// tokens than float32 can hold.
CaseSpec short_case(int turn) {
  CaseSpec spec = small_case(3);
  spec.K = spec.V = 128, spec.B = 1, spec.H = 1, spec.Hv = 0;
  spec.strided = false, spec.g = spec.gk = spec.same_gate = spec.alpha = spec.beta = true;
  spec.h0 = spec.u0 = false;
  spec.seed = 850 + static_cast<uint64_t>(turn);
  return spec;
}

TEST(CudaBackwardEmulation, ShortMemoriesMatchTheOracle) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (double ridge : {0.1, 0.02, 0.005, 0.001}) {
      for (double memory : {3.0, 0.6}) {
        CaseSpec spec = short_case(turn++);
        spec.T = 64 * (turn % 3) + 37, spec.ridge_ratio = ridge, spec.memory = memory;
        spec.gate_spread = 0.3, spec.key_correlation = turn % 4 < 2 ? 0.0 : 0.9;
        GkaOptions options;
        options.solver = solver;
        options.ridge_ratio = ridge;
        // (At small ratios x and z are too long beside what they are along the keys.)
        check_chunks<float>(spec, options, 1e-3, ridge < 0.02 ? -1 : 0, 1);
      }
    }
  }
}

TEST(CudaBackwardEmulation, ShortMemoriesBesideLongOnes) {
  GkaOptions direct;
  direct.solver = Solver::direct;
  for (const GkaOptions& options : {GkaOptions(), direct}) {
    CaseSpec spec = short_case(50);
    spec.T = cuda::kBackwardTokens + 70, spec.H = 2, spec.Hk = 1, spec.gate_spread = 0.3;
    spec.memory = 0.6, spec.memory_ratio = 50;
    check_chunks<float>(spec, options, 1e-3, 0, 0.5);
    spec.memory_ratio = 1, spec.ridge_tensor = true;
    spec.lengths = {0, 1, 70, 1, 130};
    check_chunks<BFloat16>(spec, options, 1e-3);
  }
}

}  // namespace
}  // namespace kalmanet::testing
