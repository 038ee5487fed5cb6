// config.json written; and what a config implies: parameters, state sizes.
#include <algorithm>

#include "models/config.hpp"
#include "models/json.hpp"

namespace kalmanet::models {
namespace {

using OrderedJson = nlohmann::ordered_json;

void add_extra(OrderedJson& object, const ExtraKeys& extra, const char* where) {
  for (const auto& [key, text] : extra) {
    if (object.contains(key)) {
      fail(where, "extra key " + in_quotes(key) + " is a key of its own; set that instead");
    }
    try {
      object[key] = OrderedJson::parse(text);
    } catch (const Json::exception&) {
      fail(where, "extra key " + in_quotes(key) + " is " + in_quotes(text) + ", which is not JSON");
    }
  }
}

template <class T>
void add_if(OrderedJson& object, const char* key, const std::optional<T>& value) {
  if (value) object[key] = *value;
}

OrderedJson gka_json(const GkaConfig& g) {
  const GkaConfig defaults;
  OrderedJson j;
  j["use_beta_gate"] = g.use_beta_gate;
  j["use_alpha_connection"] = g.use_alpha_connection;
  j["use_v_conv"] = g.use_v_conv;
  j["use_forgetting_gate"] = g.use_forgetting_gate;
  j["use_forgetting_gate_kk"] = g.use_forgetting_gate_kk;
  j["gla_rescale"] = g.gla_rescale;
  j["use_gate"] = g.use_gate;
  j["bp_lambda"] = g.bp_lambda;
  j["solver_type"] = g.solver_type;
  if (g.num_iter == 0) {
    j["num_iter"] = "auto";
  } else {
    j["num_iter"] = g.num_iter;
  }
  j["ridge_strength"] = g.ridge_strength;
  j["conv_size"] = g.conv_size;
  j["norm_eps"] = g.norm_eps;
  j["chunk_size"] = g.chunk_size;
  add_if(j, "num_q_heads", g.num_q_heads);
  add_if(j, "num_k_heads", g.num_k_heads);
  add_if(j, "num_v_heads", g.num_v_heads);
  add_if(j, "head_dim", g.head_dim);
  // Extensions, only where they say something.
  if (g.expand_v != defaults.expand_v) j["expand_v"] = g.expand_v;
  if (g.learned_ridge) j["learned_ridge"] = true;
  if (g.tolerance != defaults.tolerance) j["tolerance"] = g.tolerance;
  if (g.arithmetic != defaults.arithmetic) j["arithmetic"] = g.arithmetic;
  if (g.qk_norm != defaults.qk_norm) j["qk_norm"] = g.qk_norm;
  add_if(j, "fixed_alpha", g.fixed_alpha);
  add_extra(j, g.extra, "gka_config");
  return j;
}

// Products of sizes that a config may have set to anything: the largest int64 instead of overflow.
int64_t saturating_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) return INT64_MAX;
  }
  return product;
}

}  // namespace

std::string to_json(const ModelConfig& c) {
  validate(c);
  OrderedJson j;
  j["architectures"] = c.architectures;
  j["model_type"] = c.model_type;
  j["vocab_size"] = c.vocab_size;
  j["hidden_size"] = c.hidden_size;
  j["intermediate_size"] = c.intermediate_size;
  j["num_hidden_layers"] = c.num_hidden_layers;
  j["num_attention_heads"] = c.num_attention_heads;
  j["num_key_value_heads"] = c.num_key_value_heads;
  j["head_dim"] = c.head_dim;
  j["hidden_act"] = c.hidden_act;
  j["max_position_embeddings"] = c.max_position_embeddings;
  j["rms_norm_eps"] = c.rms_norm_eps;
  // Both spellings: readers before and after the key was renamed.
  j["rope_theta"] = c.rope_theta;
  j["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", c.rope_theta}};
  j["attention_bias"] = c.attention_bias;
  j["tie_word_embeddings"] = c.tie_word_embeddings;
  j["initializer_range"] = c.initializer_range;
  j["torch_dtype"] = c.torch_dtype;
  add_if(j, "bos_token_id", c.bos_token_id);
  add_if(j, "eos_token_id", c.eos_token_id);
  j["hybrid_override_pattern"] = to_pattern(c.layers);
  j["gka_config"] = gka_json(c.gka);
  add_if(j, "linear_num_key_heads", c.linear_num_key_heads);
  add_if(j, "linear_num_value_heads", c.linear_num_value_heads);
  add_if(j, "linear_key_head_dim", c.linear_key_head_dim);
  add_if(j, "linear_value_head_dim", c.linear_value_head_dim);
  add_if(j, "linear_conv_kernel_dim", c.linear_conv_kernel_dim);
  add_extra(j, c.extra, "config");
  return j.dump(2) + "\n";
}

