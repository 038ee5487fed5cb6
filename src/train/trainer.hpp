// The training loop: from text and a config to a trained model folder, stoppable at any moment.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "models/config.hpp"
#include "train/evaluate.hpp"
#include "train/options.hpp"

namespace kalmanet::train {

struct StepReport {
  int64_t step = 0, steps = 0;
  double loss = 0;       // nats a token, of this step
  double grad_norm = 0;  // before clipping
  double lr = 0;
  double tokens_per_second = 0;  // over the last steps
  double seconds = 0;            // since the run began, all starts together
  double seconds_left = 0;       // by steps or by the time limit, whichever comes first
};

// What a caller may watch; any may be empty.
struct TrainObserver {
  std::function<void(const std::string&)> note;  // one line about what happens
  std::function<void(const StepReport&)> step;
  std::function<void(int64_t step, const Score& valid)> evaluated;
  std::function<void(int64_t step, const std::filesystem::path&)> saved;
};

struct TrainSummary {
  int64_t step = 0;
  int64_t parameters = 0;
  int64_t state_bytes = 0;
  double seconds = 0;
  double tokens_per_second = 0;  // of this start, evaluation and checkpoints left out
  Score valid;                   // empty where the run was interrupted
  bool interrupted = false;
  std::filesystem::path checkpoint;
};

enum class StartMode {
  fresh,   // an error where `out` already holds a run
  resume,  // from the newest good checkpoint; an error where there is none
};

// Trains in `out`: checkpoints (checkpoint.hpp), latest, metrics.jsonl, text.bin where the text is
// a folder. Checks first that the text, the options and the room on the disk are there. A resumed
// run must have the options that decide what is computed; it continues bit for bit as if never
// stopped (same thread count, no time limit). On SIGINT and SIGTERM it saves after the current step
// and returns. Throws std::exception: bad input before anything is trained; a loss that is not
// finite; a checkpoint or metrics line that cannot be written (those before stay good). `config` is
// not read when resuming.
TrainSummary train_model(const TrainOptions& options, const models::ModelConfig& config,
                         const std::filesystem::path& out, StartMode mode,
                         const TrainObserver& observer = {});

}  // namespace kalmanet::train
