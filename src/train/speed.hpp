// Training speed of GKA models beside the same model with attention layers.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "models/config.hpp"

namespace kalmanet::train {

struct SpeedCase {
  std::string name;
  models::ModelConfig config;
};

struct SpeedResult {
  std::string name;
  int64_t context = 0, batch = 0;
  double tokens_per_second = 0;  // the median of the rounds
  double slowest = 0, fastest = 0;
  // Tokens a second that a processor computed, all threads together: the median of the rounds. Says
  // more than the clock where other programs want the cores.
  double tokens_per_processor_second = 0;
};

// Times whole training steps (forward, backward, clipping, AdamW) on random bytes. For each context
// the batch is as many windows as fit into `tokens_per_step` (at least one); in each of `rounds`
// the cases take turns for at least `seconds` each, so that what else the machine does hits all
// alike. `progress(done, total)` is called after each turn. Throws kalmanet::Error.
std::vector<SpeedResult> measure_training_speed(
    const std::vector<SpeedCase>& cases, const std::vector<int64_t>& contexts,
    int64_t tokens_per_step, int rounds, double seconds,
    const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace kalmanet::train
