// A layer's decode step on CUDA without a GPU: the bodies of its kernels run by the CPU, those
// before and after the recurrence and the recurrence's own, beside the CPU room's layer_step on the
// same numbers, over several calls; and in the other order of threads, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/validate_layer_step.hpp"
#include "cpu/layer_step_case.hpp"
#include "cuda/choose_solver.hpp"
#include "cuda/emulation.hpp"
#include "cuda/layer_emulation.hpp"
#include "cuda/layer_step_body.hpp"
#include "cuda/layer_step_plan.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

template <class S, int kTaps>
void emulate_before(const cuda::LayerBeforeJob& job, bool backwards) {
  const int threads = cuda::layer_threads(job);
  for (int64_t n = 0; n < job.N; ++n) {
    for (int64_t unit = 0; unit < cuda::layer_heads(job) + job.num_gates; ++unit) {
      cuda::Poisoned shared(sizeof(cuda::LayerBeforeShared<S>));
      cuda::HostGroup<cuda::LayerBeforeRegisters<S, kTaps>> group(threads, backwards);
      cuda::run_layer_before<S, kTaps>(
          group, *reinterpret_cast<cuda::LayerBeforeShared<S>*>(shared.data()), job, unit, n,
          threads);
    }
  }
}

template <class S>
void emulate_after(const cuda::LayerAfterJob& job, bool backwards) {
  const int64_t blocks = (job.H + cuda::kLayerAfterHeads - 1) / cuda::kLayerAfterHeads;
  for (int64_t n = 0; n < job.N; ++n) {
    for (int64_t block = 0; block < blocks; ++block) {
      cuda::HostGroup<cuda::LayerAfterRegisters<S>> group(cuda::kLayerAfterThreads, backwards);
      cuda::run_layer_after<S>(group, job, block, n);
    }
  }
}

// What cuda::layer_step launches. Returns whether the step kernel was among it.
template <class T>
bool emulate_layer_step(const LayerStepInputs& in, const LayerStepStates& states, const View& o,
                        const View& residual, const LayerStepOptions& options, bool backwards) {
  using S = StateOf<T>;
  const core::GkaProblem problem = core::validate_layer_step(in, states, o, residual, options);
  cuda::Poisoned memory(cuda::layer_step_bytes(problem, in));
  const cuda::LayerStepPlan plan =
      cuda::plan_layer_step(problem, in, states, o, residual, options, memory.data());
  plan.before.W <= 4 ? emulate_before<S, 4>(plan.before, backwards)
                     : emulate_before<S, 16>(plan.before, backwards);
  const bool fast = cuda::with_solver(plan.problem, cuda::kStepsOfADirectSolve, [&](const auto& p) {
    const bool fits = cuda::fits_step(p, plan.outputs);
    if (fits) {
      cuda::emulate_step(p, plan.outputs, {backwards, false});
    } else {
      cuda::emulate(p, plan.outputs, true, {backwards, false});
    }
    return fits;
  });
  if (plan.norm.lanes != 0) {
    emulate_norm_vectors<T>(plan.norm, false, backwards);
  } else {
    emulate_after<S>(plan.after, backwards);
  }
  return fast;
}

template <class T, class P>
bool emulate_layer_step(LayerStepCase<T, P>& layer, bool residual, bool backwards) {
  return emulate_layer_step<T>(layer.inputs(), layer.states(), layer.o.view(),
                               residual ? layer.residual.view() : View(), layer.options(),
                               backwards);
}

// K = V = 128, for which the step kernels are.
const std::vector<LayerStepSpec> kFastSpecs = {
    {.what = "fast, GQA", .N = 2, .H = 2, .Hq = 2, .Hk = 1, .Hv = 1, .K = 128, .V = 128},
    {.what = "fast, learned ridge, strided, v as it is",
     .N = 1,
     .H = 2,
     .Hq = 1,
     .Hk = 2,
     .Hv = 2,
     .K = 128,
     .V = 128,
     .W = 3,
     .ridge = true,
     .v_conv = false,
     .num_iter = 0},
    {.what = "fast, no gates",
     .N = 1,
     .H = 2,
     .Hq = 2,
     .Hk = 2,
     .Hv = 2,
     .K = 128,
     .V = 128,
     .b = false,
     .alpha = false,
     .a = false,
     .gate = false,
     .fixed_alpha = 0.3,
     .solver = Solver::direct},
};

