// config.json: reading with every check, and writing back.
#include "models/config.hpp"

#include <algorithm>
#include <cmath>

#include "models/files.hpp"
#include "models/json.hpp"

namespace kalmanet::models {
namespace fs = std::filesystem;
namespace {

// Limits far above any model, low enough that no product of sizes leaves int64
// (parameter_specs: 2^24 * 2^20 numbers a matrix, fewer than 64 matrices a layer, 2^12 layers).
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxHidden = int64_t{1} << 20;
constexpr int64_t kMaxIntermediate = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxAttentionHeadDim = 1024;
constexpr int64_t kMaxGkaHeadDim = 256;  // kalmanet::kMaxHeadDim
constexpr int64_t kMaxPositions = int64_t{1} << 40;
constexpr int64_t kMaxConv = 16;  // kalmanet::kMaxConvWidth
constexpr int64_t kMaxIterations = 10000;
constexpr int64_t kMaxConfigBytes = 16 << 20;

ExtraKeys read_gka(const Json& json, const std::string& source, GkaConfig& gka) {
  ObjectReader in(json, source, "gka_config.");
  in.get("use_beta_gate", gka.use_beta_gate);
  in.get("use_alpha_connection", gka.use_alpha_connection);
  in.get("use_v_conv", gka.use_v_conv);
  in.get("use_forgetting_gate", gka.use_forgetting_gate);
  in.get("use_forgetting_gate_kk", gka.use_forgetting_gate_kk);
  in.get("gla_rescale", gka.gla_rescale);
  in.get("use_gate", gka.use_gate);
  in.get("bp_lambda", gka.bp_lambda);
  in.get_choice("solver_type", gka.solver_type, {"chebyshev", "direct", "cg", "auto"});
  if (const Json* num_iter = in.raw("num_iter"); num_iter != nullptr && *num_iter == "auto") {
    gka.num_iter = 0;
  } else if (num_iter != nullptr && num_iter->is_string()) {
    in.reject("num_iter", "it must be \"auto\" or an integer from 1 to 10000");
  } else {
    in.get("num_iter", gka.num_iter, 1, kMaxIterations);
  }
  in.get("ridge_strength", gka.ridge_strength, 0.0, 1e3, true);
  in.get("conv_size", gka.conv_size, 1, kMaxConv);
  in.get("norm_eps", gka.norm_eps, 0.0, 1.0, true);
  in.get("chunk_size", gka.chunk_size, 0, 256);
  in.get("num_q_heads", gka.num_q_heads, 1, kMaxHeads);
  in.get("num_k_heads", gka.num_k_heads, 1, kMaxHeads);
  in.get("num_v_heads", gka.num_v_heads, 1, kMaxHeads);
  in.get("head_dim", gka.head_dim, 1, kMaxGkaHeadDim);
  in.get("expand_v", gka.expand_v, 0.0, 256.0, true);
  in.get("learned_ridge", gka.learned_ridge);
  in.get("tolerance", gka.tolerance, 0.0, 0.5, true);
  in.get_choice("arithmetic", gka.arithmetic, {"standard", "bfloat16"});
  in.get_choice("qk_norm", gka.qk_norm, {"official", "fla"});
  double alpha = 0;
  if (in.get("fixed_alpha", alpha, 0.0, 1.0)) gka.fixed_alpha = alpha;

  if (const Json* rank = in.raw("kv_proj_rank"); rank != nullptr && !rank->is_null()) {
    in.reject("kv_proj_rank", "the low-rank key/value expansion is not built yet; it must be null",
              ErrorCode::unsupported);
  }
  bool residual = false;
  if (in.get("kv_learnable_residual", residual) && residual) {
    in.reject("kv_learnable_residual", "it is not built yet; it must be false",
              ErrorCode::unsupported);
  }
  // Another implementation's names for keys above: taken silently they would change nothing.
  for (const auto& [theirs, ours] :
       {std::pair{"ridge_ratio", "ridge_strength"}, std::pair{"num_heads", "num_q_heads"},
        std::pair{"num_kv_heads", "num_k_heads and num_v_heads"},
        std::pair{"solver", "solver_type"}}) {
    if (in.has(theirs)) in.reject(theirs, std::string("it is spelled ") + ours + " here");
  }
  return in.rest();
}

double read_rope_theta(ObjectReader& in, const std::string& source) {
  constexpr double kQwen3Default = 10000.0;
  double plain = kQwen3Default, nested = kQwen3Default;
  const bool has_plain = in.get("rope_theta", plain, 0.0, 1e15, true);
  bool has_nested = false;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* json = in.raw(key);
    if (json == nullptr || json->is_null()) continue;
    const std::string prefix = std::string(key) + ".";
    ObjectReader rope(*json, source, prefix);
    for (const char* type_key : {"rope_type", "type"}) {
      std::string type = "default";
      if (rope.get(type_key, type) && type != "default") {
        rope.reject(type_key, "only \"default\" rotary positions are built",
                    ErrorCode::unsupported);
      }
    }
    has_nested = rope.get("rope_theta", nested, 0.0, 1e15, true) || has_nested;
    double partial = 1.0;
    if (rope.get("partial_rotary_factor", partial, 0.0, 1.0, true) && partial != 1.0) {
      rope.reject("partial_rotary_factor", "only 1 is built", ErrorCode::unsupported);
    }
    if (const ExtraKeys rest = rope.rest(); !rest.empty()) {
      fail(source,
           "key " + in_quotes(prefix + rest.begin()->first) +
               " is not known; only rope_type and rope_theta are built",
           ErrorCode::unsupported);
    }
  }
  if (has_plain && has_nested && plain != nested) {
    in.reject("rope_theta", "rope_parameters says another value; give one of them");
  }
  return has_nested ? nested : plain;
}

void read_dtype(ObjectReader& in, std::string& dtype) {
  const std::vector<std::string> allowed = {"float32", "bfloat16", "float16"};
  std::string newer;
  const bool old_key = in.get_choice("torch_dtype", dtype, allowed);
  if (in.get_choice("dtype", newer, allowed)) {  // the newer name of the same key
    if (old_key && newer != dtype) in.reject("dtype", "torch_dtype says another; give one of them");
    dtype = newer;
  }
}

void read_token_id(ObjectReader& in, const char* key, int64_t vocab_size,
                   std::optional<int64_t>& id) {
  const Json* json = in.raw(key);
  if (json == nullptr || json->is_null()) return;
  const Json& value = json->is_array() && json->size() == 1 ? json->front() : *json;
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
    in.reject(key, "it must be null or one token id from 0 to vocab_size-1 = " +
                       std::to_string(vocab_size - 1));
  }
  id = value.get<int64_t>();
}

