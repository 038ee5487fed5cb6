// The hybrid language model: against a plain twin, one meaning however the tokens are cut, limits
// and bad input.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "models/small_model.hpp"
#include "support/message_of.hpp"

namespace kalmanet::models {
namespace {

using at::Tensor;
using testing::HasSubstr;

constexpr double kBound = 1e-5;  // DESIGN's promise for float32: one meaning

// ---- against a twin written from the formulas, in float64, one head and position at a time ----

struct Weights {
  const HybridLanguageModel& model;
  Tensor operator()(const std::string& name) const {
    return model->named_parameters()[name].detach().to(at::kDouble);
  }
};

Tensor plain_norm(const Tensor& x, const Tensor& weight, double eps) {
  return weight * x / at::sqrt(x.square().mean(-1, true) + eps);
}

Tensor plain_rotate(const Tensor& x, int64_t position, double theta) {  // [D]
  const int64_t D = x.size(0);
  Tensor out = at::zeros_like(x);
  for (int64_t i = 0; i < D / 2; ++i) {
    const double angle = static_cast<double>(position) *
                         std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(D));
    out[i] = x[i] * std::cos(angle) - x[i + D / 2] * std::sin(angle);
    out[i + D / 2] = x[i + D / 2] * std::cos(angle) + x[i] * std::sin(angle);
  }
  return out;
}

// One attention block of the model on x [T,D].
Tensor plain_block(const HybridLanguageModel& model, const Tensor& x, const std::string& layer) {
  const Weights w{model};
  const ModelConfig& c = model->config();
  const int64_t T = x.size(0), H = c.num_attention_heads, D = c.head_dim;
  const Tensor normed = plain_norm(x, w(layer + "input_layernorm.weight"), c.rms_norm_eps);
  const auto project = [&](const std::string& name) {
    Tensor y = normed.matmul(w(layer + "self_attn." + name + ".weight").t());
    if (c.attention_bias) y = y + w(layer + "self_attn." + name + ".bias");
    return y.view({T, -1, D});
  };
  const Tensor q =
      plain_norm(project("q_proj"), w(layer + "self_attn.q_norm.weight"), c.rms_norm_eps);
  const Tensor k =
      plain_norm(project("k_proj"), w(layer + "self_attn.k_norm.weight"), c.rms_norm_eps);
  const Tensor v = project("v_proj");
  Tensor mixed = at::zeros({T, H, D}, at::kDouble);
  for (int64_t h = 0; h < H; ++h) {
    const int64_t kv = h / (H / c.num_key_value_heads);
    for (int64_t t = 0; t < T; ++t) {
      const Tensor query = plain_rotate(q[t][h], t, c.rope_theta);
      Tensor scores = at::zeros({t + 1}, at::kDouble);
      for (int64_t s = 0; s <= t; ++s) {
        scores[s] =
            query.dot(plain_rotate(k[s][kv], s, c.rope_theta)) / std::sqrt(static_cast<double>(D));
      }
      const Tensor p = at::softmax(scores, 0);
      for (int64_t s = 0; s <= t; ++s) mixed[t][h] += p[s] * v[s][kv];
    }
  }
  Tensor out = mixed.view({T, H * D}).matmul(w(layer + "self_attn.o_proj.weight").t());
  if (c.attention_bias) out = out + w(layer + "self_attn.o_proj.bias");
  const Tensor y = x + out;
  const Tensor z = plain_norm(y, w(layer + "post_attention_layernorm.weight"), c.rms_norm_eps);
  const Tensor gate = z.matmul(w(layer + "mlp.gate_proj.weight").t());
  const Tensor up = z.matmul(w(layer + "mlp.up_proj.weight").t());
  return y + (gate * at::sigmoid(gate) * up).matmul(w(layer + "mlp.down_proj.weight").t());
}

TEST(Model, AttentionModelEqualsPlainTwin) {
  for (const bool bias : {false, true}) {
    ModelConfig config = small_config("*-*");
    config.attention_bias = bias;
    HybridLanguageModel model = small_model(config);
    const Tensor ids = random_ids(2, 13);
    const at::NoGradGuard no_grad;
    const Tensor logits = model->forward(ids);
    ASSERT_EQ(logits.sizes(), (std::vector<int64_t>{2, 13, 61}));
    const Weights w{model};
    for (int64_t b = 0; b < 2; ++b) {
      Tensor x = w("model.embed_tokens.weight").index_select(0, ids[b]);
      x = plain_block(model, x, "model.layers.0.");
      x = plain_block(model, x, "model.layers.1.");
      x = plain_norm(x, w("model.norm.weight"), config.rms_norm_eps);
      const Tensor expected = x.matmul(w("lm_head.weight").t());
      EXPECT_LE(relative_error(logits[b].to(at::kDouble), expected), kBound) << "bias " << bias;
    }
  }
}

TEST(Model, GkaBlockIsTheLayerBetweenNormAndResidual) {
  const ModelConfig config = small_config("GKA");
  HybridLanguageModel model = small_model(config);
  const Weights w{model};
  const at::NoGradGuard no_grad;
  const Tensor ids = random_ids(1, 30);
  layers::GatedKalmaNet layer(gka_options(config));
  for (auto& item : layer->named_parameters()) {
    item.value().copy_(model->named_parameters()["model.layers.0.gka." + item.key()]);
  }
  const std::string p = "model.layers.0.";
  const Tensor x = w("model.embed_tokens.weight").index_select(0, ids[0]);
  const Tensor normed = plain_norm(x, w(p + "input_layernorm.weight"), config.rms_norm_eps);
  const Tensor y = x + layer->forward(normed.to(at::kFloat).unsqueeze(0))[0];
  const Tensor z = plain_norm(y, w(p + "post_attention_layernorm.weight"), config.rms_norm_eps);
  const Tensor gate = z.matmul(w(p + "mlp.gate_proj.weight").t());
  Tensor out = y + (gate * at::sigmoid(gate) * z.matmul(w(p + "mlp.up_proj.weight").t()))
                       .matmul(w(p + "mlp.down_proj.weight").t());
  out = plain_norm(out, w("model.norm.weight"), config.rms_norm_eps);
  EXPECT_LE(
      relative_error(model->forward(ids)[0].to(at::kDouble), out.matmul(w("lm_head.weight").t())),
      kBound);
}

// ---- parameters ----

TEST(Model, ParametersAreThoseThatTheConfigPromises) {
  std::vector<ModelConfig> configs = {small_config("GKA-*"), small_config("GKA"),
                                      small_config("*")};
  configs[0].attention_bias = true;
  configs[0].tie_word_embeddings = true;
  configs[1].intermediate_size = 0;
  configs[1].gka.learned_ridge = true;
  configs[1].gka.num_v_heads = 8;
  configs[1].gka.expand_v = 1.5;
  configs.push_back(small_config("GKA"));
  configs[3].gka.use_v_conv = configs[3].gka.use_beta_gate = configs[3].gka.use_gate = false;
  configs[3].gka.use_forgetting_gate = false;
  configs[3].gka.fixed_alpha = 0.5;
  for (const ModelConfig& config : configs) {
    SCOPED_TRACE(to_json(config));
    HybridLanguageModel model(config);
    std::map<std::string, std::vector<int64_t>> built, promised;
    for (const auto& item : model->named_parameters()) {
      built[item.key()] = item.value().sizes().vec();
    }
    for (const ParameterSpec& spec : parameter_specs(config)) promised[spec.name] = spec.shape;
    EXPECT_EQ(built, promised);
    EXPECT_EQ(model->num_parameters(), num_parameters(config));
    EXPECT_TRUE(model->named_buffers().is_empty());
  }
}

TEST(Model, InitialWeights) {
  ModelConfig config = small_config("GKA-*-GKA-*");
  config.hidden_size = 128;
  config.initializer_range = 0.02;
  torch::manual_seed(3);
  HybridLanguageModel model(config);
  const auto spread = [&](const std::string& name) {
    return model->named_parameters()[name].std().item<double>();
  };
  EXPECT_NEAR(spread("model.embed_tokens.weight"), 0.02, 0.001);
  EXPECT_NEAR(spread("model.layers.1.self_attn.q_proj.weight"), 0.02, 0.002);
  EXPECT_NEAR(spread("model.layers.0.gka.v_proj.weight"), 0.02, 0.002);
  const double residual = 0.02 / std::sqrt(8.0);
  EXPECT_NEAR(spread("model.layers.0.gka.o_proj.weight"), residual, 0.001);
  EXPECT_NEAR(spread("model.layers.1.mlp.down_proj.weight"), residual, 0.001);
  // From the same seed the same weights, with a learned ridge too: that starts as a constant.
  for (const bool learned : {false, true}) {
    config.gka.learned_ridge = learned;
    torch::manual_seed(3);
    HybridLanguageModel again(config);
    const auto weights = again->named_parameters();
    for (const auto& item : model->named_parameters()) {
      EXPECT_TRUE(at::equal(item.value(), weights[item.key()])) << item.key() << ", " << learned;
    }
    if (!learned) continue;
    EXPECT_EQ(weights["model.layers.0.gka.ridge_proj.weight"].abs().max().item<double>(), 0);
    EXPECT_NEAR(weights["model.layers.2.gka.ridge_proj.bias"].min().item<double>(), std::log(0.01),
                1e-6);
  }
}

TEST(Model, TiedEmbeddings) {
  ModelConfig config = small_config("GKA");
  config.tie_word_embeddings = true;
  HybridLanguageModel model = small_model(config);
  EXPECT_FALSE(model->named_parameters().contains("lm_head.weight"));
  const Tensor ids = random_ids(1, 5);
  const Tensor hidden = model->hidden_states(ids);
  const Tensor embedding = model->named_parameters()["model.embed_tokens.weight"];
  EXPECT_TRUE(at::equal(model->forward(ids), at::linear(hidden, embedding)));
  // Both uses reach the one gradient.
  model->forward(ids).sum().backward();
  EXPECT_GT(embedding.grad().abs().sum(1).gt(0).sum().item<int64_t>(), 5);
}

// ---- one meaning ----

const char* const kPatterns[] = {"GKA", "*", "GKA-*-GKA", "*-GKA"};

TEST(Model, PackedEqualsSeparate) {
  for (const char* pattern : kPatterns) {
    HybridLanguageModel model = small_model(small_config(pattern));
    const at::NoGradGuard no_grad;
    const std::vector<int64_t> lengths = {7, 1, 0, 90, 3};
    const Tensor ids = random_ids(1, 101);
    std::vector<int64_t> offsets = {0};
    for (const int64_t n : lengths) offsets.push_back(offsets.back() + n);
    const Tensor packed = model->forward(ids, at::tensor(offsets, at::kLong));
    for (size_t i = 0; i < lengths.size(); ++i) {
      if (lengths[i] == 0) continue;
      const Tensor alone = model->forward(ids.narrow(1, offsets[i], lengths[i]));
      EXPECT_LE(relative_error(packed.narrow(1, offsets[i], lengths[i]), alone), kBound)
          << pattern << ", sequence " << i << " of length " << lengths[i];
    }
    // Nothing of one sequence reaches another, not even a rounding error.
    Tensor other = ids.clone();
    other.narrow(1, 0, 7).add_(1).remainder_(61);
    const Tensor changed = model->forward(other, at::tensor(offsets, at::kLong));
    EXPECT_FALSE(at::equal(changed.narrow(1, 0, 7), packed.narrow(1, 0, 7)));
    EXPECT_TRUE(at::equal(changed.narrow(1, 7, 94), packed.narrow(1, 7, 94))) << pattern;
  }
}

TEST(Model, PrefillAndStepsEqualTheWhole) {
  for (const char* pattern : kPatterns) {
    HybridLanguageModel model = small_model(small_config(pattern));
    const at::NoGradGuard no_grad;
    const Tensor ids = random_ids(2, 150);
    const Tensor whole = model->forward(ids);
    // Prefill, a single token, a long continuation, a short one, then tokens one by one.
    for (const std::vector<int64_t>& pieces :
         {std::vector<int64_t>{70, 1, 60, 5}, {1, 1, 1}, {100, 30}, {149}}) {
      ModelState state;
      int64_t at = 0;
      std::vector<Tensor> parts;
      const auto read = [&](int64_t n) {
        parts.push_back(model->forward(ids.narrow(1, at, n), {}, &state));
        at += n;
      };
      for (const int64_t n : pieces) read(n);
      while (at < 150) read(1);
      EXPECT_LE(relative_error(at::cat(parts, 1), whole), kBound) << pattern << ", " << pieces[0];
      EXPECT_EQ(state.position, 150);
    }
  }
}

TEST(Model, GradientsFlowThroughAStateWithGradientsOn) {
  HybridLanguageModel model = small_model(small_config("*-GKA"));
  const Tensor ids = random_ids(1, 24);
  model->forward(ids).square().sum().backward();
  std::vector<Tensor> whole;
  for (Tensor& p : model->parameters()) whole.push_back(p.grad().clone());
  model->zero_grad();
  ModelState state;
  const Tensor first = model->forward(ids.narrow(1, 0, 10), {}, &state);
  const Tensor second = model->forward(ids.narrow(1, 10, 14), {}, &state);
  at::cat({first, second}, 1).square().sum().backward();
  size_t i = 0;
  for (const auto& item : model->named_parameters()) {
    EXPECT_LE(relative_error(item.value().grad(), whole[i++]), 1e-4) << item.key();
  }
}

TEST(Model, AForkedStateLeavesTheOriginalAlone) {
  HybridLanguageModel model = small_model(small_config("GKA-*"));
  const at::NoGradGuard no_grad;
  const Tensor ids = random_ids(1, 20);
  ModelState state;
  model->forward(ids, {}, &state);
  ModelState fork = state.clone();
  const Tensor next = random_ids(1, 1, 61, 9);
  model->forward(random_ids(1, 3, 61, 8), {}, &fork);
  ModelState fresh;
  model->forward(ids, {}, &fresh);
  EXPECT_TRUE(at::equal(model->forward(next, {}, &state), model->forward(next, {}, &fresh)));
}

TEST(Model, StateBytes) {
  const ModelConfig gka = small_config("GKA-GKA");
  HybridLanguageModel model = small_model(gka);
  const at::NoGradGuard no_grad;
  ModelState state;
  model->forward(random_ids(1, 100), {}, &state);
  EXPECT_EQ(state.bytes(), state_bytes(gka, 100));
  for (int i = 0; i < 3; ++i) model->forward(random_ids(1, 1), {}, &state);
  EXPECT_EQ(state.bytes(), state_bytes(gka, 0));  // constant

  const ModelConfig mixed = small_config("GKA-*");
  HybridLanguageModel other = small_model(mixed);
  ModelState growing;
  other->forward(random_ids(1, 64), {}, &growing);
  EXPECT_EQ(growing.bytes(), state_bytes(mixed, 64));
  other->forward(random_ids(1, 1), {}, &growing);
  EXPECT_EQ(growing.bytes(), state_bytes(mixed, 128));  // doubled, not one more
}

// ---- limits and bad input ----

TEST(Model, TheCacheEndsAtMaxPositionEmbeddings) {
  ModelConfig config = small_config("GKA-*");
  config.max_position_embeddings = 100;
  HybridLanguageModel model = small_model(config);
  const at::NoGradGuard no_grad;
  ModelState state;
  model->forward(random_ids(1, 99), {}, &state);
  model->forward(random_ids(1, 1), {}, &state);
  EXPECT_EQ(state.bytes(), state_bytes(config, 100));  // 64, then 100 rather than 128
  const std::string message = message_of([&] { model->forward(random_ids(1, 1), {}, &state); });
  EXPECT_THAT(message, HasSubstr("max_position_embeddings = 100"));
  EXPECT_THAT(message, HasSubstr("101 tokens"));
  EXPECT_EQ(state.position, 100);
  EXPECT_THAT(message_of([&] { model->forward(random_ids(1, 101)); }), HasSubstr("101 tokens"));
  // Packed sequences count one by one; GKA layers have no such limit.
  model->forward(random_ids(1, 150), at::tensor({0, 80, 150}, at::kLong));
  config.layers = parse_pattern("GKA-GKA", "test");
  small_model(config)->forward(random_ids(1, 300));
}

TEST(Model, BadInputTable) {
  HybridLanguageModel model = small_model(small_config("GKA-*"));
  HybridLanguageModel attention = small_model(small_config("*-*"));
  const at::NoGradGuard no_grad;
  const Tensor ids = random_ids(1, 10);
  const auto offsets = [](std::vector<int64_t> values) { return at::tensor(values, at::kLong); };
  ModelState used, of_two;
  ModelConfig wrong;
  wrong.vocab_size = -1;
  attention->forward(ids, {}, &used);
  model->forward(random_ids(2, 10), {}, &of_two);
  struct Case {
    std::function<void()> action;
    std::vector<std::string> message;
  };
  const std::vector<Case> cases = {
      {[&] { model->forward(ids.to(at::kInt)); }, {"input_ids", "Int", "int64"}},
      {[&] { model->forward(ids.to(at::kFloat)); }, {"input_ids", "Float", "int64"}},
      {[&] { model->forward(ids[0]); }, {"input_ids", "[10]", "[B,T]"}},
      {[&] { model->forward(ids.narrow(1, 0, 0)); }, {"input_ids", "at least one token"}},
      {[&] { model->forward(ids + 61); }, {"input_ids", "vocab_size-1 = 60"}},
      {[&] { model->forward(ids - 61); }, {"input_ids", "from 0"}},
      {[&] { model->forward(ids, offsets({0, 9})); }, {"cu_seqlens", "T = 10"}},
      {[&] { model->forward(ids, offsets({1, 10})); }, {"cu_seqlens", "from 1"}},
      {[&] { model->forward(ids, offsets({0, 7, 5, 10})); }, {"cu_seqlens", "descends"}},
      {[&] { model->forward(ids, offsets({10})); }, {"cu_seqlens", "[N+1]"}},
      {[&] { model->forward(ids, offsets({0, 10}).to(at::kInt)); }, {"cu_seqlens", "int64"}},
      {[&] { model->forward(random_ids(2, 5), offsets({0, 5})); }, {"cu_seqlens", "[1,T]"}},
      {[&] { model->forward(ids, offsets({0, 10}), &of_two); }, {"state", "packed"}},
      {[&] { model->forward(ids, {}, &used); }, {"state", "other layers than GKA-*"}},
      {[&] { model->forward(ids, {}, &of_two); }, {"state"}},
      {[&] { attention->forward(random_ids(2, 1), {}, &used); }, {"state", "a batch of 1"}},
      {[&] { HybridLanguageModel m(wrong); }, {"vocab_size", "-1"}},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::string message = message_of(cases[i].action);
    for (const std::string& part : cases[i].message) {
      EXPECT_THAT(message, HasSubstr(part)) << "case " << i;
    }
    EXPECT_THAT(message, testing::Not(HasSubstr("not a kalmanet::Error"))) << "case " << i;
  }
}

}  // namespace
}  // namespace kalmanet::models
