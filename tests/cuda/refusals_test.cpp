// What the CUDA backend does not do is an error that says so, with a GPU or without.
#include <gtest/gtest.h>

#include "cpu/layer_step_case.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/message_of.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {
namespace {

TEST(CudaRefusals, NameWhatToPassInstead) {
  CaseSpec spec;
  Case<float> c(spec);
  GkaOptions options;
  options.backend = Backend::cuda;
  const auto refusal = [&](const GkaOptions& with) {
    return message_of([&] { gka_forward(c.inputs(), c.outputs(), with); });
  };
  GkaOptions cg = options;
  cg.solver = Solver::cg;
  EXPECT_NE(refusal(cg).find("pass solver chebyshev, direct or auto"), std::string::npos)
      << refusal(cg);
  const std::string backward =
      message_of([&] { gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), cg); });
  EXPECT_NE(backward.find("pass solver chebyshev, direct or auto"), std::string::npos) << backward;
  for (double e : c.o.values()) EXPECT_TRUE(std::isnan(e)) << "an output was written";
}

// Of a layer's step as well, before anything is written.
TEST(CudaRefusals, ALayersStepSaysSoToo) {
  LayerStepCase<float> layer(kLayerStepSpecs[0], 3);
  layer.new_tokens(1);
  LayerStepOptions options = layer.options();
  options.gka.backend = Backend::cuda;
  const auto refusal = [&] {
    return message_of(
        [&] { layer_step(layer.inputs(), layer.states(), layer.o.view(), {}, options); });
  };
  options.gka.solver = Solver::cg;
  EXPECT_NE(refusal().find("pass solver chebyshev, direct or auto"), std::string::npos)
      << refusal();
  options.gka.solver = Solver::chebyshev;
  if (!backends().back().available) {
    EXPECT_NE(refusal().find("no NVIDIA GPU"), std::string::npos) << refusal();
  }
  for (double e : layer.o.values()) EXPECT_TRUE(std::isnan(e)) << "an output was written";
  for (double e : layer.conv_q.values()) EXPECT_EQ(e, 0.0) << "a state was written";
}

TEST(CudaRefusals, AMachineWithoutAGpuSaysSo) {
  const std::vector<BackendInfo> all = backends();
  ASSERT_EQ(all.back().backend, Backend::cuda);
  if (all.back().available) GTEST_SKIP() << "there is a GPU here: " << all.back().detail;
  EXPECT_NE(all.back().detail.find("no NVIDIA GPU"), std::string::npos) << all.back().detail;
  CaseSpec spec;
  Case<float> c(spec);
  GkaOptions options;
  options.backend = Backend::cuda;
  const std::string message = message_of([&] { gka_forward(c.inputs(), c.outputs(), options); });
  EXPECT_NE(message.find("no NVIDIA GPU"), std::string::npos) << message;
}

}  // namespace
}  // namespace kalmanet::testing
