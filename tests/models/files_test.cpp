// Round trips of every file kind, the tokenizer, streaming UTF-8, and atomic writing.
#include "models/files.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <random>

#include "kalmanet/error.hpp"
#include "models/config.hpp"
#include "models/safetensors.hpp"
#include "models/tokenizer.hpp"
#include "support/temporary_folder.hpp"

namespace kalmanet::models {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

std::span<const std::byte> bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}
std::string text(std::span<const std::byte> data) {
  return {reinterpret_cast<const char*>(data.data()), data.size()};
}
size_t entries_in(const fs::path& folder) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

// ---- safetensors ----

TEST(Safetensors, RoundTripOfEveryElementTypeAndShape) {
  const TemporaryFolder folder;
  const auto path = folder / "t.safetensors";
  std::mt19937 random(7);
  std::vector<std::string> data;
  std::vector<TensorToWrite> tensors;
  data.reserve(100);
  for (int type = 0; type <= static_cast<int>(ElementType::u64); ++type) {
    const auto element = static_cast<ElementType>(type);
    int i = 0;
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{}, {3}, {2, 3, 1}, {0}, {4, 0, 2}}) {
      int64_t n = size_of(element);
      for (const int64_t size : shape) n *= size;
      std::string content(static_cast<size_t>(n), '\0');
      for (char& c : content) c = static_cast<char>(random());
      data.push_back(content);
      tensors.push_back({std::string(name(element)) + "." + std::to_string(i++), element, shape,
                         bytes(data.back())});
    }
  }
  write_safetensors(path, tensors, {{"format", "pt"}, {"note", "t\xC3\xA9st \"quoted\""}});

  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata().at("note"), "t\xC3\xA9st \"quoted\"");
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (const TensorToWrite& written : tensors) {
    const auto view = file.find(written.name);
    ASSERT_TRUE(view) << written.name;
    EXPECT_EQ(view->info->dtype, written.dtype) << written.name;
    EXPECT_EQ(view->info->shape, written.shape) << written.name;
    EXPECT_EQ(text(view->data), text(written.data)) << written.name;
    // Aligned, so that other readers may use the map in place.
    if (!view->data.empty()) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(view->data.data()) % size_of(written.dtype), 0U);
    }
  }
  EXPECT_FALSE(file.find("none"));
  EXPECT_EQ(entries_in(folder.path()), 1U);
}

TEST(Safetensors, EmptyFileAndRefusedTensors) {
  const TemporaryFolder folder;
  const auto path = folder / "t.safetensors";
  write_safetensors(path, {});
  EXPECT_TRUE(SafetensorsFile(path).tensors().empty());
  const std::string four = "1234";
  const auto expect_refused = [&](std::vector<TensorToWrite> tensors, const std::string& part) {
    try {
      write_safetensors(path, std::move(tensors));
      ADD_FAILURE() << "accepted: " << part;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(part));
    }
  };
  expect_refused({{"a", ElementType::f32, {2}, bytes(four)}}, "does not take the 4 bytes");
  expect_refused({{"a", ElementType::f32, {-1}, bytes(four)}}, "[-1]");
  expect_refused(
      {{"a", ElementType::f32, {1}, bytes(four)}, {"a", ElementType::u8, {4}, bytes(four)}},
      "given twice");
  expect_refused({{"__metadata__", ElementType::f32, {1}, bytes(four)}}, "format itself");
  expect_refused({{"\xff", ElementType::f32, {1}, bytes(four)}}, "UTF-8");
  EXPECT_TRUE(SafetensorsFile(path).tensors().empty());  // still the first one
  EXPECT_EQ(entries_in(folder.path()), 1U);
}

TEST(Safetensors, ShardedModelThroughItsIndex) {
  const TemporaryFolder folder;
  const std::string a = "aaaa", b = "bbbbbbbb";
  write_safetensors(folder / "model-1.safetensors", {{"x.a", ElementType::f32, {1}, bytes(a)}});
  write_safetensors(folder / "model-2.safetensors", {{"x.b", ElementType::f32, {2}, bytes(b)}});
  write_file(folder / "model.safetensors.index.json",
             R"({"metadata":{"total_size":12},"weight_map":{"x.b":"model-2.safetensors",)"
             R"("x.a":"model-1.safetensors"}})");
  const TensorStore store(folder.path());
  EXPECT_THAT(store.names(), testing::ElementsAre("x.a", "x.b"));
  EXPECT_EQ(text(store.find("x.b")->data), b);
  EXPECT_EQ(store.total_bytes(), 12);
  EXPECT_EQ(store.num_elements(), 3);
  // A single file, where there is one, comes first.
  write_safetensors(folder / "model.safetensors", {{"y", ElementType::u8, {4}, bytes(a)}});
  EXPECT_THAT(TensorStore(folder.path()).names(), testing::ElementsAre("y"));
}

