// Arithmetic::bfloat16: the processor's instructions against their float32 twin, every instruction
// set against the float64 oracle of the same steps, and the table of docs/numerics.md, section 10.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/gka_oracle.hpp"

namespace kalmanet::testing {
namespace {

GkaOptions bf16_options(const CaseSpec& spec) {
  GkaOptions options;
  options.ridge_ratio = spec.ridge_ratio;
  options.arithmetic = Arithmetic::bfloat16;
  return options;
}

// Forces the float32 twin for a scope.
struct WithoutInstructions {
  WithoutInstructions() { cpu::use_bf16_instructions(false); }
  ~WithoutInstructions() { cpu::use_bf16_instructions(true); }
};

CaseSpec odd_spec(uint64_t seed) {
  Random random(seed);
  CaseSpec spec;
  spec.B = random.integer(1, 2);
  spec.T = random.integer(17, 120);
  spec.K = random.integer(1, 70);
  spec.V = random.integer(1, 70);
  spec.H = 2;
  set_gates(spec, static_cast<int>(random.integer(0, 63)));
  spec.h0 = spec.u0 = random.coin();
  spec.ridge_ratio = random.coin() ? 0.1 : 0.02;
  spec.seed = seed;
  return spec;
}

// The twin adds the same exact products in the same order with the same roundings, so forward and
// backward agree bit for bit.
TEST(Bf16, InstructionsAndTheirTwinGiveTheSameBits) {
  if (!std::ranges::count(available_instruction_sets(), InstructionSet::avx512)) {
    GTEST_SKIP() << "no AVX-512 here";
  }
  ForcedInstructionSet forced(InstructionSet::avx512);
  for (uint64_t seed = 1; seed <= 25; ++seed) {
    const CaseSpec spec = odd_spec(seed);
    const GkaOptions options = bf16_options(spec);
    Case<float> fast(spec), twin(spec);
    const auto run = [&](Case<float>& c) {
      const GkaReport report = gka_forward(c.inputs(), c.outputs(), options);
      gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), options);
      return report;
    };
    if (!run(fast).bfloat16_instructions) GTEST_SKIP() << "no bfloat16 instructions here";
    {
      WithoutInstructions without;
      EXPECT_FALSE(run(twin).bfloat16_instructions);
    }
    const Where where{"bfloat16 products", "avx512", describe(spec)};
    const auto same = [&](const char* tensor, ConstView a, ConstView b) {
      EXPECT_TRUE(identical(where, tensor, a, b));
    };
    for_each_output(fast, twin, same);
    for_each_gradient(fast, twin, same);
    same("x", fast.x.view(), twin.x.view());
  }
}

// Each factor of a product is off by at most 2^-9 of itself. The steps of the iteration do not add
// such errors up: at their end the residual is that of one product, 2^-9 |H| |x| at most twice (H
// and x), so x is off by 2 * 2^-9 kappa |x| at the worst, kappa = (1 + a) / a. That is 0.04 at 0.1
// and 0.2 at 0.02; rounding errors are independent, which leaves of it the square root of the sum's
// length, a quarter or less for sums of 16 and more. Final states never see the products.
TEST(Bf16, EveryInstructionSetAgainstTheOracle) {
  double worst = 0;
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    for (uint64_t seed = 1; seed <= 25; ++seed) {
      CaseSpec spec = odd_spec(seed);
      spec.K = std::max<int64_t>(spec.K, 33);
      const GkaOptions options = bf16_options(spec);
      Case<float> c(spec);
      GkaOptions standard = options;
      standard.arithmetic = Arithmetic::standard;
      const Case<double> expected = oracle_results(c, standard);
      const GkaReport report = gka_forward(c.inputs(), c.outputs(), options);
      const int64_t chunks = (spec.T + 15) / 16;
      EXPECT_EQ(report.solves, spec.B * spec.H * chunks);
      EXPECT_LE(report.bfloat16_solves, spec.B * spec.H * (chunks - 1)) << "first ones are float64";
      EXPECT_GT(report.bfloat16_solves, 0);
      const Where where{"gka_forward bfloat16", name(isa), describe(spec)};
      const double bound = 2 * 0x1p-9 * (1 + 1 / spec.ridge_ratio) / 4;
      EXPECT_TRUE(within(where, "o", c.o.view(), expected.o.view(), bound));
      EXPECT_GT(relative_error(c.o.view(), expected.o.view()), 1e-5) << "the option did something";
      EXPECT_TRUE(within(where, "h_final", c.h_final.view(), expected.h_final.view(), 1e-5));
      worst = std::max(worst, relative_error(c.o.view(), expected.o.view()) / bound);
      gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), options);
      for_each_gradient(c, expected, [&](const char* tensor, ConstView got, ConstView want) {
        // Gradients hold products of two such solutions, and 1 / a once more in dk.
        EXPECT_TRUE(within(where, tensor, got, want, 4 * bound));
      });
      // The step is standard arithmetic, bit for bit.
      Case<float> step(spec), same(spec);
      EXPECT_EQ(gka_step(step.inputs(), step.outputs(), options).bfloat16_solves, 0);
      gka_step(same.inputs(), same.outputs(), standard);
      EXPECT_TRUE(
          identical({"gka_step", name(isa), describe(spec)}, "o", step.o.view(), same.o.view()));
    }
  }
  std::printf("bfloat16 products: largest error %.2f of the bound\n", worst);
}

