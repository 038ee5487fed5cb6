// Training with bfloat16 matrix products stays beside training in float32.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "models/language_model.hpp"
#include "train/autocast.hpp"
#include "train/helpers.hpp"
#include "train/trainer.hpp"

namespace kalmanet::train {
namespace {

namespace fs = std::filesystem;

// As the presets have it: every gate, a learned ridge ratio, solver direct.
models::ModelConfig learned_config() {
  models::ModelConfig config = test::tiny_config();
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.head_dim = 16;
  config.gka.learned_ridge = true;
  config.gka.solver_type = "direct";
  config.gka.num_iter = 0;
  return config;
}

// Of one batch: the loss, and the gradient of every parameter.
std::pair<double, std::vector<at::Tensor>> gradients(models::HybridLanguageModel& model,
                                                     const at::Tensor& ids, bool bf16) {
  model->zero_grad();
  const int64_t context = ids.size(1) - 1;
  double value = 0;
  {
    const Autocast autocast(bf16, at::kCPU);
    const at::Tensor logits = model->forward(ids.narrow(1, 0, context).contiguous());
    const at::Tensor loss = at::cross_entropy_loss(logits.flatten(0, 1).to(at::kFloat),
                                                   ids.narrow(1, 1, context).flatten());
    value = loss.item<double>();
    loss.backward();
  }
  std::vector<at::Tensor> all;
  for (const auto& item : model->named_parameters()) {
    EXPECT_EQ(item.value().grad().scalar_type(), at::kFloat) << item.key();
    all.push_back(item.value().grad().detach().clone());
  }
  return {value, std::move(all)};
}

// One step's gradients. A product in bfloat16 errs by u = 2^-9 of its operands; a gradient has
// passed through about 20 of them in this model, whose errors are independent: u sqrt(20) = 0.9%.
// The gates' gradients are sums in which terms cancel, hence the factor of 6. What the
// operator itself would lose in bfloat16 is beyond that: x is amplified (docs/numerics.md, 6).
TEST(Bf16, GradientsAreThoseOfFloat32) {
  torch::manual_seed(3);
  models::HybridLanguageModel model(learned_config());
  const at::Tensor ids = torch::randint(256, {4, 49}, torch::kInt64);
  const auto [loss, exact] = gradients(model, ids, false);
  const auto [rounded_loss, rounded] = gradients(model, ids, true);
  EXPECT_NEAR(rounded_loss, loss, 2e-3);
  EXPECT_NE(rounded_loss, loss) << "nothing was rounded";
  const auto parameters = model->named_parameters();
  double largest = 0;
  std::string where;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double size = exact[i].norm().item<double>();
    ASSERT_GT(size, 0) << parameters[i].key();
    const double error = (rounded[i] - exact[i]).norm().item<double>() / size;
    EXPECT_LT(error, 0.055) << parameters[i].key() << ", seed 3";
    if (error > largest) {
      largest = error;
      where = parameters[i].key();
    }
  }
  std::printf("bf16: loss off by %.1e, largest relative error of a gradient %.4f (%s)\n",
              rounded_loss - loss, largest, where.c_str());
}

TEST(Bf16, EndsWhereFloat32Ends) {
  const TemporaryFolder folder;
  test::write_text(folder.path() / "text.txt", test::some_text(20000));
  TrainOptions options;
  options.text = (folder.path() / "text.txt").string();
  options.steps = 300;
  options.batch = 4;
  options.context = 48;
  options.warmup = 20;
  options.lr = 5e-3;
  options.eval_every = 1000;
  options.checkpoint_every = 1000;
  options.threads = 1;
  double loss[2];
  for (const bool bf16 : {false, true}) {
    options.dtype = bf16 ? "bf16" : "float32";
    const TrainSummary summary =
        train_model(options, learned_config(), folder.path() / options.dtype, StartMode::fresh);
    ASSERT_EQ(summary.step, options.steps);
    loss[bf16] = summary.valid.loss();
    ASSERT_TRUE(std::isfinite(loss[bf16]));
  }
  std::printf("validation after 300 steps: float32 %.4f, bf16 %.4f nats\n", loss[0], loss[1]);
  EXPECT_LT(loss[0], 1.5) << "seed 1";  // it has learnt: a uniform guess costs 5.55
  EXPECT_NE(loss[0], loss[1]);
  EXPECT_NEAR(loss[1], loss[0], 0.01) << "seed 1";
}

}  // namespace
}  // namespace kalmanet::train
