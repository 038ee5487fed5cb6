// Writing, finding, verifying and reading checkpoints (see checkpoint.hpp).
#include "train/checkpoint.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>

#include "models/files.hpp"
#include "models/io.hpp"
#include "train/files.hpp"

namespace kalmanet::train {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kStateFile = "training.json";
constexpr const char* kTensorFile = "optimizer.safetensors";
constexpr const char* kRandomState = "random_state";
constexpr int64_t kMaxStateBytes = int64_t{1} << 20;
constexpr int kFormat = 1;

std::string folder_name(int64_t step) {
  char text[40];
  std::snprintf(text, sizeof text, "step-%08lld", static_cast<long long>(step));
  return text;
}

// N of a folder named step-N, else -1 (also for step-N.tmp).
int64_t step_of(const fs::path& folder) {
  const std::string leaf = folder.filename().string();
  if (leaf.rfind("step-", 0) != 0 || leaf.size() <= 5 || leaf.size() > 20) return -1;
  if (leaf.find_first_not_of("0123456789", 5) != std::string::npos) return -1;
  return std::stoll(leaf.substr(5));
}

// Newest first.
std::vector<fs::path> list_checkpoints(const fs::path& run) {
  std::vector<fs::path> folders;
  std::error_code error;
  for (fs::directory_iterator it(run / "checkpoints", error), end; !error && it != end;
       it.increment(error)) {
    if (step_of(it->path()) >= 0) folders.push_back(it->path());
  }
  std::sort(folders.begin(), folders.end(),
            [](const fs::path& a, const fs::path& b) { return step_of(a) > step_of(b); });
  return folders;
}

at::Tensor random_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void point_latest_at(const fs::path& run, const fs::path& folder) {
  const fs::path link = run / "latest", aside = run / ".latest.tmp";
  std::error_code error;
  fs::remove(aside, error);
  fs::create_directory_symlink(fs::path("checkpoints") / folder.filename(), aside, error);
  // A convenience for people: where links are not possible, readers find the newest by its name.
  if (!error) fs::rename(aside, link, error);
}

void prune(const fs::path& run, int64_t keep) {
  std::error_code ignored;
  int64_t seen = 0;
  for (const fs::path& folder : list_checkpoints(run)) {
    if (++seen > keep) fs::remove_all(folder, ignored);
  }
  for (fs::directory_iterator it(run / "checkpoints", ignored), end; !ignored && it != end;
       it.increment(ignored)) {
    if (it->path().extension() == ".tmp") fs::remove_all(it->path(), ignored);
  }
}

json describe_files(const fs::path& folder) {
  json files = json::object();
  for (const auto& entry : fs::directory_iterator(folder)) {
    sync_path(entry.path());
    char print[24];
    std::snprintf(print, sizeof print, "%016llx",
                  static_cast<unsigned long long>(fingerprint_file(entry.path())));
    files[entry.path().filename().string()] = {{"bytes", fs::file_size(entry.path())},
                                               {"fingerprint", print}};
  }
  return files;
}

void check_files(const fs::path& folder, const json& files) {
  for (const auto& [name, expected] : files.items()) {
    const fs::path path = folder / name;
    std::error_code error;
    const auto bytes = fs::file_size(path, error);
    if (error) throw std::runtime_error(name + " is missing");
    if (bytes != expected.at("bytes").get<uint64_t>()) {
      throw std::runtime_error(name + " has " + std::to_string(bytes) + " bytes instead of " +
                               expected.at("bytes").dump());
    }
    char print[24];
    std::snprintf(print, sizeof print, "%016llx",
                  static_cast<unsigned long long>(fingerprint_file(path)));
    if (expected.at("fingerprint").get<std::string>() != print) {
      throw std::runtime_error(name + " has changed since it was written");
    }
  }
}

}  // namespace

