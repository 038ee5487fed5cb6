// Sampling, generation, and model folders.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <torch/torch.h>

#include <fstream>
#include <limits>

#include "models/generate.hpp"
#include "models/io.hpp"
#include "models/small_model.hpp"
#include "models/tokenizer.hpp"
#include "support/message_of.hpp"
#include "support/temporary_folder.hpp"

namespace kalmanet::models {
namespace {

using at::Tensor;
using testing::HasSubstr;
namespace fs = std::filesystem;

// ---- sampling ----

std::vector<int64_t> counts(const SamplingOptions& options, const Tensor& logits, int draws) {
  Sampler sampler(options);
  std::vector<int64_t> count(static_cast<size_t>(logits.numel()));
  for (int i = 0; i < draws; ++i) ++count[static_cast<size_t>(sampler.sample(logits))];
  return count;
}

TEST(Sampler, DrawsFromTheDistribution) {
  const Tensor p = at::tensor({0.5, 0.05, 0.25, 0.2}, at::kFloat);
  const int draws = 20000;
  const auto check = [&](const SamplingOptions& options, const std::vector<double>& expected) {
    const auto count = counts(options, p.log(), draws);
    for (size_t i = 0; i < expected.size(); ++i) {
      // Five standard deviations of a binomial count (seeds are fixed: this cannot flicker).
      const double sigma = std::sqrt(draws * expected[i] * (1 - expected[i]));
      EXPECT_NEAR(static_cast<double>(count[i]), draws * expected[i], 5 * sigma)
          << "token " << i << " top_k " << options.top_k << " top_p " << options.top_p;
    }
  };
  check({.seed = 1}, {0.5, 0.05, 0.25, 0.2});
  check({.top_k = 2, .seed = 2}, {2. / 3, 0, 1. / 3, 0});
  check({.top_p = 0.74, .seed = 3}, {2. / 3, 0, 1. / 3, 0});
  check({.top_p = 0.76, .seed = 4}, {0.5 / 0.95, 0, 0.25 / 0.95, 0.2 / 0.95});
  check({.top_p = 0.01, .seed = 5}, {1, 0, 0, 0});
  // top_p counts within what top_k left: 0.5/0.75 reaches 0.6 alone.
  check({.top_k = 2, .top_p = 0.6, .seed = 6}, {1, 0, 0, 0});
  check({.top_k = 100, .seed = 7}, {0.5, 0.05, 0.25, 0.2});
  // Temperature 0.5 squares the probabilities.
  const double z = 0.25 + 0.0025 + 0.0625 + 0.04;
  check({.temperature = 0.5, .seed = 8}, {0.25 / z, 0.0025 / z, 0.0625 / z, 0.04 / z});
  check({.seed = 9, .vocab_limit = 2}, {0.5 / 0.55, 0.05 / 0.55, 0, 0});
  check({.temperature = 0, .seed = 10}, {1, 0, 0, 0});
}

TEST(Sampler, BadInputTable) {
  EXPECT_THAT(message_of([] { Sampler s({.temperature = -1}); }), HasSubstr("temperature"));
  EXPECT_THAT(message_of([] { Sampler s({.temperature = NAN}); }), HasSubstr("temperature"));
  EXPECT_THAT(message_of([] { Sampler s({.top_k = -1}); }), HasSubstr("top_k"));
  EXPECT_THAT(message_of([] { Sampler s({.top_p = 0}); }), HasSubstr("top_p"));
  EXPECT_THAT(message_of([] { Sampler s({.top_p = 1.5}); }), HasSubstr("top_p"));
  EXPECT_THAT(message_of([] { Sampler s({.max_new_tokens = -1}); }), HasSubstr("max_new_tokens"));
  Sampler sampler({});
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_THAT(message_of([&] { sampler.sample(at::tensor({0.f, NAN})); }), HasSubstr("NaN"));
  EXPECT_THAT(message_of([&] { sampler.sample(at::tensor({-inf, -inf})); }), HasSubstr("finite"));
  EXPECT_THAT(message_of([&] { sampler.sample(at::zeros({2, 2})); }), HasSubstr("[vocab]"));
  EXPECT_EQ(sampler.sample(at::tensor({-inf, 1.f, -inf})), 1);
}

// ---- generation ----

std::vector<int64_t> generated(HybridLanguageModel& model, const std::vector<int64_t>& prompt,
                               const SamplingOptions& options, ModelState* state = nullptr) {
  std::vector<int64_t> tokens;
  generate(model, prompt, options, [&](int64_t t) { return tokens.push_back(t), true; }, state);
  return tokens;
}

TEST(Generate, GreedyIsTheArgmaxOfTheFullForward) {
  for (const char* pattern : {"GKA-GKA", "GKA-*"}) {
    HybridLanguageModel model = small_model(small_config(pattern));
    std::vector<int64_t> text = {5, 17, 60, 3};
    const auto tokens = generated(model, text, {.max_new_tokens = 40, .temperature = 0});
    ASSERT_EQ(tokens.size(), 40U);
    const at::NoGradGuard no_grad;
    for (const int64_t token : tokens) {
      const Tensor logits = model->forward(at::tensor(text, at::kLong).unsqueeze(0))[0][-1];
      EXPECT_EQ(token, logits.argmax().item<int64_t>()) << pattern << " after " << text.size();
      text.push_back(token);
    }
  }
}

TEST(Generate, TheSeedDecides) {
  HybridLanguageModel model = small_model(small_config("GKA-*"));
  const SamplingOptions one = {.max_new_tokens = 50, .seed = 1},
                        two = {.max_new_tokens = 50, .seed = 2};
  const auto first = generated(model, {1, 2}, one);
  torch::manual_seed(999);  // the default generator has no part in it
  EXPECT_EQ(generated(model, {1, 2}, one), first);
  EXPECT_NE(generated(model, {1, 2}, two), first);
}

TEST(Generate, StopsAndGoesOn) {
  HybridLanguageModel model = small_model(small_config("GKA-*"));
  const SamplingOptions greedy = {.max_new_tokens = 30, .temperature = 0};
  const auto whole = generated(model, {4, 9}, greedy);
  // In two calls that share a state: the last token of the first begins the second.
  ModelState state;
  SamplingOptions half = greedy;
  half.max_new_tokens = 12;
  auto joined = generated(model, {4, 9}, half, &state);
  EXPECT_EQ(state.position, 2 + 11);  // the last one has not been read
  half.max_new_tokens = 18;
  const auto rest = generated(model, {joined.back()}, half, &state);
  joined.insert(joined.end(), rest.begin(), rest.end());
  EXPECT_EQ(joined, whole);

  int64_t seen = 0;
  const auto report =
      generate(model, std::vector<int64_t>{4, 9}, greedy, [&](int64_t) { return ++seen < 5; });
  EXPECT_EQ(report.stop, StopReason::callback);
  EXPECT_EQ(report.num_tokens, 5);
  SamplingOptions until = greedy;
  until.eos_token_id = whole[7];
  const auto stopped = generated(model, {4, 9}, until);
  const auto first = std::find(whole.begin(), whole.end(), whole[7]);
  EXPECT_EQ(stopped, std::vector<int64_t>(whole.begin(), first));
  EXPECT_TRUE(generated(model, {4}, {.max_new_tokens = 0}).empty());
  EXPECT_THAT(message_of([&] { generated(model, {}, greedy); }), HasSubstr("prompt"));
  EXPECT_THAT(message_of([&] { generated(model, {61}, greedy); }), HasSubstr("input_ids"));
}

TEST(Generate, EndsWithAClearErrorWhereTheCacheEnds) {
  ModelConfig config = small_config("GKA-*");
  config.max_position_embeddings = 40;
  HybridLanguageModel model = small_model(config);
  int64_t tokens = 0;
  const std::string message = message_of([&] {
    generate(model, std::vector<int64_t>{1, 2, 3}, {.max_new_tokens = 100},
             [&](int64_t) { return ++tokens, true; });
  });
  EXPECT_THAT(message, HasSubstr("max_position_embeddings = 40"));
  EXPECT_EQ(tokens, 38);  // 3 + 37 read, and the 38th seen
}

// Resident pages in KiB.
int64_t resident_kib() {
  malloc_trim(0);  // what is free at the heap's end comes and goes in steps of 132 KiB
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word == "VmRSS:") {
      int64_t kib = 0;
      status >> kib;
      return kib;
    }
  }
  return 0;
}

