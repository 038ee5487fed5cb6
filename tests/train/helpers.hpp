// What the tests of the training room share: text and a tiny model.
#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "models/config.hpp"
#include "support/message_of.hpp"
#include "support/temporary_folder.hpp"

namespace kalmanet::train::test {

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string read_all(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// `bytes` of text that a model can learn something from.
inline std::string some_text(size_t bytes) {
  std::string text;
  for (int i = 0; text.size() < bytes; ++i) {
    text += "line " + std::to_string(i * 7919 % 1000) + " of a text about nothing.\n";
  }
  text.resize(bytes);
  return text;
}

inline models::ModelConfig tiny_config(models::LayerKind kind = models::LayerKind::gka) {
  models::ModelConfig config;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_hidden_layers = 2;
  config.layers.assign(2, kind);
  config.num_attention_heads = config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.tie_word_embeddings = true;
  config.gka.num_iter = 10;
  return config;
}

}  // namespace kalmanet::train::test
