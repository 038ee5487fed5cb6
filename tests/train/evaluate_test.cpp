// Scores: on independent windows, and over a file with the state carried along.
#include "train/evaluate.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "train/data.hpp"
#include "train/helpers.hpp"

namespace kalmanet::train {
namespace {

using test::some_text;
using test::write_text;

models::HybridLanguageModel make_model(const models::ModelConfig& config) {
  torch::manual_seed(9);
  models::HybridLanguageModel model(config);
  const torch::NoGradGuard no_grad;
  // Larger weights than at the start, so that the past matters to the predictions.
  for (auto& p : model->parameters()) {
    if (p.dim() == 2) p.mul_(8);
  }
  model->eval();
  return model;
}

// Every byte but the first, in one forward pass.
double whole_pass(models::HybridLanguageModel& model, const std::string& text) {
  const torch::NoGradGuard no_grad;
  const at::Tensor ids = torch::empty({1, static_cast<int64_t>(text.size())}, torch::kInt64);
  for (size_t i = 0; i < text.size(); ++i) {
    ids[0][static_cast<int64_t>(i)] = token_of(static_cast<uint8_t>(text[i]));
  }
  const int64_t n = ids.size(1) - 1;
  const at::Tensor logits = model->forward(ids.narrow(1, 0, n).contiguous());
  return at::cross_entropy_loss(logits[0], ids[0].narrow(0, 1, n), {}, at::Reduction::Sum)
      .item<double>();
}

TEST(ScoreFile, TheStateIsCarriedSoWindowsDoNotMatter) {
  const TemporaryFolder folder;
  const std::string text = some_text(500);
  write_text(folder.path() / "t", text);
  models::HybridLanguageModel model = make_model(test::tiny_config());
  const double expected = whole_pass(model, text);
  for (const int64_t window : {1, 7, 64, 499, 5000}) {
    const FileScore score = score_file(model, folder.path() / "t", window);
    EXPECT_EQ(score.score.tokens, 499);
    EXPECT_EQ(score.resets, 0);
    EXPECT_NEAR(score.score.nats / expected, 1, 1e-5) << "window " << window;
  }
  // A model that forgets between windows scores differently: the test above can fail.
  const Score apart = score_windows(
      model, {reinterpret_cast<const uint8_t*>(text.data()), text.size()}, 10, 4, 10000);
  EXPECT_GT(std::abs(apart.loss() / (expected / 499) - 1), 1e-3);
}

TEST(ScoreFile, AttentionStartsAfreshWhenItsPositionsAreUsedUp) {
  const TemporaryFolder folder;
  write_text(folder.path() / "t", some_text(500));
  models::ModelConfig config = test::tiny_config(models::LayerKind::attention);
  config.max_position_embeddings = 100;
  models::HybridLanguageModel model = make_model(config);
  const FileScore score = score_file(model, folder.path() / "t", 50);
  EXPECT_EQ(score.score.tokens, 499);
  EXPECT_EQ(score.resets, 4);
  EXPECT_TRUE(std::isfinite(score.bits_per_byte()));
}

TEST(ScoreFile, CountsWordsAndLineEnds) {
  const TemporaryFolder folder;
  write_text(folder.path() / "t", " one two\n\nthree  four\nfive");
  models::HybridLanguageModel model = make_model(test::tiny_config());
  for (const int64_t window : {1, 3, 100}) {
    const FileScore score = score_file(model, folder.path() / "t", window);
    EXPECT_EQ(score.words, 5 + 3) << "window " << window;
    EXPECT_NEAR(score.word_perplexity(), std::exp(score.score.nats / 8), 1e-6);
  }
}

TEST(ScoreFile, ErrorsAndLimits) {
  const TemporaryFolder folder;
  write_text(folder.path() / "one", "x");
  write_text(folder.path() / "t", some_text(100));
  models::HybridLanguageModel model = make_model(test::tiny_config());
  EXPECT_THROW(score_file(model, folder.path() / "one", 8), std::runtime_error);
  EXPECT_ANY_THROW(score_file(model, folder.path() / "missing", 8));
  EXPECT_EQ(score_file(model, folder.path() / "t", 8, 21).score.tokens, 20);
}

TEST(ScoreWindows, IsTheMeanOverWindowsWhateverTheBatch) {
  const std::string text = some_text(300);
  const std::span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  models::HybridLanguageModel model = make_model(test::tiny_config());
  const Score one = score_windows(model, bytes, 16, 1, 1 << 20);
  EXPECT_EQ(one.tokens, (300 - 1) / 16 * 16);
  EXPECT_NEAR(score_windows(model, bytes, 16, 7, 1 << 20).loss() / one.loss(), 1, 1e-6);
  EXPECT_EQ(score_windows(model, bytes, 16, 7, 20).tokens, 32);
  double nats = 0;
  for (int64_t w = 0; w < 18; ++w) nats += whole_pass(model, text.substr(w * 16, 17));
  EXPECT_NEAR(one.nats / nats, 1, 1e-5);
  EXPECT_NEAR(one.bits_per_byte(), one.loss() / std::log(2.0), 1e-12);
}

}  // namespace
}  // namespace kalmanet::train
