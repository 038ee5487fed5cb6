// The decode kernels' bodies, run by the CPU: the step kernel, and slots and drafts in both.
#include <gtest/gtest.h>

#include <utility>

#include "cuda/emulation.hpp"
#include "cuda/gka_cases.hpp"
#include "support/decode.hpp"

namespace kalmanet::testing {
namespace {

template <class T, class G>
void run(Case<T, G>& c, GkaOptions options, const cuda::Emulation& how) {
  options.backend = Backend::cuda;
  const GkaOutputs outputs = c.outputs();
  const core::GkaProblem problem = core::validate_step(c.inputs(), outputs, options);
  ASSERT_TRUE(cuda::fits_step(problem, outputs)) << describe(c.spec);
  cuda::emulate_step(problem, outputs, how);
}

template <class T, class G = T>
void check(const CaseSpec& spec, const GkaOptions& options) {
  Case<T, G> c(spec);
  c.x = c.residual = Tensor<G>();
  run(c, options, {});
  const Where where{"emulated step kernel", name(options.solver), describe(spec)};
  // In the other order of threads, and by the kernel for few sequences, which takes one token.
  for (const cuda::Emulation& how :
       {cuda::Emulation{.backwards = true}, {.wide = true}, {.backwards = true, .wide = true}}) {
    if (how.wide && spec.T != 1) continue;
    Case<T, G> other(spec);
    other.x = other.residual = Tensor<G>();
    run(other, options, how);
    for_each_output(c, other, [&](const char* tensor, ConstView a, ConstView b) {
      EXPECT_TRUE(identical(where, tensor, a, b))
          << "depends on the " << (how.wide ? "kernel" : "order of threads");
    });
  }
  expect_oracle(c, options, where);
}

CaseSpec step_case(int turn) {
  CaseSpec spec = small_case(turn);
  spec.K = spec.V = 128, spec.strided = false;
  return spec;
}

TEST(CudaStepEmulation, MatchesTheOracle) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (int64_t T : {1, 2, 5}) {
      GkaOptions options;
      options.solver = solver;
      CaseSpec spec = step_case(turn++);
      spec.T = T;
      check<float>(spec, options);
      check<BFloat16, float>(spec, options);
      check<Float16>(spec, options);
    }
  }
}

// With states behind them the tokens are all done at once; o in float16 shows errors of 2^-11, the
// ratio of errors with and without them more: the sums of the products are float32's.
TEST(CudaStepEmulation, AFewTokensAtOnce) {
  for (int64_t T : {3, 4, 5, 8}) {
    CaseSpec spec = step_case(7);
    spec.T = T, spec.h0 = spec.u0 = spec.alpha = spec.beta = spec.g = spec.gk = true;
    Case<Float16, float> c(spec);
    c.x = c.residual = Tensor<float>();
    GkaOptions options;
    options.backend = Backend::cuda;
    const GkaOutputs outputs = c.outputs();
    const core::GkaProblem problem = core::validate_step(c.inputs(), outputs, options);
    ASSERT_TRUE(cuda::fits_few(problem, outputs));
    EXPECT_EQ(cuda::emulate_step(problem, outputs, {}), 0) << "blocks left to the step kernel";
    Case<double> d = to_double(c);
    d.clear_results();
    options.backend = Backend::reference;
    gka_forward(d.inputs(), d.outputs(), options);
    std::vector<double> rounded = d.o.values();
    for (double& e : rounded) e = Float16(e);
    const Where where{"a few tokens", "emulated", describe(spec)};
    // Those that round to another number than the oracle's: few, where errors are 2^-20 or so.
    const std::vector<double> got = c.o.values();
    size_t others = 0;
    for (size_t i = 0; i < got.size(); ++i) others += got[i] != rounded[i];
    std::printf("%s: %zu of %zu elsewhere\n", describe(spec).c_str(), others, got.size());
    EXPECT_LE(others * 50, got.size()) << text(where, "o");
    EXPECT_TRUE(within(where, "h_final", c.h_final.view(), d.h_final.view(), 2e-6));
    EXPECT_TRUE(within(where, "u_final", c.u_final.view(), d.u_final.view(), 1e-6));
  }
}

