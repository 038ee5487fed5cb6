// The recall task: what a batch is, and that the ridge memory learns it.
#include "train/recall.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "kalmanet/error.hpp"

namespace kalmanet::train {
namespace {

TEST(Recall, ABatchAsksEachKeyOnceAndItsAnswerWasShown) {
  RecallOptions options;
  options.batch = 5;
  const RecallBatch batch = make_recall_batch(options, 11, 3);
  const int64_t n = options.pairs, half = options.vocab_size / 2;
  ASSERT_EQ(batch.tokens.sizes(), (std::vector<int64_t>{5, 128}));
  ASSERT_EQ(batch.asked.size(0), n);
  const auto tokens = batch.tokens.accessor<int64_t, 2>();
  const auto answers = batch.answers.accessor<int64_t, 2>();
  const auto asked = batch.asked.accessor<int64_t, 1>();
  for (int64_t b = 0; b < 5; ++b) {
    std::map<int64_t, int64_t> shown;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t key = tokens[b][2 * i], value = tokens[b][2 * i + 1];
      EXPECT_LT(key, half);
      EXPECT_GE(value, half);
      EXPECT_LT(value, options.vocab_size);
      shown[key] = value;
    }
    ASSERT_EQ(shown.size(), static_cast<size_t>(n)) << "keys repeat";
    std::set<int64_t> seen;
    bool shuffled = false;
    for (int64_t i = 0; i < n; ++i) {
      EXPECT_EQ(asked[i], 2 * n + 2 * i);
      const int64_t key = tokens[b][asked[i]];
      ASSERT_TRUE(shown.count(key)) << key;
      EXPECT_EQ(answers[b][i], shown[key]);
      seen.insert(key);
      shuffled = shuffled || key != tokens[b][2 * i];
    }
    EXPECT_EQ(seen.size(), static_cast<size_t>(n));
    EXPECT_TRUE(shuffled);
  }
  EXPECT_TRUE(batch.tokens.equal(make_recall_batch(options, 11, 3).tokens));
  EXPECT_FALSE(batch.tokens.equal(make_recall_batch(options, 11, 4).tokens));
  EXPECT_FALSE(batch.tokens.equal(make_recall_batch(options, 12, 3).tokens));
}

TEST(Recall, TheVariantsDifferInTheMemoryAlone) {
  RecallOptions options;
  options.batch = 2;
  const RecallBatch batch = make_recall_batch(options, 1, 0);
  torch::manual_seed(1);
  RecallModel gka(options, "gka");
  torch::manual_seed(1);
  RecallModel linear(options, "linear");
  torch::manual_seed(1);
  RecallModel learned(options, "learned");
  const auto a = gka->named_parameters(), b = linear->named_parameters(),
             c = learned->named_parameters();
  ASSERT_EQ(a.size(), b.size());
  ASSERT_EQ(a.size() + 4, c.size());  // ridge_proj's weight and bias, in two layers
  for (const auto& item : a) {
    ASSERT_TRUE(item.value().equal(b[item.key()])) << item.key();
    ASSERT_TRUE(item.value().equal(c[item.key()])) << item.key();
  }
  const torch::NoGradGuard no_grad;
  const at::Tensor x = gka->forward(batch.tokens, batch.asked),
                   y = linear->forward(batch.tokens, batch.asked);
  ASSERT_EQ(x.sizes(), (std::vector<int64_t>{2, 32, 1024}));
  EXPECT_GT((x - y).abs().max().item<double>(), 1e-4);
  const at::Tensor z = learned->forward(batch.tokens, batch.asked);  // ridge 0.01, not 0.02
  EXPECT_GT((x - z).abs().max().item<double>(), 1e-4);
  EXPECT_THROW(RecallModel(options, "softmax"), Error);
}

TEST(Recall, BadOptionsAreNamed) {
  RecallOptions options;
  options.pairs = 600;
  EXPECT_THROW(RecallModel(options, "gka"), Error);
  options = {};
  options.heads = 3;
  EXPECT_THROW(RecallModel(options, "gka"), Error);
}

TEST(Recall, LearnsASmallTask) {
  for (const std::string variant : {"gka", "learned"}) {
    RecallOptions options;
    options.vocab_size = 32;
    options.pairs = 6;
    options.steps = 250;
    options.eval_every = 50;
    options.final_batches = 8;
    int64_t calls = 0;
    const RecallRun run = run_recall(options, variant, [&](int64_t, double) { ++calls; });
    EXPECT_EQ(calls, options.steps);
    ASSERT_EQ(run.curve.size(), 5u);
    EXPECT_LT(run.curve.back().loss, run.curve.front().loss);
    // Chance is 1/16; a model that only knows which values were shown reaches 1/6.
    EXPECT_GT(run.accuracy, 0.95) << variant << " after " << options.steps << " steps, seed "
                                  << options.seed;
  }
}

}  // namespace
}  // namespace kalmanet::train