void require(bool ok, const std::string& source, const std::string& message) {
  if (!ok) fail(source, message);
}

std::string text(int64_t value) {
  return std::to_string(value);
}

}  // namespace

const char* name(LayerKind kind) noexcept {
  return kind == LayerKind::gka ? "GKA" : "*";
}

int64_t GkaHeads::num_heads() const noexcept {
  return std::max({num_q_heads, num_k_heads, num_v_heads});
}

GkaHeads ModelConfig::gka_heads() const {
  GkaHeads heads{};
  heads.num_q_heads = gka.num_q_heads.value_or(linear_num_key_heads.value_or(num_attention_heads));
  heads.num_k_heads = gka.num_k_heads.value_or(linear_num_key_heads.value_or(num_key_value_heads));
  heads.num_v_heads =
      gka.num_v_heads.value_or(linear_num_value_heads.value_or(num_key_value_heads));
  heads.head_dim = gka.head_dim.value_or(linear_key_head_dim.value_or(head_dim));
  heads.value_head_dim = linear_value_head_dim.value_or(
      std::llround(gka.expand_v * static_cast<double>(heads.head_dim)));
  heads.conv_size = linear_conv_kernel_dim.value_or(gka.conv_size);
  return heads;
}

int64_t ModelConfig::num_layers(LayerKind kind) const noexcept {
  return std::count(layers.begin(), layers.end(), kind);
}
bool ModelConfig::has_attention() const noexcept {
  return num_layers(LayerKind::attention) > 0;
}

std::vector<LayerKind> parse_pattern(std::string_view pattern, const std::string& source) {
  std::vector<LayerKind> layers;
  size_t begin = 0;
  while (begin <= pattern.size()) {
    const size_t end = std::min(pattern.find('-', begin), pattern.size());
    const std::string_view kind = pattern.substr(begin, end - begin);
    const std::string layer = "hybrid_override_pattern: layer " + std::to_string(layers.size());
    if (kind == "GKA") {
      layers.push_back(LayerKind::gka);
    } else if (kind == "*") {
      layers.push_back(LayerKind::attention);
    } else if (kind == "GDN" || kind == "M2" || kind == "SWA" || kind == "BMF") {
      fail(source, layer + " is " + in_quotes(kind) + ", which is not built yet; GKA and * are",
           ErrorCode::unsupported);
    } else {
      fail(source, layer + " is " + in_quotes(kind) +
                       ", which is no layer kind; join GKA and * by \"-\", as in \"GKA-GKA-*\"");
    }
    require(static_cast<int64_t>(layers.size()) <= kMaxLayers, source,
            "hybrid_override_pattern has more than " + text(kMaxLayers) + " layers");
    begin = end + 1;
  }
  return layers;
}

std::string to_pattern(const std::vector<LayerKind>& layers) {
  std::string pattern;
  for (const LayerKind kind : layers)
    pattern += (pattern.empty() ? "" : "-") + std::string(name(kind));
  return pattern;
}