// ---- atomic writing ----

TEST(WriteFile, ReplacesAndLeavesNothingElse) {
  const TemporaryFolder folder;
  const auto path = folder / "file";
  write_file(path, "one");
  write_file(path, {bytes("tw"), bytes(""), bytes("o")});
  EXPECT_EQ(read_text(path, 100), "two");
  EXPECT_EQ(entries_in(folder.path()), 1U);
}

TEST(WriteFile, FailureLeavesTheOldFileAndNoOther) {
  const TemporaryFolder folder;
  const auto expect_error = [&](const fs::path& path, const std::string& part) {
    try {
      write_file(path, std::string(10000, 'x'));
      ADD_FAILURE() << "wrote " << path;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(part));
      EXPECT_THAT(e.what(), HasSubstr(path.string()));
    }
  };
  expect_error(folder.path() / "none" / "file", "folder that exists");
  write_file(folder / "plain", "text");
  expect_error(folder.path() / "plain" / "file", "Not a directory");
  fs::create_directory(folder / "occupied");
  expect_error(folder / "occupied", "untouched");
  expect_error("/proc/kalmanet", "/proc");

  // A disk that fills up: the limit on file sizes fails the write in the middle likewise.
  const auto path = folder / "file";
  write_file(path, "old");
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit tight{4096, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  expect_error(path, "10000 bytes needed");
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(read_text(path, 100), "old");
  EXPECT_EQ(entries_in(folder.path()), 3U);  // plain, occupied, file
}

TEST(WriteFile, RemovesWhatAKilledWriterLeft) {
  const TemporaryFolder folder;
  std::ofstream(folder / ".file.123.tmp") << "half";
  std::ofstream(folder / ".other.123.tmp") << "another's";
  write_file(folder / "file", "whole");
  EXPECT_FALSE(fs::exists(folder / ".file.123.tmp"));
  EXPECT_TRUE(fs::exists(folder / ".other.123.tmp"));
}

// ---- config ----

constexpr const char* kPublished = R"({
  "architectures": ["HybridQwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": 64,
  "hybrid_override_pattern": "GKA-GKA-*", "initializer_range": 0.02, "intermediate_size": 96,
  "max_position_embeddings": 512, "model_type": "hybrid_qwen3", "num_attention_heads": 4,
  "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
  "rope_parameters": {"rope_type": "default", "rope_theta": 5000000}, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.57.0", "use_cache": true,
  "vocab_size": 300, "layer_types": ["a", {"b": [1.5, null]}],
  "gka_config": {"num_iter": 20, "ridge_strength": 0.01, "use_gate": false, "mode": "chunk"}})";

TEST(Config, ReadsWhatIsPublished) {
  const ModelConfig c = parse_config(kPublished, "config.json");
  EXPECT_EQ(to_pattern(c.layers), "GKA-GKA-*");
  EXPECT_EQ(c.rope_theta, 5e6);
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.torch_dtype, "bfloat16");
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.eos_token_id, 2);
  EXPECT_EQ(c.gka.num_iter, 20);
  EXPECT_EQ(c.gka.ridge_strength, 0.01);
  EXPECT_FALSE(c.gka.use_gate);
  EXPECT_EQ(c.gka.solver_type, "chebyshev");
  const GkaHeads heads = c.gka_heads();
  EXPECT_EQ(heads.num_q_heads, 4);
  EXPECT_EQ(heads.num_k_heads, 2);
  EXPECT_EQ(heads.num_v_heads, 2);
  EXPECT_EQ(heads.value_head_dim, 16);
  EXPECT_EQ(c.extra.at("transformers_version"), "\"4.57.0\"");
  EXPECT_EQ(c.gka.extra.at("mode"), "\"chunk\"");
}