TEST(Generate, MemoryStaysFlat) {
  HybridLanguageModel model = small_model(small_config("GKA-GKA"));
  int64_t seen = 0, early = 0;
  generate(model, std::vector<int64_t>{1}, {.max_new_tokens = 3000}, [&](int64_t) {
    if (++seen == 500) early = resident_kib();
    return true;
  });
  ASSERT_GT(early, 0);
  // 64 bytes a token that nobody frees would be 156 KiB.
  EXPECT_LT(resident_kib() - early, 128) << "KiB more after 3000 tokens than after 500";
}

// ---- model folders ----

TEST(ModelFolder, SavedAndLoadedBitForBit) {
  for (const bool tied : {false, true}) {
    ModelConfig config = small_config("GKA-*");
    config.tie_word_embeddings = tied;
    config.vocab_size = 300;
    config.gka.learned_ridge = true;
    config.extra["note"] = "\"kept\"";
    HybridLanguageModel model = small_model(config);
    const TemporaryFolder folder;
    const fs::path dir = folder.path() / "made" / "here";
    save_model(model, dir);
    EXPECT_EQ(ByteTokenizer::read(dir).vocab_size(), 257);
    EXPECT_EQ(SafetensorsFile(dir / "model.safetensors").find("lm_head.weight").has_value(), !tied);

    torch::manual_seed(42);
    const Tensor expected_next = at::rand({4});
    torch::manual_seed(42);
    HybridLanguageModel loaded = load_model(dir);
    EXPECT_TRUE(at::equal(at::rand({4}), expected_next)) << "loading drew random numbers";
    EXPECT_EQ(to_json(loaded->config()), to_json(config));
    const auto theirs = loaded->named_parameters();
    ASSERT_EQ(theirs.size(), model->named_parameters().size());
    for (const auto& item : model->named_parameters()) {
      EXPECT_TRUE(at::equal(item.value(), theirs[item.key()])) << item.key();
      EXPECT_TRUE(theirs[item.key()].requires_grad()) << item.key();
    }
    const Tensor ids = random_ids(1, 20, 300);
    EXPECT_TRUE(at::equal(loaded->forward(ids), model->forward(ids)));
  }
}