fs::path save_checkpoint(const fs::path& run, const models::HybridLanguageModel& model,
                         const AdamW& optimizer, const TrainingState& state, int64_t keep) {
  const fs::path root = run / "checkpoints", folder = root / folder_name(state.step);
  fs::path aside = folder;
  aside += ".tmp";
  fs::create_directories(root);
  fs::remove_all(aside);
  try {
    models::save_model(model, aside);
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [name, tensor] : optimizer.state()) tensors.emplace(name, tensor);
    tensors.emplace(kRandomState, random_state());
    models::save_tensors(aside / kTensorFile, tensors);
    const json text = {{"format", kFormat},
                       {"step", state.step},
                       {"optimizer_steps", optimizer.steps_taken()},
                       {"windows", state.windows},
                       {"seconds", state.seconds},
                       {"data", state.data},
                       {"options", to_json(state.options)},
                       {"files", describe_files(aside)}};
    models::write_file(aside / kStateFile, text.dump(2) + "\n");
    sync_path(aside);
    // Only a damaged one can be in the way: a good one would have been gone on from.
    fs::remove_all(folder);
    fs::rename(aside, folder);
    sync_path(root);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(aside, ignored);
    throw;
  }
  point_latest_at(run, folder);
  prune(run, keep);
  return folder;
}

TrainingState verify_checkpoint(const fs::path& folder) {
  const json text = json::parse(models::read_text(folder / kStateFile, kMaxStateBytes));
  if (text.at("format").get<int>() != kFormat) {
    throw std::runtime_error("its format is " + text.at("format").dump() + ", this version knows " +
                             std::to_string(kFormat));
  }
  check_files(folder, text.at("files"));
  TrainingState state;
  text.at("step").get_to(state.step);
  text.at("windows").get_to(state.windows);
  text.at("seconds").get_to(state.seconds);
  text.at("data").get_to(state.data);
  state.options = train_options_from_json(text.at("options"));
  return state;
}

std::optional<FoundCheckpoint> find_checkpoint(const fs::path& run) {
  FoundCheckpoint found;
  for (const fs::path& folder : list_checkpoints(run)) {
    try {
      found.state = verify_checkpoint(folder);
      found.folder = folder;
      return found;
    } catch (const std::exception& error) {
      found.skipped.push_back(folder.string() + ": " + error.what());
    }
  }
  if (!found.skipped.empty()) {
    throw std::runtime_error("no checkpoint of " + run.string() + " is usable; the newest, " +
                             found.skipped.front() + "; start again with another --out");
  }
  return std::nullopt;
}

void load_training_tensors(const fs::path& folder, AdamW& optimizer) {
  const torch::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> saved = models::load_tensors(folder / kTensorFile);
  const auto take = [&](const std::string& name) {
    const auto it = saved.find(name);
    if (it == saved.end()) {
      throw std::runtime_error((folder / kTensorFile).string() + " lacks the tensor " + name);
    }
    return it->second;
  };
  for (auto& [name, tensor] : optimizer.state()) {
    const at::Tensor value = take(name);
    if (value.sizes() != tensor.sizes() || value.scalar_type() != tensor.scalar_type()) {
      throw std::runtime_error((folder / kTensorFile).string() + ": " + name +
                               " has another shape or dtype than the model");
    }
    tensor.copy_(value);
  }
  const json text = json::parse(models::read_text(folder / kStateFile, kMaxStateBytes));
  optimizer.set_steps_taken(text.at("optimizer_steps").get<int64_t>());
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(take(kRandomState));
}

fs::path resolve_model_folder(const fs::path& path) {
  if (!fs::exists(path)) {
    throw std::runtime_error("model " + path.string() +
                             ": no such folder; give a model folder or a run of kalmanet train");
  }
  if (!fs::is_directory(path) || fs::exists(path / "config.json")) return path;
  if (fs::is_directory(path / "checkpoints")) {
    if (const auto found = find_checkpoint(path)) return found->folder;
    throw std::runtime_error("model " + path.string() +
                             ": this run has no checkpoint yet; let it train longer");
  }
  throw std::runtime_error("model " + path.string() +
                           ": no config.json and no checkpoints in it; give a model folder or a "
                           "run of kalmanet train");
}

int64_t checkpoint_bytes(int64_t parameters) {
  // Weights and two moments in float32, and a MiB for headers and JSON.
  return parameters * 12 + (int64_t{1} << 20);
}

}  // namespace kalmanet::train