struct Bounds {
  double o, states, by_few;  // by_few: where few tokens at once take 16-bit q, k, v
};

// Beside the CPU: two ways of rounding float32 (float64) sums; of 16 bits o is rounded twice here
// and once there, independently of one another: 1.73 roundings.
template <class T, class P = T>
void check(const std::vector<LayerStepSpec>& specs, const Bounds& bounds, bool fast) {
  for (const LayerStepSpec& spec : specs) {
    const Where where{std::string("emulated CUDA layer_step of ") + name(DTypeOf<T>::value), "host",
                      spec.what};
    LayerStepCase<T, P> layer(spec, 77), other(spec, 77), cpu(spec, 77);
    const bool chosen = spec.num_iter == kAutoNumIter || spec.solver != Solver::chebyshev;
    int call = 0;
    for (const int64_t count : {5, 1, 1, 8}) {
      for (LayerStepCase<T, P>* each : {&layer, &other, &cpu}) each->new_tokens(count);
      const bool residual = !fast && ++call % 2 == 0;
      constexpr bool kDouble = std::is_same_v<T, double>;
      EXPECT_EQ(emulate_layer_step(layer, residual, false), fast && !kDouble) << spec.what;
      emulate_layer_step(other, residual, true);
      layer_step(cpu.inputs(), cpu.states(), cpu.o.view(), cpu.residual.view(), cpu.options());
      const double slack = chosen ? 2 * layer.kTolerance + (kIsHalf<T> ? 0x1p-12 : 0) : 0;
      const bool rounded = fast && kIsHalf<T>;  // (from the first few tokens on, states too)
      EXPECT_TRUE(within(where, "o", layer.o.values(), cpu.o.values(),
                         (rounded ? bounds.by_few : bounds.o) + slack));
      EXPECT_TRUE(within(where, "h", layer.h.values(), cpu.h.values(),
                         rounded ? bounds.by_few : bounds.states));
      EXPECT_TRUE(within(where, "u", layer.u.values(), cpu.u.values(),
                         rounded ? bounds.by_few : bounds.states));
      EXPECT_EQ(layer.conv_q.values(), cpu.conv_q.values()) << spec.what;
      EXPECT_EQ(layer.conv_k.values(), cpu.conv_k.values()) << spec.what;
      EXPECT_EQ(layer.conv_v.values(), cpu.conv_v.values()) << spec.what;
      EXPECT_EQ(layer.o.values(), other.o.values()) << spec.what << ", in the other order";
      EXPECT_EQ(layer.h.values(), other.h.values()) << spec.what << ", in the other order";
      EXPECT_TRUE(layer.o.gaps_intact() && layer.h.gaps_intact() && layer.u.gaps_intact() &&
                  layer.conv_q.gaps_intact() && layer.conv_k.gaps_intact())
          << spec.what;
      if (!residual) continue;
      for (const double r : layer.residual.values()) EXPECT_LT(r, 2e-3) << spec.what;
    }
  }
}

TEST(CudaLayerStepEmulation, BesideTheCpu) {
  check<float>(kLayerStepSpecs, {2e-5, 2e-6, 0}, false);
  check<double>(kLayerStepSpecs, {1e-11, 1e-13, 0}, false);
  check<BFloat16>(kLayerStepSpecs, {2 * kRoundoff<BFloat16>, 2e-6, 0}, false);
  check<Float16, float>(kLayerStepSpecs, {2 * kRoundoff<Float16>, 2e-6, 0}, false);
}

TEST(CudaLayerStepEmulation, BesideTheCpuByTheStepKernel) {
  check<float>(kFastSpecs, {2e-5, 2e-6, 0}, true);
  check<double>({kFastSpecs[0]}, {1e-11, 1e-13, 0}, true);
  check<BFloat16, float>(kFastSpecs, {0, 0, 8 * kRoundoff<BFloat16>}, true);
  check<Float16>({kFastSpecs[0]}, {0, 0, 8 * kRoundoff<Float16>}, true);
}

