// Everything that decides what a training run computes, and how it is run.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "train/schedule.hpp"

namespace kalmanet::train {

struct TrainOptions {
  // What is computed: a resumed run must have the same, or it would not be the same run.
  int64_t steps = 2000;         // optimizer steps
  int64_t batch = 12;           // windows of one forward and backward pass
  int64_t accumulate = 1;       // passes a step
  int64_t context = 64;         // tokens a window
  double lr = 2e-3;             // peak learning rate
  double final_lr_ratio = 0.1;  // of the cosine
  int64_t warmup = 100;         // steps
  std::string schedule = "cosine";
  double weight_decay = 0.1;
  double beta1 = 0.9, beta2 = 0.99;
  double clip = 1.0;              // of the gradients' joint 2-norm; 0: never
  std::string dtype = "float32";  // or bf16: matrix products in bfloat16, GKA in float32
  uint64_t seed = 1;
  double held_out = 0.1;    // share of the text for validation
  bool sequential = false;  // windows in order instead of at random places

  // How it is run: free to change from one start to the next.
  std::string text;            // file or folder; TextData::identity tells whether it is the same
  double minutes = 0;          // stop by then, the learning rate brought down in time; 0: no limit
  std::string device = "cpu";  // or cuda, cuda:N (models::device_named)
  int threads = 0;             // 0: PyTorch's choice
  int64_t checkpoint_every = 500;
  int64_t keep_checkpoints = 2;
  int64_t eval_every = 250;
  int64_t eval_tokens = 32768;          // of the evaluations on the way
  int64_t final_eval_tokens = 1 << 20;  // of the one at the end; both at most the held-out text
  int64_t log_every = 10;               // steps between lines of the metrics file
  bool gradient_checkpointing = false;
};

// Throws kalmanet::Error naming the option, its value and what is allowed.
void check(const TrainOptions& options);

nlohmann::ordered_json to_json(const TrainOptions& options);
// Missing keys keep their default. Throws kalmanet::Error where a value has the wrong type.
TrainOptions train_options_from_json(const nlohmann::json& json);

// Names of options that decide what is computed and differ, "lr (0.001 before, now 0.002)"; empty
// if a run with `before` may be resumed with `now`.
std::string differing_options(const TrainOptions& before, const TrainOptions& now);

}  // namespace kalmanet::train
