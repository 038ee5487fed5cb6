// kalmanet info: what a model folder or a .safetensors file holds.
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "command.hpp"
#include "models/config.hpp"
#include "models/safetensors.hpp"
#include "terminal.hpp"
#include "train/checkpoint.hpp"
#include "train/files.hpp"

namespace kalmanet::apps {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr int64_t kPositions[] = {1024, 32768, 131072};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

struct InfoCommand {
  CLI::App* app = nullptr;
  std::string path;
  bool tensors = false, json = false;

  void declare() {
    app->add_option("path", path, "A model folder, a run of kalmanet train, or a .safetensors file")
        ->required();
    app->add_flag("--tensors", tensors, "List every tensor of a model folder too");
    app->add_flag("--json", json, "Print one JSON object");
  }

  int run() const {
    if (!fs::exists(path)) {
      throw std::runtime_error(path +
                               ": no such file or folder; give a model folder or a "
                               ".safetensors file");
    }
    const bool folder = fs::is_directory(path);
    const fs::path place = folder ? train::resolve_model_folder(path) : fs::path(path);
    ordered_json out;
    out["path"] = place.string();
    models::ModelConfig config;
    if (folder) {
      config = models::read_config(place);
      describe_config(config, out);
    }
    const models::TensorStore store(place);
    describe_tensors(store, out);
    if (folder) check_parameters(config, store, out);
    if (json) {
      std::printf("%s\n", out.dump(2).c_str());
    } else {
      print(out, folder);
    }
    return 0;
  }

  static void describe_config(const models::ModelConfig& config, ordered_json& out) {
    const models::GkaHeads heads = config.gka_heads();
    out["model"] = {
        {"pattern", models::to_pattern(config.layers)},
        {"layers", config.num_hidden_layers},
        {"hidden_size", config.hidden_size},
        {"intermediate_size", config.intermediate_size},
        {"vocab_size", config.vocab_size},
        {"heads", config.num_attention_heads},
        {"head_dim", config.head_dim},
        {"gka_heads", heads.num_heads()},
        {"gka_key_dim", heads.head_dim},
        {"gka_value_dim", heads.value_head_dim},
        {"ridge_ratio", config.gka.learned_ridge ? ordered_json("learned")
                                                 : ordered_json(config.gka.ridge_strength)},
        {"solver", config.gka.solver_type},
        {"num_iter",
         config.gka.num_iter == 0 ? ordered_json("auto") : ordered_json(config.gka.num_iter)},
        {"tied_embeddings", config.tie_word_embeddings}};
    ordered_json memory = ordered_json::array();
    for (const int64_t position : kPositions) {
      memory.push_back({{"tokens", position},
                        {"state_bytes", models::state_bytes(config, position)},
                        {"kv_cache_bytes", models::kv_cache_bytes(config, position)}});
    }
    out["sequence_memory"] = memory;
  }

  static void describe_tensors(const models::TensorStore& store, ordered_json& out) {
    ordered_json list = ordered_json::array();
    std::map<std::string, int64_t> dtypes;
    for (const models::SafetensorsFile& file : store.files()) {
      for (const models::TensorInfo& info : file.tensors()) {
        dtypes[models::name(info.dtype)] += info.numel();
        list.push_back(
            {{"name", info.name}, {"dtype", models::name(info.dtype)}, {"shape", info.shape}});
      }
    }
    out["files"] = store.files().size();
    out["elements"] = store.num_elements();
    out["bytes"] = store.total_bytes();
    out["dtypes"] = dtypes;
    out["tensors"] = list;
  }

  // A config that contradicts the weights is an error here as it is when the model is loaded.
  static void check_parameters(const models::ModelConfig& config, const models::TensorStore& store,
                               ordered_json& out) {
    for (const models::ParameterSpec& spec : models::parameter_specs(config)) {
      const auto tensor = store.find(spec.name);
      if (!tensor) {
        throw std::runtime_error("config.json contradicts the weights: it asks for " + spec.name +
                                 ", which they do not hold");
      }
      if (tensor->info->shape != spec.shape) {
        throw std::runtime_error("config.json contradicts the weights: " + spec.name + " is " +
                                 shape_text(tensor->info->shape) + " instead of " +
                                 shape_text(spec.shape));
      }
    }
    out["parameters"] = models::num_parameters(config);
  }

  void print(const ordered_json& out, bool folder) const {
    std::printf("%s\n", out["path"].get<std::string>().c_str());
    if (folder) {
      const auto& m = out["model"];
      std::printf("parameters  %s (%lld)\n",
                  describe_count(out["parameters"].get<double>()).c_str(),
                  static_cast<long long>(out["parameters"].get<int64_t>()));
      std::printf("pattern     %s\n", m["pattern"].get<std::string>().c_str());
      for (const char* key : {"hidden_size", "intermediate_size", "vocab_size", "heads", "head_dim",
                              "gka_heads", "gka_key_dim", "gka_value_dim", "ridge_ratio", "solver",
                              "num_iter", "tied_embeddings"}) {
        std::printf("  %-18s %s\n", key, m[key].dump().c_str());
      }
      std::printf("memory of one sequence (float32)\n  %10s  %14s  %28s\n", "tokens", "this model",
                  "key-value cache, all layers");
      for (const auto& row : out["sequence_memory"]) {
        std::printf("  %10lld  %14s  %28s\n", static_cast<long long>(row["tokens"].get<int64_t>()),
                    train::describe_bytes(row["state_bytes"].get<int64_t>()).c_str(),
                    train::describe_bytes(row["kv_cache_bytes"].get<int64_t>()).c_str());
      }
    }
    std::printf("tensors     %zu in %lld file(s), %lld elements, %s;", out["tensors"].size(),
                static_cast<long long>(out["files"].get<int64_t>()),
                static_cast<long long>(out["elements"].get<int64_t>()),
                train::describe_bytes(out["bytes"].get<int64_t>()).c_str());
    for (const auto& [dtype, count] : out["dtypes"].items()) {
      std::printf(" %s %lld", dtype.c_str(), static_cast<long long>(count.get<int64_t>()));
    }
    std::printf("\n");
    if (folder && !tensors) return;
    for (const auto& tensor : out["tensors"]) {
      std::printf("  %-5s %-18s %s\n", tensor["dtype"].get<std::string>().c_str(),
                  shape_text(tensor["shape"].get<std::vector<int64_t>>()).c_str(),
                  tensor["name"].get<std::string>().c_str());
    }
  }
};

}  // namespace

Command add_info(CLI::App& app) {
  const auto command = std::make_shared<InfoCommand>();
  command->app = app.add_subcommand("info", "What a model folder or a .safetensors file holds");
  command->declare();
  command->app->footer(
      "Examples:\n"
      "  kalmanet info runs/demo\n"
      "  kalmanet info runs/demo --tensors\n"
      "  kalmanet info model.safetensors --json");
  return {command->app, [command] { return command->run(); }};
}

}  // namespace kalmanet::apps
