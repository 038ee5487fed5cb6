// Checkpoints: a model folder plus everything that training needs to go on bit for bit.
//
//   <run>/checkpoints/step-00000500/   config.json, model.safetensors, tokenizer.json,
//                                      optimizer.safetensors (moments, random state),
//                                      training.json (step, data position, options, and the size
//                                      and fingerprint of every other file; written last)
//   <run>/latest                       a link to the newest one
//
// A checkpoint is written into step-N.tmp, synced, and renamed as a whole: a folder with its final
// name is complete, whenever the process is killed.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "models/language_model.hpp"
#include "train/optimizer.hpp"
#include "train/options.hpp"

namespace kalmanet::train {

struct TrainingState {
  int64_t step = 0;     // optimizer steps done
  int64_t windows = 0;  // windows drawn: the position in the data
  double seconds = 0;   // spent training so far, all starts together
  std::string data;     // TextData::identity
  TrainOptions options;
};

// Writes the checkpoint of state.step and removes all but the newest `keep`. Returns its folder.
// Throws std::exception; what was there before is untouched then.
std::filesystem::path save_checkpoint(const std::filesystem::path& run,
                                      const models::HybridLanguageModel& model,
                                      const AdamW& optimizer, const TrainingState& state,
                                      int64_t keep);

struct FoundCheckpoint {
  std::filesystem::path folder;
  TrainingState state;
  std::vector<std::string> skipped;  // newer ones that are damaged, and why
};

// Reads training.json and checks that every file it lists is there, whole and unchanged. Throws
// std::runtime_error saying what is wrong.
TrainingState verify_checkpoint(const std::filesystem::path& folder);
// The newest checkpoint of a run that passes verify_checkpoint, or nothing.
std::optional<FoundCheckpoint> find_checkpoint(const std::filesystem::path& run);
// Restores the optimizer's moments and PyTorch's random state from a verified checkpoint. The model
// itself is loaded by models::load_model(folder). Throws std::runtime_error where the tensors do
// not fit the optimizer's parameters.
void load_training_tensors(const std::filesystem::path& folder, AdamW& optimizer);

// The model folder that `path` means: itself if it has a config.json, or the newest good checkpoint
// of a run folder. Throws std::runtime_error.
std::filesystem::path resolve_model_folder(const std::filesystem::path& path);

// An upper estimate of a checkpoint's bytes for a model of that many parameters.
int64_t checkpoint_bytes(int64_t parameters);

}  // namespace kalmanet::train