void validate(const ModelConfig& c, const std::string& source) {
  const auto in_range = [&](const char* key, int64_t value, int64_t low, int64_t high) {
    require(value >= low && value <= high, source,
            std::string("key \"") + key + "\" is " + text(value) + "; it must be an integer from " +
                text(low) + " to " + text(high));
  };
  in_range("vocab_size", c.vocab_size, 1, kMaxVocab);
  in_range("hidden_size", c.hidden_size, 1, kMaxHidden);
  in_range("intermediate_size", c.intermediate_size, 0, kMaxIntermediate);
  in_range("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  in_range("num_attention_heads", c.num_attention_heads, 1, kMaxHeads);
  in_range("num_key_value_heads", c.num_key_value_heads, 1, kMaxHeads);
  in_range("head_dim", c.head_dim, 1, kMaxAttentionHeadDim);
  in_range("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  require(c.rms_norm_eps > 0 && c.rms_norm_eps <= 1, source,
          "key \"rms_norm_eps\" must be above 0 and at most 1");
  require(c.rope_theta > 0 && std::isfinite(c.rope_theta), source, "rope_theta must be above 0");
  require(c.initializer_range > 0 && c.initializer_range <= 10, source,
          "key \"initializer_range\" must be above 0 and at most 10");
  require(static_cast<int64_t>(c.layers.size()) == c.num_hidden_layers, source,
          "hybrid_override_pattern names " + text(static_cast<int64_t>(c.layers.size())) +
              " layers, but num_hidden_layers is " + text(c.num_hidden_layers) +
              "; they must agree");
  for (const auto& [key, id] :
       {std::pair{"bos_token_id", c.bos_token_id}, std::pair{"eos_token_id", c.eos_token_id}}) {
    if (id) in_range(key, *id, 0, c.vocab_size - 1);
  }
  if (c.has_attention()) {
    require(c.num_attention_heads % c.num_key_value_heads == 0, source,
            "num_key_value_heads is " + text(c.num_key_value_heads) +
                "; it must divide num_attention_heads = " + text(c.num_attention_heads));
    require(
        c.head_dim % 2 == 0, source,
        "head_dim is " + text(c.head_dim) + "; rotary positions in `*` layers need an even one");
  }
  if (c.num_layers(LayerKind::gka) == 0) return;

  const GkaConfig& g = c.gka;
  const GkaHeads heads = c.gka_heads();
  in_range("head_dim (GKA layers)", heads.head_dim, 1, kMaxGkaHeadDim);
  in_range("value head dim (GKA layers: expand_v * head_dim)", heads.value_head_dim, 1,
           kMaxGkaHeadDim);
  const double exact = g.expand_v * static_cast<double>(heads.head_dim);
  const bool integer = std::abs(exact - static_cast<double>(heads.value_head_dim)) < 1e-6;
  require(integer || (c.linear_value_head_dim && g.expand_v == 1.0), source,
          "gka_config.expand_v is " + std::to_string(g.expand_v) +
              ", so that expand_v * head_dim = " + std::to_string(exact) +
              (c.linear_value_head_dim ? " contradicts linear_value_head_dim"
                                       : "; it must be an integer"));
  for (const auto& [what, count] :
       {std::pair{"query", heads.num_q_heads}, std::pair{"key", heads.num_k_heads},
        std::pair{"value", heads.num_v_heads}}) {
    in_range("number of GKA heads", count, 1, kMaxHeads);
    require(heads.num_heads() % count == 0, source,
            std::string("GKA layers have ") + text(count) + " " + what +
                " heads, which must divide " + text(heads.num_heads()) +
                ", the largest of their head counts");
  }
  in_range("gka_config.conv_size", heads.conv_size, 1, kMaxConv);
  in_range("gka_config.num_iter", g.num_iter, 0, kMaxIterations);
  in_range("gka_config.chunk_size", g.chunk_size, 0, 256);
  require(g.ridge_strength > 0 && g.ridge_strength <= 1e3, source,
          "gka_config.ridge_strength must be above 0 and at most 1000");
  require(g.tolerance > 0 && g.tolerance <= 0.5, source,
          "gka_config.tolerance must be above 0 and at most 0.5");
  require(g.arithmetic == "standard" || g.arithmetic == "bfloat16", source,
          "gka_config.arithmetic must be \"standard\" or \"bfloat16\"");
  require(g.arithmetic == "standard" ||
              (g.solver_type == "chebyshev" && g.num_iter > 0 && !g.learned_ridge),
          source,
          "gka_config.arithmetic \"bfloat16\" is for solver_type \"chebyshev\" with a num_iter of "
          "at least 1 and without learned_ridge; its rounding would not meet their tolerance");
  require(g.norm_eps > 0 && g.norm_eps <= 1, source,
          "gka_config.norm_eps must be above 0 and at most 1");
  require(!g.fixed_alpha || (*g.fixed_alpha >= 0 && *g.fixed_alpha <= 1), source,
          "gka_config.fixed_alpha must be from 0 to 1");
  require(!g.fixed_alpha || g.use_alpha_connection || *g.fixed_alpha == 1, source,
          "gka_config.fixed_alpha is not 1, but use_alpha_connection is false, which means 1; set "
          "one of them");
  require(!g.learned_ridge || g.fixed_alpha.value_or(1) > 0, source,
          "gka_config.learned_ridge has no effect with fixed_alpha 0, where nothing is solved");
}

ModelConfig parse_config(std::string_view json_text, const std::string& source) {
  const Json json = parse_json(json_text, source);
  ObjectReader in(json, source);
  ModelConfig c;
  in.require("model_type");
  in.get_choice("model_type", c.model_type, {"hybrid_qwen3"});
  if (const Json* architectures = in.raw("architectures");
      architectures != nullptr && !architectures->is_null()) {
    c.architectures.clear();
    if (!architectures->is_array()) in.reject("architectures", "it must be an array of strings");
    for (const Json& item : *architectures) {
      if (!item.is_string()) in.reject("architectures", "it must be an array of strings");
      c.architectures.push_back(item.get<std::string>());
    }
  }
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "head_dim", "hybrid_override_pattern"}) {
    in.require(key);
  }
  in.get("vocab_size", c.vocab_size, 1, kMaxVocab);
  in.get("hidden_size", c.hidden_size, 1, kMaxHidden);
  in.get("intermediate_size", c.intermediate_size, 0, kMaxIntermediate);
  in.get("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  in.get("num_attention_heads", c.num_attention_heads, 1, kMaxHeads);
  c.num_key_value_heads = c.num_attention_heads;
  in.get("num_key_value_heads", c.num_key_value_heads, 1, kMaxHeads);
  in.get("head_dim", c.head_dim, 1, kMaxAttentionHeadDim);
  in.get_choice("hidden_act", c.hidden_act, {"silu"});
  in.get("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  in.get("rms_norm_eps", c.rms_norm_eps, 0.0, 1.0, true);
  c.rope_theta = read_rope_theta(in, source);
  in.get("attention_bias", c.attention_bias);
  in.get("tie_word_embeddings", c.tie_word_embeddings);
  in.get("initializer_range", c.initializer_range, 0.0, 10.0, true);
  read_dtype(in, c.torch_dtype);
  read_token_id(in, "bos_token_id", c.vocab_size, c.bos_token_id);
  read_token_id(in, "eos_token_id", c.vocab_size, c.eos_token_id);
  std::string pattern;
  in.get("hybrid_override_pattern", pattern);
  c.layers = parse_pattern(pattern, source);
  if (const Json* gka = in.raw("gka_config"); gka != nullptr && !gka->is_null()) {
    c.gka.extra = read_gka(*gka, source, c.gka);
  }
  in.get("linear_num_key_heads", c.linear_num_key_heads, 1, kMaxHeads);
  in.get("linear_num_value_heads", c.linear_num_value_heads, 1, kMaxHeads);
  in.get("linear_key_head_dim", c.linear_key_head_dim, 1, kMaxGkaHeadDim);
  in.get("linear_value_head_dim", c.linear_value_head_dim, 1, kMaxGkaHeadDim);
  in.get("linear_conv_kernel_dim", c.linear_conv_kernel_dim, 1, kMaxConv);

  // Keys of the family that change the arithmetic in ways that are not built.
  double dropout = 0;
  if (in.get("attention_dropout", dropout, 0.0, 1.0) && dropout != 0) {
    in.reject("attention_dropout", "it is not built; it must be 0", ErrorCode::unsupported);
  }
  double rotary = 1;
  if (in.get("partial_rotary_factor", rotary, 0.0, 1.0, true) && rotary != 1) {
    in.reject("partial_rotary_factor", "it is not built; it must be 1", ErrorCode::unsupported);
  }
  bool sliding = false;
  if (in.get("use_sliding_window", sliding) && sliding) {
    in.reject("use_sliding_window", "it is not built yet; it must be false",
              ErrorCode::unsupported);
  }
  c.extra = in.rest();
  // Read to be checked, written back as they came.
  for (const char* key : {"attention_dropout", "partial_rotary_factor", "use_sliding_window"}) {
    if (in.has(key)) c.extra.emplace(key, json.at(key).dump());
  }
  validate(c, source);
  return c;
}

ModelConfig read_config(const fs::path& path) {
  std::error_code ignored;
  const fs::path file = fs::is_directory(path, ignored) ? path / "config.json" : path;
  return parse_config(read_text(file, kMaxConfigBytes), file.string());
}

}  // namespace kalmanet::models
