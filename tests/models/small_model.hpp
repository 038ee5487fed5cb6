// Small models for the tests, with weights large enough that every part of them matters.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <string>

#include "models/language_model.hpp"

namespace kalmanet::models {

inline ModelConfig small_config(const std::string& pattern) {
  ModelConfig c;
  c.vocab_size = 61;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.layers = parse_pattern(pattern, "test");
  c.num_hidden_layers = static_cast<int64_t>(c.layers.size());
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 8;
  c.max_position_embeddings = 512;
  c.rope_theta = 1e4;
  c.initializer_range = 0.3;  // at 0.02 a block would barely change its input
  return c;
}

inline HybridLanguageModel small_model(const ModelConfig& config, uint64_t seed = 1) {
  torch::manual_seed(seed);
  HybridLanguageModel model(config);
  const at::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {  // norms away from 1, biases away from 0
    if (item.key().ends_with("norm.weight") || item.key().ends_with("_proj.bias")) {
      item.value().add_(0.2 * at::randn_like(item.value()));
    }
  }
  return model;
}

inline at::Tensor random_ids(int64_t batch, int64_t tokens, int64_t vocab_size = 61,
                             uint64_t seed = 2) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  return at::randint(0, vocab_size, {batch, tokens}, generator,
                     at::TensorOptions().dtype(at::kLong));
}

// |a - b| / |b|
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).norm() / b.norm().clamp_min(1e-30)).item<double>();
}

}  // namespace kalmanet::models
