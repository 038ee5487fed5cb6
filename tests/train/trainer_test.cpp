// The loop: learns, stops on a signal, goes on bit for bit, and says no in time.
#include "train/trainer.hpp"

#include <gtest/gtest.h>

#include <csignal>

#include "models/safetensors.hpp"
#include "train/checkpoint.hpp"
#include "train/helpers.hpp"

namespace kalmanet::train {
namespace {

namespace fs = std::filesystem;
using test::read_all;
using test::some_text;
using test::tiny_config;
using test::write_text;

TrainOptions tiny_options(const fs::path& folder) {
  write_text(folder / "text.txt", some_text(6000));
  TrainOptions options;
  options.text = (folder / "text.txt").string();
  options.steps = 12;
  options.batch = 3;
  options.context = 20;
  options.warmup = 3;
  options.lr = 1e-2;
  options.eval_every = 5;
  options.checkpoint_every = 4;
  options.log_every = 1;
  options.threads = 1;
  return options;
}

// Names the first tensor that differs between two .safetensors files, or nothing.
std::string first_difference(const fs::path& a, const fs::path& b) {
  const models::SafetensorsFile x(a), y(b);
  if (x.tensors().size() != y.tensors().size()) return "number of tensors";
  for (const auto& info : x.tensors()) {
    const auto other = y.find(info.name);
    if (!other) return info.name + " missing";
    const auto mine = x.view(info).data;
    if (!std::equal(mine.begin(), mine.end(), other->data.begin(), other->data.end())) {
      return info.name;
    }
  }
  return "";
}

TEST(Trainer, LearnsAndLeavesALoadableRun) {
  const TemporaryFolder folder;
  TrainOptions options = tiny_options(folder.path());
  options.steps = 60;
  double first = 0, last = 0;
  int64_t evaluations = 0;
  TrainObserver observer;
  observer.step = [&](const StepReport& report) {
    if (report.step == 1) first = report.loss;
    last = report.loss;
    EXPECT_GT(report.lr, 0);
    EXPECT_EQ(report.steps, 60);
  };
  observer.evaluated = [&](int64_t, const Score&) { ++evaluations; };
  const TrainSummary summary =
      train_model(options, tiny_config(), folder.path() / "run", StartMode::fresh, observer);
  EXPECT_NEAR(first, std::log(257.0), 0.3);
  EXPECT_LT(last, 3.3);
  EXPECT_LT(summary.valid.loss(), 3.3);
  EXPECT_FALSE(summary.interrupted);
  EXPECT_EQ(summary.step, 60);
  EXPECT_EQ(evaluations, 12);
  EXPECT_EQ(find_checkpoint(folder.path() / "run")->state.step, 60);
  const std::string metrics = read_all(folder.path() / "run" / "metrics.jsonl");
  EXPECT_EQ(std::count(metrics.begin(), metrics.end(), '\n'), 60 + 12);
}

class Resume : public testing::TestWithParam<const char*> {};

// Stopped by a signal after `stops` of its steps, resumed each time, the weights and moments end as
// those of a run that was never stopped: every bit.
TEST_P(Resume, IsBitForBit) {
  const TemporaryFolder folder;
  TrainOptions options = tiny_options(folder.path());
  const std::string what = GetParam();
  if (what == "accumulate") options.accumulate = 2;
  if (what == "bf16") options.dtype = "bf16";
  if (what == "sequential") options.sequential = true;
  const models::ModelConfig config =
      tiny_config(what == "attention" ? models::LayerKind::attention : models::LayerKind::gka);
  const fs::path straight = folder.path() / "straight", stopped = folder.path() / "stopped";
  const TrainSummary whole = train_model(options, config, straight, StartMode::fresh);

  TrainObserver observer;
  StartMode mode = StartMode::fresh;
  for (const int64_t stop : {3, 4, 9}) {
    observer.step = [&](const StepReport& report) {
      if (report.step == stop) std::raise(SIGTERM);
    };
    const TrainSummary part = train_model(options, config, stopped, mode, observer);
    ASSERT_TRUE(part.interrupted);
    ASSERT_EQ(part.step, stop);
    mode = StartMode::resume;
  }
  const TrainSummary rest = train_model(options, config, stopped, mode);
  EXPECT_EQ(rest.step, options.steps);
  for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
    EXPECT_EQ(first_difference(whole.checkpoint / file, rest.checkpoint / file), "") << file;
  }
  EXPECT_EQ(whole.valid.nats, rest.valid.nats);
}
INSTANTIATE_TEST_SUITE_P(Trainer, Resume,
                         testing::Values("plain", "accumulate", "bf16", "sequential", "attention"),
                         [](const auto& each) { return std::string(each.param); });

TEST(Trainer, AnotherSeedGivesOtherWeights) {
  const TemporaryFolder folder;
  TrainOptions options = tiny_options(folder.path());
  options.steps = 2;
  const auto a = train_model(options, tiny_config(), folder.path() / "a", StartMode::fresh);
  options.seed = 2;
  const auto b = train_model(options, tiny_config(), folder.path() / "b", StartMode::fresh);
  EXPECT_NE(
      first_difference(a.checkpoint / "model.safetensors", b.checkpoint / "model.safetensors"), "");
}

TEST(Trainer, AccumulationIsALargerBatch) {
  const TemporaryFolder folder;
  TrainOptions options = tiny_options(folder.path());
  options.steps = 1;
  options.batch = 4;
  double losses[2], norms[2];
  for (int i = 0; i < 2; ++i) {
    TrainObserver observer;
    observer.step = [&](const StepReport& report) {
      losses[i] = report.loss;
      norms[i] = report.grad_norm;
    };
    train_model(options, tiny_config(), folder.path() / std::to_string(i), StartMode::fresh,
                observer);
    options.batch = 2;
    options.accumulate = 2;
  }
  EXPECT_NEAR(losses[0], losses[1], 1e-5);
  EXPECT_NEAR(norms[0] / norms[1], 1, 1e-4);
}

TEST(Trainer, ADivergingRunStopsWithAdviceAndKeepsItsCheckpoint) {
  const TemporaryFolder folder;
  TrainOptions options = tiny_options(folder.path());
  options.steps = 400;
  options.lr = 1e30;
  options.warmup = 0;
  options.clip = 0;
  options.checkpoint_every = 1;
  const std::string message = message_of(
      [&] { train_model(options, tiny_config(), folder.path() / "run", StartMode::fresh); });
  EXPECT_NE(message.find("is not a number at step"), std::string::npos) << message;
  EXPECT_NE(message.find("smaller --lr"), std::string::npos) << message;
}

TEST(Trainer, RefusesBeforeTraining) {
  const TemporaryFolder folder;
  const TrainOptions good = tiny_options(folder.path());
  const fs::path run = folder.path() / "run";
  const auto fresh = [&](const TrainOptions& options, const fs::path& out) {
    return message_of([&] { train_model(options, tiny_config(), out, StartMode::fresh); });
  };
  TrainOptions bad = good;
  bad.text = (folder.path() / "missing").string();
  EXPECT_NE(fresh(bad, run).find("no such file or folder"), std::string::npos);
  bad = good;
  bad.context = 5990;
  EXPECT_NE(fresh(bad, run).find("too short"), std::string::npos);
  bad = good;
  bad.lr = -1;
  EXPECT_NE(fresh(bad, run).find("lr"), std::string::npos);
  EXPECT_NE(fresh(good, folder.path() / "text.txt").find("cannot create the folder"),
            std::string::npos);
  models::ModelConfig config = tiny_config(models::LayerKind::attention);
  config.max_position_embeddings = 10;
  EXPECT_NE(message_of([&] {
              train_model(good, config, run, StartMode::fresh);
            }).find("max_position_embeddings"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              train_model(good, config, run, StartMode::resume);
            }).find("no checkpoint to resume from"),
            std::string::npos);
}