TEST(Config, UnknownKeysAndEverythingElseSurviveARoundTrip) {
  const ModelConfig c = parse_config(kPublished, "config.json");
  const std::string once = to_json(c);
  EXPECT_THAT(once, HasSubstr("\"transformers_version\": \"4.57.0\""));
  EXPECT_THAT(once, HasSubstr("\"mode\": \"chunk\""));
  EXPECT_THAT(once, HasSubstr("\"attention_dropout\": 0.0"));
  const ModelConfig again = parse_config(once, "again");
  EXPECT_EQ(to_json(again), once);
  EXPECT_EQ(again.extra, c.extra);

  ModelConfig ours;
  ours.gka.learned_ridge = true;
  ours.gka.num_iter = 0;
  ours.gka.fixed_alpha = 0.1;
  ours.gka.qk_norm = "fla";
  ours.gka.expand_v = 1.5;
  ours.gka.num_v_heads = 8;
  ours.intermediate_size = 0;
  const ModelConfig back = parse_config(to_json(ours), "ours");
  EXPECT_EQ(to_json(back), to_json(ours));
  EXPECT_EQ(back.gka.num_iter, 0);
  EXPECT_EQ(back.gka.fixed_alpha, 0.1);  // bit for bit
  EXPECT_EQ(back.gka_heads().num_v_heads, 8);
  EXPECT_EQ(back.gka_heads().value_head_dim, 48);
}

TEST(Config, ExtensionsAreAbsentWhereTheySayNothing) {
  const std::string json = to_json(ModelConfig());
  for (const char* key :
       {"learned_ridge", "fixed_alpha", "qk_norm", "tolerance", "expand_v", "arithmetic"}) {
    EXPECT_EQ(json.find(key), std::string::npos) << key;
  }
}

TEST(Config, ArithmeticIsWrittenReadAndHeldToItsSolver) {
  ModelConfig c;
  c.gka.arithmetic = "bfloat16";
  EXPECT_EQ(parse_config(to_json(c), "ours").gka.arithmetic, "bfloat16");
  const auto refused = [](ModelConfig config) {
    try {
      validate(config, "ours");
    } catch (const Error& error) {
      return std::string(error.what()).find("gka_config.arithmetic") != std::string::npos;
    }
    return false;
  };
  ModelConfig by_auto = c, by_cg = c, learned = c, unknown = c;
  by_auto.gka.num_iter = 0;
  by_cg.gka.solver_type = "cg";
  learned.gka.learned_ridge = true;
  unknown.gka.arithmetic = "int8";
  for (const ModelConfig& wrong : {by_auto, by_cg, learned, unknown}) EXPECT_TRUE(refused(wrong));
}

TEST(Config, QwenNextKeysShapeTheGkaLayers) {
  ModelConfig c;
  c.linear_num_key_heads = 2;
  c.linear_num_value_heads = 6;
  c.linear_key_head_dim = 24;
  c.linear_value_head_dim = 40;
  c.linear_conv_kernel_dim = 3;
  const GkaHeads heads = parse_config(to_json(c), "c").gka_heads();
  EXPECT_EQ(heads.num_q_heads, 2);
  EXPECT_EQ(heads.num_k_heads, 2);
  EXPECT_EQ(heads.num_v_heads, 6);
  EXPECT_EQ(heads.num_heads(), 6);
  EXPECT_EQ(heads.head_dim, 24);
  EXPECT_EQ(heads.value_head_dim, 40);
  EXPECT_EQ(heads.conv_size, 3);
}

TEST(Config, RopeThetaInEitherSpelling) {
  ModelConfig c;
  c.rope_theta = 12345.5;
  const std::string both = to_json(c);
  EXPECT_EQ(parse_config(both, "c").rope_theta, 12345.5);
  const auto without = [&](const std::string& key) {
    std::string json = both;
    const size_t begin = json.find("\"" + key + "\"");
    const size_t end =
        json.find(key == "rope_theta" ? "," : "},", begin) + (key == "rope_theta" ? 1 : 2);
    return json.erase(begin, end - begin);
  };
  EXPECT_EQ(parse_config(without("rope_theta"), "c").rope_theta, 12345.5);
  EXPECT_EQ(parse_config(without("rope_parameters"), "c").rope_theta, 12345.5);
  std::string differ = both;
  differ.replace(differ.find("12345.5"), 7, "54321.5");
  EXPECT_THROW(parse_config(differ, "c"), Error);
}

