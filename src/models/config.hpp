// A model's config.json (Hugging Face layout, model_type "hybrid_qwen3"): parsed, checked, written.
//
// No torch here: the readers of untrusted files are fuzzed on their own.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kalmanet::models {

// What mixes tokens in one block. The published pattern also knows GDN, M2, SWA and BMF, which are
// not built yet: naming one is an error.
enum class LayerKind { gka, attention };
const char* name(LayerKind kind) noexcept;  // "GKA", "*"

// Unknown keys of an object with their JSON text, kept so that they can be written back unchanged.
using ExtraKeys = std::map<std::string, std::string>;

// The object "gka_config". Keys marked (ours) are extensions of this project: absent from a written
// file where they have their default, so that what we write loads elsewhere.
struct GkaConfig {
  bool use_beta_gate = true;
  bool use_alpha_connection = true;
  bool use_v_conv = true;
  bool use_forgetting_gate = true;
  bool use_forgetting_gate_kk = true;
  bool gla_rescale = true;
  bool use_gate = true;
  bool bp_lambda = true;
  std::string solver_type = "chebyshev";  // chebyshev | direct | cg | auto
  int64_t num_iter = 30;                  // 1..10000; 0 in memory is "auto" in the file (ours)
  double ridge_strength = 0.02;           // > 0
  int64_t conv_size = 4;                  // 1..16
  double norm_eps = 1e-6;                 // > 0
  int64_t chunk_size = 64;                // 0..256; 0: the backend's choice (ours)
  // Head counts and size of the GKA layers where they differ from the attention layers' (HMF's
  // names). Absent: see ModelConfig::gka_heads.
  std::optional<int64_t> num_q_heads, num_k_heads, num_v_heads, head_dim;
  double expand_v = 1.0;       // V = expand_v * head_dim, an integer (FLA's name)
  bool learned_ridge = false;  // (ours) predict the ridge ratio from the input
  double tolerance = 1e-5;     // (ours) what num_iter = "auto" aims at; up to 0.5
  // (ours) standard | bfloat16: Chebyshev's products in bfloat16, with a num_iter
  std::string arithmetic = "standard";
  std::string qk_norm = "official";   // (ours) official | fla
  std::optional<double> fixed_alpha;  // (ours) a constant in place of the alpha gate, 0..1
  ExtraKeys extra;
};

// Resolved shape of the GKA layers.
struct GkaHeads {
  int64_t num_q_heads, num_k_heads, num_v_heads;
  int64_t head_dim;        // K
  int64_t value_head_dim;  // V
  int64_t conv_size;
  int64_t num_heads() const noexcept;  // H, the largest of the three counts
};

struct ModelConfig {
  std::vector<std::string> architectures = {"HybridQwen3ForCausalLM"};
  std::string model_type = "hybrid_qwen3";
  int64_t vocab_size = 257;
  int64_t hidden_size = 128;
  int64_t intermediate_size = 384;  // 0 (ours): blocks without MLP and without its norm
  int64_t num_hidden_layers = 4;
  int64_t num_attention_heads = 4;
  int64_t num_key_value_heads = 4;  // divides num_attention_heads; absent in a file: the same
  int64_t head_dim = 32;
  std::string hidden_act = "silu";          // the only one
  int64_t max_position_embeddings = 32768;  // limits `*` layers only
  double rms_norm_eps = 1e-6;
  double rope_theta = 1e6;  // in a file: rope_theta, or rope_parameters {rope_type, rope_theta}
  bool attention_bias = false;
  bool tie_word_embeddings = false;
  std::string torch_dtype = "float32";  // float32 | bfloat16 | float16; of the weights on disk
  double initializer_range = 0.02;      // standard deviation of new weights; see language_model.hpp
  std::optional<int64_t> bos_token_id, eos_token_id;
  std::vector<LayerKind> layers = std::vector<LayerKind>(4, LayerKind::gka);
  GkaConfig gka;
  // Qwen-Next's names for the GKA layers' shape: q and k heads, v heads, sizes, convolution length.
  std::optional<int64_t> linear_num_key_heads, linear_num_value_heads, linear_key_head_dim,
      linear_value_head_dim, linear_conv_kernel_dim;
  ExtraKeys extra;

  // gka_config's own head counts, else Qwen-Next's keys, else the model's (q = num_attention_heads,
  // k = v = num_key_value_heads, head_dim).
  GkaHeads gka_heads() const;
  bool has_attention() const noexcept;
  int64_t num_layers(LayerKind kind) const noexcept;
};

// "GKA-GKA-*" to layer kinds and back. Throws Error naming the layer whose kind is not built.
std::vector<LayerKind> parse_pattern(std::string_view pattern, const std::string& source);
std::string to_pattern(const std::vector<LayerKind>& layers);

// The text of a config.json. `source` (a path) begins every error message; each names the key, the
// value and what is allowed. Throws kalmanet::Error.
ModelConfig parse_config(std::string_view json_text, const std::string& source);
// Reads `path`, or `path`/config.json where it is a folder.
ModelConfig read_config(const std::filesystem::path& path);
// The same checks for a config made in memory. Throws kalmanet::Error.
void validate(const ModelConfig& config, const std::string& source = "config");
// JSON text, indented, keys in a fixed order, extra keys last. parse_config(to_json(c)) equals c.
std::string to_json(const ModelConfig& config);

// Every parameter of the model: the names and shapes of the tensors a checkpoint must hold. The
// same set as HybridLanguageModel::named_parameters() without building it.
struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;
  int64_t numel() const noexcept;
};
std::vector<ParameterSpec> parameter_specs(const ModelConfig& config);
int64_t num_parameters(const ModelConfig& config);

// Bytes that one sequence's state takes after `position` tokens: constant for GKA layers (float32
// states and convolution windows), growing for `*` layers (keys and values of element_size bytes).
int64_t state_bytes(const ModelConfig& config, int64_t position, int64_t element_size = 4);
// Bytes of the key-value cache that the same model would need at `position` tokens with softmax
// attention in every layer.
int64_t kv_cache_bytes(const ModelConfig& config, int64_t position, int64_t element_size = 4);

}  // namespace kalmanet::models