int64_t ParameterSpec::numel() const noexcept {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

std::vector<ParameterSpec> parameter_specs(const ModelConfig& c) {
  validate(c);
  std::vector<ParameterSpec> specs;
  const int64_t D = c.hidden_size;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    specs.push_back({name, std::move(shape)});
  };
  const auto add_linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
    add(name + ".weight", {out, in});
    if (bias) add(name + ".bias", {out});
  };
  add("model.embed_tokens.weight", {c.vocab_size, D});
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    add(layer + "input_layernorm.weight", {D});
    if (c.layers[i] == LayerKind::attention) {
      const std::string p = layer + "self_attn.";
      const int64_t q_size = c.num_attention_heads * c.head_dim;
      const int64_t kv_size = c.num_key_value_heads * c.head_dim;
      add_linear(p + "q_proj", q_size, D, c.attention_bias);
      add_linear(p + "k_proj", kv_size, D, c.attention_bias);
      add_linear(p + "v_proj", kv_size, D, c.attention_bias);
      add_linear(p + "o_proj", D, q_size, c.attention_bias);
      add(p + "q_norm.weight", {c.head_dim});
      add(p + "k_norm.weight", {c.head_dim});
    } else {
      const std::string p = layer + "gka.";
      const GkaHeads heads = c.gka_heads();
      const int64_t H = heads.num_heads(), V = heads.value_head_dim;
      const int64_t q_size = heads.num_q_heads * heads.head_dim;
      const int64_t k_size = heads.num_k_heads * heads.head_dim;
      const int64_t v_size = heads.num_v_heads * V;
      add_linear(p + "q_proj", q_size, D, false);
      add_linear(p + "k_proj", k_size, D, false);
      add_linear(p + "v_proj", v_size, D, false);
      add(p + "q_conv1d.weight", {q_size, 1, heads.conv_size});
      add(p + "k_conv1d.weight", {k_size, 1, heads.conv_size});
      if (c.gka.use_v_conv) add(p + "v_conv1d.weight", {v_size, 1, heads.conv_size});
      if (c.gka.use_beta_gate) add_linear(p + "b_proj", H, D, true);
      if (c.gka.use_alpha_connection && !c.gka.fixed_alpha)
        add_linear(p + "alpha_proj", H, D, true);
      if (c.gka.use_forgetting_gate) {
        add_linear(p + "a_proj", H, D, false);
        add(p + "A_log", {H});
        add(p + "dt_bias", {H});
      }
      if (c.gka.learned_ridge) add_linear(p + "ridge_proj", H, D, true);
      if (c.gka.use_gate) add_linear(p + "g_proj", H * V, D, false);
      add(p + "o_norm.weight", {V});
      add_linear(p + "o_proj", D, H * V, false);
    }
    if (c.intermediate_size > 0) {
      add(layer + "post_attention_layernorm.weight", {D});
      add_linear(layer + "mlp.gate_proj", c.intermediate_size, D, false);
      add_linear(layer + "mlp.up_proj", c.intermediate_size, D, false);
      add_linear(layer + "mlp.down_proj", D, c.intermediate_size, false);
    }
  }
  add("model.norm.weight", {D});
  if (!c.tie_word_embeddings) add_linear("lm_head", c.vocab_size, D, false);
  return specs;
}

int64_t num_parameters(const ModelConfig& config) {
  int64_t n = 0;
  for (const ParameterSpec& spec : parameter_specs(config)) n += spec.numel();
  return n;
}

int64_t state_bytes(const ModelConfig& c, int64_t position, int64_t element_size) {
  const GkaHeads heads = c.gka_heads();
  const int64_t K = heads.head_dim, V = heads.value_head_dim;
  const int64_t channels = heads.num_q_heads * K + heads.num_k_heads * K +
                           (c.gka.use_v_conv ? heads.num_v_heads * V : 0);
  const int64_t gka_layer = 4 * (heads.num_heads() * K * (K + V) + channels * heads.conv_size);
  const int64_t attention = saturating_product({2, element_size, c.num_key_value_heads, c.head_dim,
                                                c.num_layers(LayerKind::attention), position});
  int64_t bytes = 0;
  if (__builtin_add_overflow(c.num_layers(LayerKind::gka) * gka_layer, attention, &bytes)) {
    return INT64_MAX;
  }
  return bytes;
}

int64_t kv_cache_bytes(const ModelConfig& c, int64_t position, int64_t element_size) {
  return saturating_product(
      {2, element_size, c.num_key_value_heads, c.head_dim, c.num_hidden_layers, position});
}

}  // namespace kalmanet::models
