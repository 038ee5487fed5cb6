// Training options: each bad value named, JSON and back, what may differ when resuming.
#include "train/options.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "kalmanet/error.hpp"

namespace kalmanet::train {
namespace {

TEST(TrainOptions, DefaultsAreValid) {
  EXPECT_NO_THROW(check(TrainOptions{}));
}

TEST(TrainOptions, EachBadValueNamesItsOption) {
  const std::vector<std::pair<const char*, nlohmann::json>> cases = {{"steps", 0},
                                                                     {"batch", -1},
                                                                     {"accumulate", 0},
                                                                     {"context", 0},
                                                                     {"lr", 0.0},
                                                                     {"lr", -1.0},
                                                                     {"final_lr_ratio", 1.5},
                                                                     {"warmup", -1},
                                                                     {"schedule", "linear"},
                                                                     {"weight_decay", -0.1},
                                                                     {"beta1", 1.0},
                                                                     {"beta2", -0.5},
                                                                     {"clip", -1.0},
                                                                     {"dtype", "fp8"},
                                                                     {"held_out", 0.0},
                                                                     {"held_out", 1.0},
                                                                     {"minutes", -1.0},
                                                                     {"threads", -1},
                                                                     {"checkpoint_every", 0},
                                                                     {"keep_checkpoints", 0},
                                                                     {"eval_every", 0},
                                                                     {"eval_tokens", 0},
                                                                     {"final_eval_tokens", 0},
                                                                     {"log_every", 0}};
  for (const auto& [key, value] : cases) {
    nlohmann::json json = to_json(TrainOptions{});
    json[key] = value;
    try {
      check(train_options_from_json(json));
      ADD_FAILURE() << key << " = " << value << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.argument(), key) << error.what();
    }
  }
  TrainOptions options;
  options.lr = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(check(options), Error);
}

TEST(TrainOptions, JsonGoesBothWays) {
  TrainOptions options;
  options.text = "book.txt";
  options.lr = 1.0 / 3;
  options.seed = std::numeric_limits<uint64_t>::max();
  options.sequential = true;
  const std::string text = to_json(options).dump();
  EXPECT_EQ(to_json(train_options_from_json(nlohmann::json::parse(text))).dump(), text);
  EXPECT_THROW(train_options_from_json({{"steps", "many"}}), Error);
}

TEST(TrainOptions, OnlyWhatDecidesTheResultMustStay) {
  const TrainOptions before;
  TrainOptions now = before;
  now.minutes = 5;
  now.threads = 3;
  now.checkpoint_every = 1;
  now.text = "./the/same.txt";
  EXPECT_EQ(differing_options(before, now), "");
  now.lr = 5e-4;
  now.seed = 2;
  const std::string text = differing_options(before, now);
  EXPECT_NE(text.find("lr (0.002 before, now 0.0005)"), std::string::npos) << text;
  EXPECT_NE(text.find("seed (1 before, now 2)"), std::string::npos) << text;
}

}  // namespace
}  // namespace kalmanet::train
