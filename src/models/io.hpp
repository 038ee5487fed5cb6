// A model folder: config.json, model.safetensors (or shards with an index), tokenizer.json.
#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "models/language_model.hpp"
#include "models/safetensors.hpp"

namespace kalmanet::models {

// Writes config.json, tokenizer.json (for vocab_size >= 257, unless one is there) and
// model.safetensors into `dir`, which is created if need be; each file aside, then renamed, the
// weights last. dtype: of the weights in the file; absent: as they are (A_log and dt_bias always
// float32). Throws Error; no partial file has a final name then.
void save_model(const HybridLanguageModel& model, const std::filesystem::path& dir,
                std::optional<at::ScalarType> dtype = {});

struct LoadOptions {
  // Of the parameters in memory (float32, bfloat16, float16); A_log and dt_bias stay float32.
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
};
// Throws Error that lists every tensor that is missing, unexpected or of another shape than the
// config says. Weights may be F32, BF16, F16 or F64 on disk. With tied embeddings lm_head.weight
// need not be there.
HybridLanguageModel load_model(const std::filesystem::path& dir, const LoadOptions& options = {});

// Named tensors to and from one .safetensors file (checkpoints use it). Loaded tensors own their
// memory. Dtypes: every one that both sides know.
void save_tensors(const std::filesystem::path& path,
                  const std::map<std::string, at::Tensor>& tensors,
                  const std::map<std::string, std::string>& metadata = {});
std::map<std::string, at::Tensor> load_tensors(const std::filesystem::path& path);
at::Tensor to_tensor(const TensorView& view);  // a copy
at::ScalarType to_scalar_type(ElementType type);
ElementType to_element_type(at::ScalarType type);

}  // namespace kalmanet::models