// 16-bit tensors go the same way, and the number of threads changes no bit.
TEST(Bf16, HalfTensorsAndThreads) {
  CaseSpec spec = odd_spec(3);
  spec.K = spec.V = 48;
  spec.T = 200;
  GkaOptions options = bf16_options(spec);
  Case<BFloat16> one(spec), many(spec);
  const std::unique_ptr<Executor> single = make_executor(1), several = make_executor(3);
  options.executor = single.get();
  gka_forward(one.inputs(), one.outputs(), options);
  options.executor = several.get();
  EXPECT_GT(gka_forward(many.inputs(), many.outputs(), options).bfloat16_solves, 0);
  EXPECT_TRUE(identical({"threads", "", describe(spec)}, "o", one.o.view(), many.o.view()));
}

TEST(Bf16, RefusesWhatItDoesNotServe) {
  Case<double> c(CaseSpec{});
  GkaOptions options = bf16_options(c.spec);
  try {
    gka_forward(c.inputs(), c.outputs(), options);
    ADD_FAILURE() << "float64 was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.argument(), "arithmetic");
    EXPECT_NE(std::string(error.what()).find("float64"), std::string::npos);
  }
  Case<float> f(CaseSpec{});
  options.backend = Backend::reference;
  EXPECT_THROW(gka_forward(f.inputs(), f.outputs(), options), Error);
}

// docs/numerics.md, section 10. Bounds are asserted for uncorrelated unit keys: 2.5e-2 at ridge
// ratios from 0.02 up; below that the worst case of rounding is larger than the answer, and the
// table says what it comes to.
TEST(Bf16Table, AgainstTheExactAnswerAndChebyshevInFloat64) {
  std::printf(
      "T=400 K=V=128, one gate, alpha, beta, chebyshev(30): relative errors of o\n"
      "%6s %7s  %-23s %-23s\n%6s %7s  %11s %11s %11s %11s %11s\n",
      "", "", "unit keys", "keys of correlation 0.9", "ridge", "memory", "chebyshev", "exact",
      "chebyshev", "exact", "its own");
  for (double ridge : {0.1, 0.02, 0.005, 0.001}) {
    for (double memory : {20.0, 200.0, 5000.0}) {
      double against_iteration[2], against_exact[2], own = 0;
      for (int correlated = 0; correlated < 2; ++correlated) {
        CaseSpec spec;
        spec.T = 400;
        spec.H = 1;
        spec.K = spec.V = 128;
        spec.g = spec.gk = spec.same_gate = spec.alpha = spec.beta = true;
        spec.ridge_ratio = ridge;
        spec.memory = memory;
        spec.key_correlation = correlated ? 0.9 : 0.0;
        spec.seed = 26000;
        Case<float> c(spec);
        gka_forward(c.inputs(), c.outputs(), bf16_options(spec));
        const auto oracle = [&](Solver solver) {
          Case<double> d = to_double(c);
          GkaOptions options = c.options();
          options.backend = Backend::reference;
          options.solver = solver;
          gka_forward(d.inputs(), d.outputs(), options);
          return d;
        };
        const Case<double> iteration = oracle(Solver::chebyshev), exact = oracle(Solver::direct);
        against_iteration[correlated] = relative_error(c.o.view(), iteration.o.view());
        against_exact[correlated] = relative_error(c.o.view(), exact.o.view());
        if (!correlated) own = relative_error(iteration.o.view(), exact.o.view());
      }
      std::printf("%6g %7g  %11.1e %11.1e %11.1e %11.1e %11.1e\n", ridge, memory,
                  against_iteration[0], against_exact[0], against_iteration[1], against_exact[1],
                  own);
      const std::string row =
          "ridge " + std::to_string(ridge) + " memory " + std::to_string(memory);
      EXPECT_TRUE(std::isfinite(against_exact[0]) && std::isfinite(against_exact[1])) << row;
      if (ridge >= 0.02) {
        EXPECT_LE(against_iteration[0], 2.5e-2) << row;
        EXPECT_LE(against_exact[0], 2.5e-2) << row;
      }
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