// Where float32 is not enough: a sequence's first tokens, small ridges, keys that are much alike.
TEST(CudaStepEmulation, SolvesAmplifiedTokensInFloat64) {
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (int64_t T : {1, 8}) {
      for (double ridge : {0.02, 0.005}) {
        CaseSpec spec = step_case(3);
        spec.B = 1, spec.T = T, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0;
        spec.h0 = spec.u0 = spec.ridge_tensor = false;
        spec.key_correlation = 0.9;
        GkaOptions options;
        options.solver = solver;
        options.ridge_ratio = ridge;
        check<float>(spec, options);
      }
    }
  }
}

TEST(CudaStepEmulation, CountsStepsByTheTokensRidge) {
  for (int turn : {1, 2}) {
    CaseSpec spec = step_case(turn);
    spec.ridge_tensor = true, spec.ridge_ratio = 0.01, spec.T = 2;
    GkaOptions options;
    options.solver = turn == 1 ? Solver::direct : Solver::chebyshev;
    options.num_iter = kAutoNumIter;
    options.tolerance = 1e-6;
    Case<float> c(spec);
    c.x = c.residual = Tensor<float>();
    run(c, options, {});
    options.solver = Solver::direct;
    expect_oracle(c, options, {"emulated step kernel", "counted steps", describe(spec)});
  }
}

// By the kernel that `fits` says: the step kernel, or the general one.
template <class T>
void check_drafts(const DecodeSpec& spec, bool fits, double bound, Solver solver) {
  for (const bool backwards : {false, true}) {
    GkaOptions options;
    options.backend = Backend::cuda;
    options.solver = solver;
    const DecodeStep step = [&](const GkaInputs& in, const GkaOutputs& out, const GkaOptions& with,
                                const std::vector<Memory>&) {
      const core::GkaProblem problem = core::validate_step(in, out, with);
      ASSERT_EQ(cuda::fits_step(problem, out), fits);
      const cuda::Emulation how{.backwards = backwards};
      if (fits) {
        cuda::emulate_step(problem, out, how);
      } else {
        cuda::emulate(problem, out, true, how);
      }
    };
    const Where where{fits ? "drafts, step kernel" : "drafts, token kernel", name(solver),
                      "K=" + std::to_string(spec.K)};
    Decode<T>().run(spec, step, options, bound, std::is_same_v<T, double> ? 1e-14 : 2e-6, where);
  }
}

TEST(CudaStepEmulation, DraftsMatchTheOracle) {
  DecodeSpec spec;
  spec.K = spec.V = 128, spec.H = 1, spec.rounds = 2, spec.num_slots = 5;
  check_drafts<float>(spec, true, 1e-5, Solver::chebyshev);
  check_drafts<BFloat16>(spec, true, 4e-3, Solver::direct);
  spec.Hk = 1, spec.H = 2, spec.K = 20, spec.V = 12;
  check_drafts<float>(spec, false, 1e-5, Solver::chebyshev);
  check_drafts<double>(spec, false, 1e-9, Solver::direct);
  spec.K = 130, spec.V = 70, spec.beta = false, spec.rounds = 1;
  check_drafts<BFloat16>(spec, false, 4e-3, Solver::chebyshev);
}

TEST(CudaStepEmulation, ASlotThatThePoolDoesNotHaveAnswersNaN) {
  for (const auto& [fits, wide] : {std::pair{true, false}, {true, true}, {false, false}}) {
    CaseSpec spec = step_case(1);
    spec.B = 2, spec.T = 1, spec.h0 = spec.u0 = true;
    if (!fits) spec.K = 20;
    Case<float> c(spec);
    c.x = c.residual = Tensor<float>();
    const std::vector<int32_t> slots = {7, 1};
    GkaInputs in = c.inputs();
    in.slots = slots;
    GkaOutputs out = c.outputs();
    out.h_final = c.h0.view(), out.u_final = c.u0.view();
    GkaOptions options;
    options.backend = Backend::cuda;
    const core::GkaProblem problem = core::validate_step(in, out, options);
    ASSERT_EQ(cuda::fits_step(problem, out), fits);
    if (fits) {
      cuda::emulate_step(problem, out, {.wide = wide});
    } else {
      cuda::emulate(problem, out, true, {});
    }
    const std::vector<double> o = c.o.values();
    EXPECT_TRUE(std::isnan(o.front()));
    EXPECT_TRUE(std::isfinite(o.back()));
  }
}

}  // namespace
}  // namespace kalmanet::testing
