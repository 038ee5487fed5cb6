// The flags that describe a new model, and the config they make.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "models/config.hpp"

namespace kalmanet::apps {

struct ModelFlags {
  std::string config_path;
  std::string mixer = "gka";  // gka | attention | linear
  std::string pattern;
  std::string arithmetic = "standard";  // standard | bfloat16
  int64_t layers = 4, width = 128, heads = 4, kv_heads = 0, head_dim = 0, mlp = -1;
  int64_t max_positions = 32768, num_iter = 30, chunk_size = 0;
  double ridge = 0.02;
  bool learned_ridge = false, untied = false;
  std::string solver;  // empty: direct with a learned ridge ratio, else chebyshev

  void declare(CLI::App& app);
  // Whether a flag that was given leaves no place for what a preset would set `flag` to: a fixed
  // ridge ratio, solver steps or layers that solve nothing for a learned ridge ratio, a pattern for
  // a number of layers, a config for all of them.
  bool excludes(const CLI::App& app, const std::string& flag) const;
  // Throws UsageError where flags contradict each other, kalmanet::Error where the config is wrong.
  models::ModelConfig make(const CLI::App& app) const;
};

}  // namespace kalmanet::apps
