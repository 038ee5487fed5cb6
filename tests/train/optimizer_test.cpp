// AdamW beside PyTorch's own, decay groups, clipping.
#include "train/optimizer.hpp"

#include <gtest/gtest.h>

namespace kalmanet::train {
namespace {

AdamW::NamedTensors some_parameters() {
  torch::manual_seed(3);
  AdamW::NamedTensors parameters = {{"w", torch::randn({7, 5})}, {"bias", torch::randn({33})}};
  for (auto& [name, p] : parameters) p.requires_grad_();
  return parameters;
}

TEST(AdamW, EqualsPyTorchsOwnOverTwentySteps) {
  AdamW::NamedTensors ours = some_parameters(), theirs = some_parameters();
  AdamW optimizer(ours, {0.9, 0.95, 1e-8, 0.1});
  using torch::optim::AdamWOptions;
  const auto options = [](double decay) {
    return AdamWOptions(1e-2).betas({0.9, 0.95}).eps(1e-8).weight_decay(decay);
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<at::Tensor>{theirs[0].second},
                      std::make_unique<AdamWOptions>(options(0.1)));
  groups.emplace_back(std::vector<at::Tensor>{theirs[1].second},
                      std::make_unique<AdamWOptions>(options(0.0)));
  torch::optim::AdamW reference(groups, options(0.1));
  for (int step = 0; step < 20; ++step) {
    for (size_t i = 0; i < ours.size(); ++i) {
      const at::Tensor grad = torch::randn_like(ours[i].second);
      ours[i].second.mutable_grad() = grad.clone();
      theirs[i].second.mutable_grad() = grad.clone();
    }
    optimizer.step(1e-2);
    reference.step();
    for (size_t i = 0; i < ours.size(); ++i) {
      const double error = (ours[i].second - theirs[i].second).abs().max().item<double>();
      ASSERT_LE(error, 2e-6) << ours[i].first << " at step " << step;
    }
  }
  EXPECT_EQ(optimizer.steps_taken(), 20);
}

TEST(AdamW, DecaysMatricesAndKernelsOnly) {
  const auto matrix = torch::zeros({2, 2}), vector = torch::zeros({2});
  EXPECT_TRUE(decays("model.layers.0.gka.q_proj.weight", matrix));
  EXPECT_TRUE(decays("model.layers.0.gka.q_conv1d.weight", torch::zeros({2, 1, 4})));
  EXPECT_TRUE(decays("lm_head.weight", matrix));
  EXPECT_FALSE(decays("model.embed_tokens.weight", matrix));
  for (const char* name : {"model.layers.0.gka.A_log", "model.layers.0.gka.dt_bias",
                           "model.layers.0.gka.o_norm.weight", "model.norm.weight",
                           "model.layers.0.gka.b_proj.bias"}) {
    EXPECT_FALSE(decays(name, vector)) << name;
  }
  // And it is applied so: with zero gradients only decay moves a weight.
  AdamW::NamedTensors parameters = {{"w", torch::ones({2, 2})}, {"bias", torch::ones({2})}};
  for (auto& [name, p] : parameters) {
    p.requires_grad_();
    p.mutable_grad() = torch::zeros_like(p);
  }
  AdamW(parameters, {0.9, 0.95, 1e-8, 0.5}).step(0.1);
  EXPECT_NEAR(parameters[0].second[0][0].item<double>(), 0.95, 1e-6);
  EXPECT_EQ(parameters[1].second[0].item<double>(), 1.0);
}

TEST(AdamW, ClipScalesTheJointNorm) {
  AdamW::NamedTensors parameters = {{"w", torch::zeros({2, 2})}, {"bias", torch::zeros({1})}};
  for (auto& [name, p] : parameters) p.requires_grad_();
  parameters[0].second.mutable_grad() = torch::full({2, 2}, 1.0f);
  parameters[1].second.mutable_grad() = torch::full({1}, 2.0f * std::sqrt(3.0f));
  AdamW optimizer(parameters, {});
  EXPECT_NEAR(optimizer.clip(0), 4.0, 1e-6);
  EXPECT_EQ(parameters[0].second.grad()[0][0].item<float>(), 1.0f) << "0 never scales";
  EXPECT_NEAR(optimizer.clip(1.0), 4.0, 1e-6);
  EXPECT_NEAR(optimizer.clip(1.0), 1.0, 1e-6);
  optimizer.zero_grad();
  EXPECT_EQ(optimizer.clip(1.0), 0.0);
}

TEST(AdamW, RefusesWeightsThatAreNotFloat32) {
  const AdamW::NamedTensors parameters = {
      {"w", torch::zeros({2, 2}, torch::kBFloat16).requires_grad_()}};
  EXPECT_THROW(AdamW(parameters, {}), std::runtime_error);
}

}  // namespace
}  // namespace kalmanet::train