TEST(Trainer, ResumeRefusesWhatWouldBeAnotherRun) {
  const TemporaryFolder folder;
  TrainOptions options = tiny_options(folder.path());
  options.steps = 2;
  const fs::path run = folder.path() / "run";
  train_model(options, tiny_config(), run, StartMode::fresh);
  EXPECT_NE(message_of([&] {
              train_model(options, tiny_config(), run, StartMode::fresh);
            }).find("already holds a run"),
            std::string::npos);
  TrainOptions other = options;
  other.lr = 1;
  EXPECT_NE(
      message_of([&] { train_model(other, {}, run, StartMode::resume); }).find("differing: lr"),
      std::string::npos);
  write_text(folder.path() / "text.txt", some_text(6001));
  EXPECT_NE(
      message_of([&] { train_model(options, {}, run, StartMode::resume); }).find("is not the one"),
      std::string::npos);
}

TEST(Trainer, ATimeLimitEndsTheRunNormally) {
  const TemporaryFolder folder;
  TrainOptions options = tiny_options(folder.path());
  options.steps = 1000000;
  options.minutes = 1.0 / 60;
  double last_lr = 0;
  TrainObserver observer;
  observer.step = [&](const StepReport& report) { last_lr = report.lr; };
  const TrainSummary summary =
      train_model(options, tiny_config(), folder.path() / "run", StartMode::fresh, observer);
  EXPECT_FALSE(summary.interrupted);
  EXPECT_GT(summary.valid.tokens, 0);
  EXPECT_LT(last_lr, 0.2 * options.lr) << "the rate comes down with the time";
}

}  // namespace
}  // namespace kalmanet::train