// The first `count` tokens of the case's, from its token `first` on.
template <class T, class P>
bool part_of(LayerStepCase<T, P>& layer, int64_t first, int64_t count) {
  LayerStepInputs in = layer.inputs();
  const auto from = [&](auto* x) {
    if (!x->defined()) return;
    x->data = const_cast<T*>(static_cast<const T*>(x->data)) + first * x->stride[1];
    x->size[1] = count;
  };
  for (ConstView* x : {&in.q, &in.k, &in.v, &in.gate, &in.b, &in.alpha, &in.a, &in.ridge}) from(x);
  View o = layer.o.view();
  from(&o);
  return emulate_layer_step<T>(in, layer.states(), o, {}, layer.options(), false);
}

// Tokens at once or one by one: the same bits in the states. (One by one these tensors' rows are
// not dense, and then the gated norm adds its squares in another order.)
TEST(CudaLayerStepEmulation, HasOneMeaning) {
  std::vector<LayerStepSpec> specs = kLayerStepSpecs;
  specs.insert(specs.end(), kFastSpecs.begin(), kFastSpecs.end());
  for (const LayerStepSpec& spec : specs) {
    LayerStepCase<float> once(spec, 5), single(spec, 5);
    once.new_tokens(4), single.new_tokens(4);
    emulate_layer_step(once, false, false);
    for (int64_t t = 0; t < 4; ++t) part_of(single, t, 1);
    const Where where{"emulated CUDA layer_step of float32", "host", spec.what};
    EXPECT_TRUE(within(where, "o", single.o.values(), once.o.values(), 4 * kRoundoff<float>));
    EXPECT_EQ(once.h.values(), single.h.values()) << spec.what;
    EXPECT_EQ(once.u.values(), single.u.values()) << spec.what;
    EXPECT_EQ(once.conv_q.values(), single.conv_q.values()) << spec.what;
    EXPECT_EQ(once.conv_v.values(), single.conv_v.values()) << spec.what;
  }
}

// One or two 16-bit tokens: q, k and v are not rounded on their way, o is twice in all.
TEST(CudaLayerStepEmulation, OneTokenOf16BitsIsRoundedTwice) {
  LayerStepCase<BFloat16, float> layer(kFastSpecs[0], 31), cpu(kFastSpecs[0], 31);
  for (int call = 0; call < 6; ++call) {
    layer.new_tokens(1 + call % 2), cpu.new_tokens(1 + call % 2);
    EXPECT_TRUE(emulate_layer_step(layer, false, call % 2 == 1));
    layer_step(cpu.inputs(), cpu.states(), cpu.o.view(), {}, cpu.options());
    const Where where{"emulated CUDA layer_step of bfloat16", "host", kFastSpecs[0].what};
    EXPECT_TRUE(within(where, "o", layer.o.values(), cpu.o.values(), 2 * kRoundoff<BFloat16>));
    EXPECT_TRUE(within(where, "h", layer.h.values(), cpu.h.values(), 2e-6));
    EXPECT_TRUE(within(where, "u", layer.u.values(), cpu.u.values(), 2e-6));
  }
}

// Nobody has looked for a NaN among the ridge's logits: its token and head answer NaN, no other.
TEST(CudaLayerStepEmulation, RidgeLogitsThatAreNotFinite) {
  LayerStepSpec spec = kFastSpecs[1];
  spec.Hq = 2;
  for (const int64_t K : {128, 20}) {
    for (const Solver solver : {Solver::chebyshev, Solver::direct, Solver::automatic}) {
      spec.K = spec.V = K, spec.solver = solver;
      LayerStepCase<float> layer(spec, 9), same(spec, 9);
      layer.new_tokens(1), same.new_tokens(1);
      LayerStepInputs in = layer.inputs();
      float* const logit = static_cast<float*>(layer.ridge.view().data);
      logit[0] = std::numeric_limits<float>::infinity();
      static_cast<float*>(same.ridge.view().data)[0] = 100.0f;
      logit[1] = std::numeric_limits<float>::quiet_NaN();
      LayerStepOptions options = layer.options();
      options.gka.backend = Backend::cuda;
      emulate_layer_step<float>(in, layer.states(), layer.o.view(), {}, options, false);
      emulate_layer_step(same, false, false);
      const std::vector<double> got = layer.o.values(), want = same.o.values();
      for (size_t i = 0; i < got.size(); ++i) {
        const bool second = i / static_cast<size_t>(K) % 2 == 1;
        EXPECT_TRUE(second ? std::isnan(got[i]) : got[i] == want[i])
            << name(solver) << ", K " << K << ", element " << i << ": " << got[i];
      }
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