TEST(Config, StateAndCacheSizes) {
  ModelConfig c;  // 4 GKA layers, 4 heads of 32
  const int64_t gka_layer = 4 * (4 * 32 * (32 + 32) + 3 * 128 * 4);
  EXPECT_EQ(state_bytes(c, 0), 4 * gka_layer);
  EXPECT_EQ(state_bytes(c, 1'000'000), 4 * gka_layer);
  c.layers[3] = LayerKind::attention;
  EXPECT_EQ(state_bytes(c, 1000, 2), 3 * gka_layer + 2 * 2 * 4 * 32 * 1000);
  EXPECT_EQ(kv_cache_bytes(c, 1000, 2), 4 * 2 * 2 * 4 * 32 * 1000);
}

// ---- tokenizer ----

TEST(Tokenizer, BytesThereAndBack) {
  const ByteTokenizer tokenizer;
  std::string all;
  for (int b = 0; b < 256; ++b) all += static_cast<char>(b);
  const auto ids = tokenizer.encode(all);
  for (int64_t b = 0; b < 256; ++b) EXPECT_EQ(ids[b], b);
  EXPECT_EQ(tokenizer.decode(ids), all);
  EXPECT_EQ(tokenizer.encode("<|endoftext|>").size(), 13U);
  EXPECT_EQ(tokenizer.decode(ByteTokenizer::kEndOfText), "");
  EXPECT_THROW(tokenizer.decode(257), Error);
  EXPECT_THROW(tokenizer.decode(-1), Error);
}

TEST(Tokenizer, FileInHuggingFaceLayout) {
  const TemporaryFolder folder;
  ByteTokenizer().write(folder / "tokenizer.json");
  EXPECT_EQ(ByteTokenizer::read(folder.path()).vocab_size(), 257);
  const std::string json = read_text(folder / "tokenizer.json", 1 << 20);
  EXPECT_THAT(json, HasSubstr("\"\xC4\xA0\": 32"));  // a space is U+0120 in that alphabet
  EXPECT_THAT(json, HasSubstr("\"A\": 65"));
  EXPECT_THAT(json, HasSubstr("\"\xC4\x8A\": 10"));  // a newline is U+010A
}

TEST(Utf8Stream, NeverShowsHalfACodePoint) {
  const std::string whole = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";  // 1, 2, 3, 4 and 1 bytes
  Utf8Stream stream;
  std::string shown;
  for (const char c : whole) {
    const std::string piece = stream.push(std::string_view(&c, 1));
    // A piece is nothing or begins with a lead byte and is whole.
    if (!piece.empty()) {
      const auto lead = static_cast<unsigned char>(piece[0]);
      const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
      EXPECT_EQ(piece.size(), length);
    }
    shown += piece;
  }
  shown += stream.finish();
  EXPECT_EQ(shown, whole);
}

TEST(Utf8Stream, ReplacesWhatCanNeverBecomeValid) {
  const std::string bad = "\xEF\xBF\xBD";
  const auto filtered = [](const std::string& in) {
    Utf8Stream whole, single;
    std::string at_once = whole.push(in);
    at_once += whole.finish();
    std::string one_by_one;
    for (const char c : in) one_by_one += single.push(std::string_view(&c, 1));
    one_by_one += single.finish();
    EXPECT_EQ(at_once, one_by_one);
    return at_once;
  };
  // The number of replacements is that of Python's bytes.decode(errors="replace").
  EXPECT_EQ(filtered("\x80"), bad);
  EXPECT_EQ(filtered("\xC0\xAF"), bad + bad);
  EXPECT_EQ(filtered("\xE2\x82z"), bad + "z");
  EXPECT_EQ(filtered("\xED\xA0\x80"), bad + bad + bad);  // a surrogate
  EXPECT_EQ(filtered("\xF0\x9F\x98"), bad);
  EXPECT_EQ(filtered("\xF4\x90\x80\x80"), bad + bad + bad + bad);
  EXPECT_EQ(filtered("\xFFok"), bad + "ok");
}

}  // namespace
}  // namespace kalmanet::models