TEST(ModelFolder, SixteenBitWeights) {
  const TemporaryFolder folder;
  HybridLanguageModel model = small_model(small_config("GKA-*"));
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    save_model(model, folder.path(), dtype);
    const auto stored = load_tensors(folder / "model.safetensors");
    EXPECT_EQ(stored.at("model.layers.0.gka.q_proj.weight").scalar_type(), dtype);
    EXPECT_EQ(stored.at("model.layers.0.gka.A_log").scalar_type(), at::kFloat);
    EXPECT_EQ(stored.at("model.layers.0.gka.dt_bias").scalar_type(), at::kFloat);
    HybridLanguageModel wide = load_model(folder.path());  // float32 by default
    HybridLanguageModel narrow = load_model(folder.path(), {.dtype = dtype});
    EXPECT_EQ(wide->config().torch_dtype, dtype == at::kHalf ? "float16" : "bfloat16");
    for (const auto& item : model->named_parameters()) {
      const Tensor rounded = item.key().ends_with("A_log") || item.key().ends_with("dt_bias")
                                 ? item.value()
                                 : item.value().to(dtype);
      EXPECT_TRUE(at::equal(wide->named_parameters()[item.key()], rounded.to(at::kFloat)));
      EXPECT_EQ(narrow->named_parameters()[item.key()].scalar_type(), rounded.scalar_type());
      EXPECT_TRUE(at::equal(narrow->named_parameters()[item.key()], rounded)) << item.key();
    }
    const at::NoGradGuard no_grad;
    const Tensor ids = random_ids(1, 20);
    const Tensor out = narrow->forward(ids);
    EXPECT_EQ(out.scalar_type(), dtype);
    // 16-bit arithmetic between the layers; 2^-8 a rounding, some dozens of them.
    EXPECT_LE(relative_error(out.to(at::kFloat), wide->forward(ids)), 0.05);
  }
}

TEST(ModelFolder, ShardedWeights) {
  const TemporaryFolder folder;
  HybridLanguageModel model = small_model(small_config("GKA-*"));
  save_model(model, folder.path());
  const auto tensors = load_tensors(folder / "model.safetensors");
  std::map<std::string, Tensor> half[2];
  std::string map;
  int i = 0;
  for (const auto& [name, tensor] : tensors) {
    const int shard = i++ % 2;
    half[shard][name] = tensor;
    map +=
        (map.empty() ? "\"" : ",\"") + name + "\":\"s" + std::to_string(shard) + ".safetensors\"";
  }
  fs::remove(folder / "model.safetensors");
  for (const int shard : {0, 1}) {
    save_tensors(folder / ("s" + std::to_string(shard) + ".safetensors"), half[shard]);
  }
  write_file(folder / "model.safetensors.index.json", "{\"weight_map\":{" + map + "}}");
  HybridLanguageModel loaded = load_model(folder.path());
  const Tensor ids = random_ids(1, 20);
  EXPECT_TRUE(at::equal(loaded->forward(ids), model->forward(ids)));
}

