// The first tokens of a sequence, where the output's error can be thousands of times float32's
// rounding and the kernels switch to float64 (kLargestAmplification in gka_forward.hpp,
// kLargestStepAmplification in gka_step.hpp).
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "cpu/gka_cases.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

constexpr int64_t kSeen = 6;  // at most so many tokens before
constexpr int64_t kNew = 6;   // tokens whose outputs are compared
constexpr double kBound = 1e-5;

// States after `seen` tokens by the kernel, then kNew more by forward or step, against the oracle
// run from the very same states.
void check(const CaseSpec& spec, int64_t seen, bool step, WorstErrors& worst) {
  Case<float> past(spec);
  GkaOptions options = past.options();
  const auto piece = [](auto view, int64_t begin, int64_t n) {
    view.data =
        static_cast<std::conditional_t<std::is_same_v<decltype(view), View>, float*, const float*>>(
            view.data) +
        begin * view.stride[1];
    view.size[1] = n;
    return view;
  };
  const auto inputs = [&](int64_t begin, int64_t n) {
    GkaInputs in = past.inputs();
    in.q = piece(in.q, begin, n);
    in.k = piece(in.k, begin, n);
    in.v = piece(in.v, begin, n);
    return in;
  };
  GkaInputs next = inputs(seen, kNew);
  if (seen > 0) {
    GkaOutputs out = past.outputs();
    out.x = out.residual = View();
    out.o = piece(out.o, 0, seen);
    gka_forward(inputs(0, seen), out, options);
    next.h0 = past.h_final.view();
    next.u0 = past.u_final.view();
  }
  const int64_t H = spec.H, V = spec.V;
  std::vector<float> o(static_cast<size_t>(kNew * H * V)), expected(o.size());
  GkaOutputs out;
  out.o = dense(o.data(), {1, kNew, H, V});
  step ? gka_step(next, out, options) : gka_forward(next, out, options);
  out.o = dense(expected.data(), {1, kNew, H, V});
  options.backend = Backend::reference;
  gka_forward(next, out, options);

  const Where where{
      (step ? "gka_step after " : "gka_forward after ") + std::to_string(seen) + " tokens",
      name(instruction_set()), describe(spec)};
  const ConstView got = dense(std::as_const(o).data(), {1, kNew, H, V});
  const ConstView want = dense(std::as_const(expected).data(), {1, kNew, H, V});
  EXPECT_TRUE(within(where, "o", got, want, kBound));
  worst.add(std::string(step ? "step" : "forward") + ", ridge " + std::to_string(spec.ridge_ratio),
            relative_error(got, want));
}

TEST(FirstTokens, StayWithinTheBound) {
  WorstErrors worst;
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    for (int64_t K : {5, 64, 128}) {
      for (double ridge : {0.1, 0.02, 0.005}) {
        for (double correlation : {0.0, 0.9}) {
          for (uint64_t seed = 1; seed <= 2; ++seed) {
            CaseSpec spec;
            spec.T = kSeen + kNew;
            spec.H = 2;
            spec.K = K;
            spec.V = 16;
            spec.ridge_ratio = ridge;
            spec.key_correlation = correlation;
            spec.seed = 5000 + seed;
            for (int64_t seen : {0, 1, 2, 6}) {
              check(spec, seen, false, worst);
              check(spec, seen, true, worst);
            }
          }
        }
      }
    }
  }
  worst.print("worst relative errors of o in a sequence's first tokens:");
}

}  // namespace
}  // namespace kalmanet::testing
