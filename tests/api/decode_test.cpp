// gka_step's slots and drafts on the host's backends, and what is refused.
#include "support/decode.hpp"

#include <gtest/gtest.h>

#include "api/c_call.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/message_of.hpp"

namespace kalmanet::testing {
namespace {

void on_host(const GkaInputs& in, const GkaOutputs& out, const GkaOptions& options,
             const std::vector<Memory>&) {
  gka_step(in, out, options);
}

TEST(Decode, DraftsMatchTheOracle) {
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (int64_t K : {8, 20, 64}) {
      GkaOptions options;
      options.solver = solver;
      DecodeSpec spec;
      spec.K = K, spec.V = K == 20 ? 12 : K;
      spec.seed = static_cast<uint64_t>(K);
      spec.gates = K != 64, spec.beta = K != 20, spec.Hk = K == 20 ? 1 : 0;
      const Where where{"drafts", name(solver), "K=" + std::to_string(K)};
      Decode<float>().run(spec, on_host, options, 2e-5, 1e-6, where);
      Decode<double>().run(spec, on_host, options, 1e-9, 1e-14, where);
      Decode<BFloat16>().run(spec, on_host, options, 4e-3, 1e-6, where);
      options.backend = Backend::reference;
      Decode<double>().run(spec, on_host, options, 1e-13, 1e-14, where);
    }
  }
}

// The same through the C ABI.
TEST(Decode, DraftsOfCCallers) {
  const CPlan plan;
  const DecodeStep step = [&](const GkaInputs& in, const GkaOutputs& out, const GkaOptions&,
                              const std::vector<Memory>&) {
    const kalmanet_gka_inputs from = c_inputs(in);
    const kalmanet_gka_outputs to = c_outputs(out);
    ASSERT_TRUE(ok(kalmanet_gka_step(plan.plan, &from, &to, nullptr)));
  };
  Decode<float>().run({}, step, {}, 1e-5, 1e-6, {"drafts", "C ABI", ""});
  const std::vector<int32_t> slots = {0};
  GkaInputs in;
  in.slots = slots;
  kalmanet_gka_inputs from = c_inputs(in);
  from.slots_count = 0;
  const kalmanet_gka_outputs to = c_outputs({});
  EXPECT_TRUE(fails(kalmanet_gka_step(plan.plan, &from, &to, nullptr), KALMANET_INVALID_ARGUMENT,
                    "slots", "slots_count = 0"));
}

TEST(Decode, MistakesAreNamed) {
  CaseSpec spec;
  spec.B = 2, spec.T = 2, spec.h0 = spec.u0 = spec.g = true;
  Case<float> c(spec);
  const auto outputs = [&] {
    GkaOutputs out = c.outputs();
    out.h_final = c.h0.view(), out.u_final = c.u0.view();
    return out;
  };
  const auto message = [&](const GkaInputs& in) {
    return message_of([&] { gka_step(in, outputs()); });
  };
  std::vector<int32_t> slots = {0, 2}, accepted = {0, 3};
  GkaInputs in = c.inputs();
  in.slots = slots;
  EXPECT_NE(message(in).find("slots[1] is 2; the pool has 2"), std::string::npos) << message(in);
  slots = {1, 1};
  EXPECT_NE(message(in).find("two sequences have slot 1"), std::string::npos) << message(in);
  slots = {1};
  in.slots = slots;
  EXPECT_NE(message(in).find("must be one a sequence, 2"), std::string::npos) << message(in);
  slots = {1, 0};
  in.slots = slots;
  EXPECT_NE(message_of([&] { gka_step(in, c.outputs()); }).find("updated in place"),
            std::string::npos);
  EXPECT_NE(message_of([&] { gka_forward(in, outputs()); }).find("is an input of gka_step"),
            std::string::npos);
  in = c.inputs();
  in.accepted = accepted;
  EXPECT_NE(message(in).find("last_draft, which is absent"), std::string::npos) << message(in);
  in.last_draft = {in.k, in.v, {}, {}, {}};
  EXPECT_NE(message(in).find("last_draft.g"), std::string::npos) << message(in);
  in.last_draft.g = in.g;
  EXPECT_NE(message(in).find("accepted[1] is 3; must be in 0..2"), std::string::npos)
      << message(in);
  accepted = {0, 2};
  EXPECT_NO_THROW(gka_step(in, outputs()));
  in.is_draft = true;
  EXPECT_THROW(gka_backward(in, {}, c.output_grads(), c.grads()), Error);
}

}  // namespace
}  // namespace kalmanet::testing
