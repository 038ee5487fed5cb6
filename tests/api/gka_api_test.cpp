// The public entry points of Gated KalmaNet, end to end: what they compute against the reference,
// with whose threads, and that an error leaves every output alone. (Kernels are tested in
// tests/cpu.)
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <string>

#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet {
namespace {

using testing::Case;
using testing::CaseSpec;
using testing::describe;
using testing::Where;
using testing::within;

CaseSpec everything() {
  CaseSpec spec;
  spec.B = 2;
  spec.T = 70;
  spec.H = 4;
  spec.Hk = 2;
  spec.Hv = 1;
  spec.K = 20;
  spec.V = 12;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.ridge_tensor = spec.h0 = spec.u0 = true;
  spec.strided = true;
  return spec;
}

TEST(GkaApi, CpuAgreesWithTheReference) {
  for (bool packed : {false, true}) {
    CaseSpec spec = everything();
    if (packed) spec.lengths = {5, 0, 1, 64, 13};
    Case<float> cpu(spec);
    Case<double> oracle = testing::to_double(cpu);
    GkaOptions options;
    GkaOptions reference = options;
    reference.backend = Backend::reference;
    gka_forward(cpu.inputs(), cpu.outputs(), options);
    gka_forward(oracle.inputs(), oracle.outputs(), reference);
    gka_backward(cpu.inputs(), cpu.x.view(), cpu.output_grads(), cpu.grads(), options);
    gka_backward(oracle.inputs(), {}, oracle.output_grads(), oracle.grads(), reference);
    const Where forward{"gka_forward", name(instruction_set()), describe(spec)};
    const Where backward{"gka_backward", name(instruction_set()), describe(spec)};
    testing::for_each_output(cpu, oracle, [&](const char* t, const auto& got, const auto& want) {
      EXPECT_TRUE(within(forward, t, got, want, 1e-5));
    });
    testing::for_each_gradient(cpu, oracle, [&](const char* t, const auto& got, const auto& want) {
      EXPECT_TRUE(within(backward, t, got, want, 1e-4));
    });
    EXPECT_TRUE(cpu.gaps_intact());
    Case<float> step(spec);
    gka_step(step.inputs(), step.outputs(), options);
    testing::for_each_output(step, oracle, [&](const char* t, const auto& got, const auto& want) {
      EXPECT_TRUE(
          within({"gka_step", name(instruction_set()), describe(spec)}, t, got, want, 1e-5));
    });
  }
}

// A host program's executor runs all tasks, and neither it nor the thread count changes a bit.
class CountingExecutor final : public Executor {
 public:
  int concurrency() const noexcept override { return 3; }
  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    for (int64_t i = n - 1; i >= 0; --i) {  // an order of its own
      ++count;
      task(i);
    }
  }
  int64_t count = 0;
};

TEST(GkaApi, AnyExecutorAndThreadCountGiveTheSameBits) {
  const CaseSpec spec = everything();
  const int before = num_threads();
  for (Backend backend : {Backend::cpu, Backend::reference}) {
    GkaOptions options;
    options.backend = backend;
    Case<float> expected(spec);
    set_num_threads(1);
    gka_forward(expected.inputs(), expected.outputs(), options);
    gka_backward(expected.inputs(), {}, expected.output_grads(), expected.grads(), options);
    const auto check = [&](Case<float>& c, const std::string& how) {
      gka_forward(c.inputs(), c.outputs(), options);
      gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), options);
      const auto same = [&](const char* t, const ConstView& got, const ConstView& want) {
        EXPECT_TRUE(testing::identical({how, name(backend), describe(spec)}, t, got, want));
      };
      testing::for_each_output(c, expected, same);
      testing::for_each_gradient(c, expected, same);
    };
    for (int threads : {2, 5}) {
      set_num_threads(threads);
      Case<float> c(spec);
      check(c, std::to_string(threads) + " threads");
    }
    CountingExecutor executor;
    options.executor = &executor;
    Case<float> c(spec);
    check(c, "another executor");
    EXPECT_GT(executor.count, 1);
  }
  set_num_threads(before);
}

TEST(GkaApi, AnErrorLeavesOutputsAlone) {
  const CaseSpec spec = everything();
  Case<float> c(spec);
  GkaOptions options;
  options.num_iter = -3;
  EXPECT_THROW(gka_forward(c.inputs(), c.outputs(), options), Error);
  EXPECT_THROW(gka_step(c.inputs(), c.outputs(), options), Error);
  EXPECT_THROW(gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), options), Error);
  options.num_iter = 30;
  // The last thing to be looked at: one token's ridge ratio.
  c.ridge_ratio[spec.B * spec.T * spec.H - 1] = -1;
  for (auto* operation : {&gka_forward, &gka_step}) {
    try {
      operation(c.inputs(), c.outputs(), options);
      FAIL();
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(),
                   "ridge_ratio: ridge_ratio[1, 69, 3] is -1; every ratio must be > 0 and finite");
    }
  }
  for (const auto* t : {&c.o, &c.x, &c.h_final, &c.u_final, &c.residual, &c.dq}) {
    for (double e : t->values()) ASSERT_TRUE(std::isnan(e));
  }
}

// The backward takes saved_x for the solutions instead of solving again: with zeros in it, da_t,
// which is -(z_t . x_t) f_t, is zero.
TEST(GkaApi, TheBackwardUsesSavedSolutions) {
  const CaseSpec spec = everything();
  for (Backend backend : {Backend::cpu, Backend::reference}) {
    Case<float> c(spec);
    GkaOptions options;
    options.backend = backend;
    c.x.fill([](int64_t) { return 0.0; });
    gka_backward(c.inputs(), c.x.view(), c.output_grads(), c.grads(), options);
    for (double e : c.d_ridge_ratio.values()) ASSERT_EQ(e, 0) << name(backend);
    gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), options);
    for (double e : c.d_ridge_ratio.values()) ASSERT_NE(e, 0) << name(backend);
  }
}

TEST(GkaApi, ReportsAutomaticIterations) {
  CaseSpec spec = everything();
  spec.ridge_tensor = false;
  Case<float> c(spec);
  GkaOptions options;
  options.num_iter = kAutoNumIter;
  options.tolerance = 1e-3;
  for (Backend backend : {Backend::cpu, Backend::reference}) {
    options.backend = backend;
    const GkaReport report = gka_forward(c.inputs(), c.outputs(), options);
    EXPECT_EQ(report.min_iterations, chebyshev_num_iter(0.02, 1e-3)) << name(backend);
    EXPECT_EQ(report.max_iterations, chebyshev_num_iter(0.02, 1e-3)) << name(backend);
  }
}

}  // namespace
}  // namespace kalmanet
