// Gradient checkpointing: the same gradients bit for bit, with autocast, frozen parameters, random
// numbers, and through torch::autograd::grad.
#include "models/checkpointing.hpp"

#include <ATen/autocast_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "models/small_model.hpp"
#include "support/message_of.hpp"

namespace kalmanet::models {
namespace {

using at::Tensor;
using testing::HasSubstr;

std::vector<Tensor> gradients(HybridLanguageModel& model, const std::function<Tensor()>& loss) {
  model->zero_grad();
  loss().backward();
  std::vector<Tensor> all;
  for (const Tensor& p : model->parameters()) {
    all.push_back(p.grad().defined() ? p.grad().clone() : Tensor());
  }
  return all;
}

void expect_equal_gradients(const HybridLanguageModel& model, const std::vector<Tensor>& a,
                            const std::vector<Tensor>& b, const std::string& what) {
  size_t i = 0;
  for (const auto& item : model->named_parameters()) {
    ASSERT_EQ(a[i].defined(), b[i].defined()) << what << " " << item.key();
    if (a[i].defined()) {
      EXPECT_TRUE(at::equal(a[i], b[i])) << what << " " << item.key();
      EXPECT_GT(a[i].abs().sum().item<double>(), 0) << what << " " << item.key();
    }
    ++i;
  }
}

struct Autocast {
  explicit Autocast(bool on) : on_(on) {
    if (!on_) return;
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (!on_) return;
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
  bool on_;
};

TEST(GradientCheckpointing, SameGradientsBitForBit) {
  for (const bool packed : {false, true}) {
    for (const bool autocast : {false, true}) {
      HybridLanguageModel model = small_model(small_config("GKA-*"));
      const Tensor ids = packed ? random_ids(1, 60) : random_ids(2, 30);
      std::optional<Tensor> cu;
      if (packed) cu = at::tensor({0, 13, 14, 60}, at::kLong);
      const auto loss = [&] {
        const Autocast guard(autocast);
        return model->forward(ids, cu).to(at::kFloat).square().mean();
      };
      const auto plain = gradients(model, loss);
      model->set_gradient_checkpointing(true);
      const auto checkpointed = gradients(model, loss);
      expect_equal_gradients(
          model, plain, checkpointed,
          std::string(packed ? "packed" : "batch") + (autocast ? " autocast" : ""));
      // With the backward inside the autocast region, too.
      if (autocast) {
        model->zero_grad();
        const Autocast guard(true);
        model->forward(ids, cu).to(at::kFloat).square().mean().backward();
        std::vector<Tensor> inside;
        for (const Tensor& p : model->parameters()) inside.push_back(p.grad().clone());
        expect_equal_gradients(model, plain, inside, "backward inside autocast");
      }
    }
  }
}

TEST(GradientCheckpointing, FrozenParametersAndGradFunction) {
  HybridLanguageModel model = small_model(small_config("GKA-*"));
  const Tensor ids = random_ids(2, 20);
  model->named_parameters()["model.layers.0.gka.q_proj.weight"].requires_grad_(false);
  model->named_parameters()["model.embed_tokens.weight"].requires_grad_(false);
  const auto loss = [&] { return model->forward(ids).square().mean(); };
  const auto plain = gradients(model, loss);
  model->set_gradient_checkpointing(true);
  expect_equal_gradients(model, plain, gradients(model, loss), "frozen");
  // torch::autograd::grad returns them, and leaves .grad alone.
  model->zero_grad();
  const Tensor weight = model->named_parameters()["model.layers.1.mlp.up_proj.weight"];
  const auto found = torch::autograd::grad({loss()}, {weight});
  EXPECT_GT(found[0].abs().sum().item<double>(), 0);
  for (const auto& item : model->named_parameters()) {
    EXPECT_FALSE(item.value().grad().defined() && item.value().grad().any().item<bool>())
        << item.key();
  }
  EXPECT_THAT(message_of([&] { torch::autograd::grad({loss()}, {weight}, {}, true, true); }),
              HasSubstr("create_graph"));
}

TEST(GradientCheckpointing, RandomNumbersAreReplayed) {
  torch::manual_seed(5);
  const Tensor weight = at::randn({8, 8}).requires_grad_();
  const Tensor x = at::randn({4, 8});
  const auto noisy = [&](const Tensor& in) {
    return at::dropout(in.matmul(weight), 0.5, true).square();
  };
  torch::manual_seed(6);
  const Tensor plain = torch::autograd::grad({noisy(x).sum()}, {weight})[0];
  const Tensor next_plain = at::rand({1});
  torch::manual_seed(6);
  const Tensor out = checkpoint(noisy, x, {weight});
  const Tensor between = at::rand({1});
  const Tensor checkpointed = torch::autograd::grad({out.sum()}, {weight})[0];
  EXPECT_TRUE(at::equal(plain, checkpointed));
  EXPECT_TRUE(at::equal(next_plain, between));
  // The second run leaves the generator where it was.
  torch::manual_seed(6);
  at::dropout(x.matmul(weight.detach()), 0.5, true);
  const Tensor first = at::rand({1}), second = at::rand({1});
  EXPECT_TRUE(at::equal(first, between));
  torch::manual_seed(6);
  const Tensor o2 = checkpoint(noisy, x, {weight});
  at::rand({1});
  torch::autograd::grad({o2.sum()}, {weight});
  EXPECT_TRUE(at::equal(at::rand({1}), second));
}

}  // namespace
}  // namespace kalmanet::models