TEST(ModelFolder, AConfigThatContradictsTheWeights) {
  const TemporaryFolder folder;
  const ModelConfig config = small_config("GKA-*");
  save_model(small_model(config), folder.path());
  const auto with = [&](const std::function<void(ModelConfig&)>& change) {
    ModelConfig other = config;
    change(other);
    write_file(folder / "config.json", to_json(other));
    return message_of([&] { load_model(folder.path()); });
  };
  std::string message = with([](ModelConfig& c) { c.hidden_size = 32; });
  EXPECT_THAT(message, HasSubstr("shape: model.embed_tokens.weight is [61, 24], the config says"));
  EXPECT_THAT(message, HasSubstr("shape: model.norm.weight"));
  message = with([](ModelConfig& c) {
    c.layers.push_back(LayerKind::gka);
    c.num_hidden_layers = 3;
  });
  EXPECT_THAT(message, HasSubstr("missing: model.layers.2.input_layernorm.weight"));
  message = with([](ModelConfig& c) { c.gka.use_gate = false; });
  EXPECT_THAT(message, HasSubstr("unexpected: model.layers.0.gka.g_proj.weight"));
  EXPECT_THAT(message, HasSubstr("1 tensor(s)"));
  message = with([](ModelConfig& c) { std::swap(c.layers[0], c.layers[1]); });
  EXPECT_THAT(message, HasSubstr("missing: model.layers.0.self_attn.q_proj.weight"));
  EXPECT_THAT(message, HasSubstr("unexpected: model.layers.0.gka.q_proj.weight"));
  // Far more memory than there is: refused before any is taken.
  message = with([](ModelConfig& c) {
    c.vocab_size = 1 << 24;
    c.hidden_size = 1 << 20;
  });
  EXPECT_THAT(message, HasSubstr("[16777216, 1048576]"));
  message = with([](ModelConfig& c) { c.tie_word_embeddings = true; });
  EXPECT_THAT(message, HasSubstr("lm_head.weight differs"));

  // What the official layer stores although it is switched off is passed over.
  message = with([](ModelConfig& c) { c.gka.use_forgetting_gate = false; });
  EXPECT_EQ(message, "accepted");
  auto tensors = load_tensors(folder / "model.safetensors");
  tensors["model.norm.weight"] = tensors["model.norm.weight"].to(at::kLong);
  save_tensors(folder / "model.safetensors", tensors);
  message = with([](ModelConfig&) {});
  EXPECT_THAT(message, HasSubstr("dtype: model.norm.weight is I64"));
}

TEST(ModelFolder, MissingAndUnwritable) {
  const TemporaryFolder folder;
  EXPECT_THAT(message_of([&] { load_model(folder.path() / "none"); }), HasSubstr("no such file"));
  save_model(small_model(small_config("GKA")), folder.path());
  fs::remove(folder / "model.safetensors");
  EXPECT_THAT(message_of([&] { load_model(folder.path()); }),
              HasSubstr("neither model.safetensors"));
  write_file(folder / "plain", "text");
  const HybridLanguageModel model = small_model(small_config("GKA"));
  EXPECT_THAT(message_of([&] { save_model(model, folder / "plain"); }), HasSubstr("plain"));
  EXPECT_THAT(message_of([&] { save_model(model, folder / "x", at::kLong); }), HasSubstr("Long"));
  EXPECT_FALSE(fs::exists(folder / "x"));
}

TEST(Tensors, EveryDtypeThereAndBack) {
  const TemporaryFolder folder;
  std::map<std::string, Tensor> tensors;
  for (const at::ScalarType type : {at::kBool, at::kByte, at::kChar, at::kShort, at::kInt,
                                    at::kLong, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    tensors[at::toString(type)] = at::arange(0, 6).view({2, 3}).to(type).t();  // not contiguous
  }
  tensors["scalar"] = at::scalar_tensor(1.5);
  tensors["empty"] = at::empty({0, 3});
  save_tensors(folder / "t.safetensors", tensors, {{"a", "b"}});
  const auto back = load_tensors(folder / "t.safetensors");
  ASSERT_EQ(back.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(back.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(back.at(name), tensor)) << name;
  }
  EXPECT_THAT(
      message_of([&] { save_tensors(folder / "t", {{"c", at::zeros({1}, at::kComplexFloat)}}); }),
      HasSubstr("cannot be stored"));
}

}  // namespace
}  // namespace kalmanet::models
