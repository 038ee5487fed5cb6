// Broken and hostile files: each is an Error that names the file and says what is wrong; none
// crashes (the sanitizer build runs the same table).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "kalmanet/error.hpp"
#include "models/config.hpp"
#include "models/safetensors.hpp"
#include "models/tokenizer.hpp"
#include "support/message_of.hpp"
#include "support/temporary_folder.hpp"

namespace kalmanet::models {
namespace {

using testing::HasSubstr;

void expect_refused(const std::string& what, const std::function<void()>& action,
                    const std::vector<std::string>& parts) {
  SCOPED_TRACE(what);
  const std::string message = message_of(action);
  EXPECT_NE(message, "accepted");
  EXPECT_THAT(message, testing::Not(testing::StartsWith("not a kalmanet::Error")));
  for (const std::string& part : parts) EXPECT_THAT(message, HasSubstr(part));
}

// ---- safetensors ----

std::string safetensors(const std::string& header, size_t data_bytes,
                        std::optional<uint64_t> claimed = {}) {
  const uint64_t length = claimed.value_or(header.size());
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + header + std::string(data_bytes, '\1');
}

SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "x.safetensors");
}

struct FileCase {
  std::string what;
  std::string file;
  std::vector<std::string> message;
};

std::string one(const std::string& entry) {
  return "{\"w\":" + entry + "}";
}

std::vector<FileCase> safetensors_cases() {
  const std::string f32_2x2 = R"({"dtype":"F32","shape":[2,2],"data_offsets":[0,16]})";
  return {
      {"empty file", "", {"0 bytes"}},
      {"seven bytes", std::string(7, '\0'), {"7 bytes", "header's length"}},
      {"header length of 0", safetensors("", 0), {"begin with '{'"}},
      {"header length beyond any limit",
       safetensors("{}", 0, UINT64_MAX),
       {"18446744073709551615", "at most 100000000"}},
      {"header length beyond the file", safetensors("{}", 0, 1000), {"1000", "cut short"}},
      {"header is text", safetensors("hello", 0), {"begin with '{'"}},
      {"broken JSON", safetensors("{\"w\":", 0), {"not valid JSON"}},
      {"garbage after the JSON", safetensors("{}}", 0), {"not valid JSON"}},
      {"invalid UTF-8 in a name", safetensors("{\"\xff\":1}", 0), {"not valid JSON"}},
      {"number beyond float64", safetensors("{\"w\":1e999}", 0), {"not valid JSON"}},
      {"nesting without end",
       safetensors("{\"w\":" + std::string(100000, '[') + std::string(100000, ']') + "}", 0),
       {"nested deeper than 32"}},
      {"a name twice",
       safetensors("{\"w\":" + f32_2x2 + ",\"w\":" + f32_2x2 + "}", 16),
       {"\"w\"", "twice"}},
      {"entry is a number", safetensors(one("3"), 0), {"tensor \"w\"", "must be an object"}},
      {"no dtype", safetensors(one(R"({"shape":[],"data_offsets":[0,4]})"), 4), {"\"dtype\""}},
      {"unknown key",
       safetensors(one(R"({"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1})"), 4),
       {"only dtype, shape and data_offsets"}},
      {"unknown dtype",
       safetensors(one(R"({"dtype":"F33","shape":[1],"data_offsets":[0,4]})"), 4),
       {"\"F33\"", "BF16"}},
      {"dtype is a number",
       safetensors(one(R"({"dtype":32,"shape":[1],"data_offsets":[0,4]})"), 4),
       {"dtype is 32"}},
      {"negative size",
       safetensors(one(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})"), 4),
       {"is -1", "from 0 to 2^63-1"}},
      {"fractional size",
       safetensors(one(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})"), 4),
       {"is 1.0"}},
      {"size beyond int64",
       safetensors(one(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]})"),
                   4),
       {"18446744073709551615"}},
      {"shape whose product wraps around to 4 bytes",
       safetensors(one(R"({"dtype":"F32","shape":[4294967296,4294967296,1],"data_offsets":[0,4]})"),
                   4),
       {"more bytes than 64-bit"}},
      {"overflow hidden behind a zero",
       safetensors(one(R"({"dtype":"F32","shape":[4611686018427387904,4,0],)"
                       R"("data_offsets":[0,0]})"),
                   0),
       {"more bytes than 64-bit"}},
      {"shape of rank 65",
       safetensors(one("{\"dtype\":\"F32\",\"shape\":[1" +
                       [] {
                         std::string ones;
                         for (int i = 0; i < 64; ++i) ones += ",1";
                         return ones;
                       }() +
                       "],\"data_offsets\":[0,4]}"),
                   4),
       {"at most 64 sizes"}},
      {"offsets descend",
       safetensors(one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})"), 4),
       {"[4,0]", "ascend"}},
      {"offset beyond the data",
       safetensors(one(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})"), 15),
       {"15 bytes of data", "cut short"}},
      {"huge offset",
       safetensors(one(R"({"dtype":"U8","shape":[0],)"
                       R"("data_offsets":[9223372036854775807,9223372036854775807]})"),
                   4),
       {"9223372036854775807"}},
      {"three offsets",
       safetensors(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})"), 8),
       {"[begin, end]"}},
      {"offsets that do not match the shape",
       safetensors(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"), 4),
       {"span 4 bytes", "takes 8"}},
      {"overlap",
       safetensors(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                   R"("b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
                   6),
       {"\"b\"", "overlapping tensor \"a\""}},
      {"hole",
       safetensors(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                   R"("b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}})",
                   9),
       {"\"b\"", "hole after tensor \"a\""}},
      {"data before the first tensor",
       safetensors(one(R"({"dtype":"U8","shape":[4],"data_offsets":[1,5]})"), 5),
       {"hole after the start"}},
      {"bytes behind the last tensor", safetensors(one(f32_2x2), 17), {"17 bytes", "take 16"}},
      {"metadata is a number", safetensors(R"({"__metadata__":1})", 0), {"__metadata__"}},
      {"metadata holds a number",
       safetensors(R"({"__metadata__":{"a":1}})", 0),
       {"must be a string"}},
  };
}

TEST(HostileFiles, SafetensorsTable) {
  for (const FileCase& c : safetensors_cases()) {
    expect_refused(c.what, [&] { parse(c.file); }, c.message);
    // The same through a real file and the memory map; the message begins with the path.
    const TemporaryFolder folder;
    const auto path = folder / "model.safetensors";
    std::ofstream(path, std::ios::binary) << c.file;
    expect_refused(c.what, [&] { SafetensorsFile file(path); }, {path.string()});
  }
}

TEST(HostileFiles, EveryTruncationOfAGoodFileIsRefused) {
  const std::string good = safetensors(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                       R"("b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})",
                                       11);
  ASSERT_EQ(parse(good).tensors.size(), 2U);
  for (size_t length = 0; length < good.size(); ++length) {
    expect_refused("cut to " + std::to_string(length), [&] { parse(good.substr(0, length)); }, {});
  }
}

TEST(HostileFiles, NotAFile) {
  const TemporaryFolder folder;
  expect_refused("missing", [&] { SafetensorsFile(folder / "none.safetensors"); },
                 {"none.safetensors", "no such file"});
  expect_refused("a folder", [&] { SafetensorsFile(folder.path()); }, {"is a folder"});
  expect_refused("a device", [&] { read_text("/dev/null", 10); }, {"not a regular file"});
  std::ofstream(folder / "long.json") << "0123456789";
  expect_refused("too long", [&] { read_text(folder / "long.json", 9); },
                 {"10 bytes", "at most 9"});
  expect_refused("an empty folder", [&] { TensorStore store(folder.path()); },
                 {"neither model.safetensors nor model.safetensors.index.json"});
}

// ---- the index and its shards ----

TEST(HostileFiles, IndexTable) {
  const std::vector<FileCase> cases = {
      {"not JSON", "weight_map", {"not valid JSON"}},
      {"an array", "[]", {"must be a JSON object"}},
      {"no map", "{}", {"weight_map", "missing"}},
      {"map is null", R"({"weight_map":null})", {"weight_map", "missing"}},
      {"map is an array", R"({"weight_map":[]})", {"must be an object"}},
      {"empty map", R"({"weight_map":{}})", {"names no tensor"}},
      {"shard is a number", R"({"weight_map":{"w":1}})", {"\"w\"", "file name"}},
      {"parent folder",
       R"({"weight_map":{"w":"../x.safetensors"}})",
       {"\"../x.safetensors\"", "plain name"}},
      {"absolute path", R"({"weight_map":{"w":"/etc/x.safetensors"}})", {"plain name"}},
      {"Windows separator", R"({"weight_map":{"w":"..\\x.safetensors"}})", {"plain name"}},
      {"zero byte", R"({"weight_map":{"w":"x\u0000.safetensors"}})", {"plain name"}},
      {"another kind of file", R"({"weight_map":{"w":"passwd"}})", {"plain name"}},
      {"two dots", R"({"weight_map":{"w":".."}})", {"plain name"}},
      {"empty name", R"({"weight_map":{"w":""}})", {"plain name"}},
      {"total_size is text",
       R"({"metadata":{"total_size":"1"},"weight_map":{"w":"a.safetensors"}})",
       {"metadata.total_size"}},
      {"a tensor twice",
       R"({"weight_map":{"w":"a.safetensors","w":"b.safetensors"}})",
       {"\"w\"", "twice"}},
  };
  for (const FileCase& c : cases) {
    expect_refused(c.what, [&] { parse_safetensors_index(c.file, "index.json"); }, c.message);
  }
}

TEST(HostileFiles, ShardsThatContradictTheirIndex) {
  const TemporaryFolder folder;
  const std::vector<float> data = {1, 2};
  const auto bytes = std::as_bytes(std::span(data));
  write_safetensors(folder / "1.safetensors", {{"a", ElementType::f32, {2}, bytes}});
  write_safetensors(folder / "2.safetensors", {{"b", ElementType::f32, {2}, bytes}});
  const auto open = [&](const std::string& map) {
    std::ofstream(folder / "model.safetensors.index.json") << "{\"weight_map\":" << map << "}";
    TensorStore store(folder.path());
    return store.names();
  };
  EXPECT_EQ(open(R"({"a":"1.safetensors","b":"2.safetensors"})").size(), 2U);
  expect_refused("missing shard", [&] { open(R"({"a":"1.safetensors","b":"3.safetensors"})"); },
                 {"\"3.safetensors\" is missing", "\"b\""});
  expect_refused("exchanged shards", [&] { open(R"({"a":"2.safetensors","b":"1.safetensors"})"); },
                 {"\"a\" is not in shard \"2.safetensors\"", "it is in \"1.safetensors\""});
  expect_refused("unlisted tensor", [&] { open(R"({"a":"1.safetensors","c":"2.safetensors"})"); },
                 {"\"c\" is not in shard"});
  write_safetensors(folder / "2.safetensors",
                    {{"b", ElementType::f32, {2}, bytes}, {"extra", ElementType::f32, {2}, bytes}});
  expect_refused("a tensor that the index does not name",
                 [&] { open(R"({"a":"1.safetensors","b":"2.safetensors"})"); },
                 {"\"extra\"", "does not place there"});
}

// ---- config.json ----

// A small valid config with one key replaced by (or added as) JSON text.
std::string config_with(const std::string& key = {}, const std::string& value = {}) {
  std::vector<std::pair<std::string, std::string>> keys = {
      {"model_type", "\"hybrid_qwen3\""},
      {"vocab_size", "257"},
      {"hidden_size", "32"},
      {"intermediate_size", "64"},
      {"num_hidden_layers", "2"},
      {"num_attention_heads", "2"},
      {"head_dim", "16"},
      {"hybrid_override_pattern", "\"GKA-*\""}};
  bool found = false;
  for (auto& entry : keys) {
    if (entry.first == key) {
      entry.second = value;
      found = true;
    }
  }
  if (!found && !key.empty()) keys.emplace_back(key, value);
  std::string text = "{";
  for (const auto& entry : keys) {
    if (entry.second.empty()) continue;  // the key left out
    text += (text.size() > 1 ? ",\"" : "\"") + entry.first + "\":" + entry.second;
  }
  return text + "}";
}

TEST(HostileFiles, ConfigTable) {
  ASSERT_NO_THROW(parse_config(config_with(), "config.json"));
  struct Case {
    std::string key, value;
    std::vector<std::string> message;
  };
  const std::vector<Case> cases = {
      {"model_type", "\"llama\"", {"\"model_type\" is \"llama\"", "\"hybrid_qwen3\""}},
      {"model_type", "", {"\"model_type\" is missing"}},
      {"vocab_size", "", {"\"vocab_size\" is missing"}},
      {"vocab_size", "\"257\"", {"\"vocab_size\" is \"257\"", "integer from 1"}},
      {"vocab_size", "0", {"is 0"}},
      {"vocab_size", "-257", {"is -257"}},
      {"vocab_size", "257.5", {"257.5"}},
      {"vocab_size", "1e300", {"1e+300", "integer"}},
      {"vocab_size", "18446744073709551615", {"18446744073709551615"}},
      {"vocab_size", "99999999999999999999999", {"integer"}},
      {"vocab_size", "true", {"is true"}},
      {"vocab_size", "null", {"missing"}},
      {"hidden_size", "{}", {"an object"}},
      {"num_hidden_layers", "3", {"names 2 layers", "num_hidden_layers is 3"}},
      {"num_key_value_heads", "3", {"num_key_value_heads is 3", "divide"}},
      {"head_dim", "15", {"head_dim is 15", "even"}},
      {"head_dim", "512", {"head_dim (GKA layers)", "512", "256"}},
      {"hidden_act", "\"gelu\"", {"\"hidden_act\" is \"gelu\"", "must be \"silu\""}},
      {"hybrid_override_pattern", "\"GKA-GDN\"", {"layer 1 is \"GDN\"", "not built yet"}},
      {"hybrid_override_pattern", "\"M2-GKA\"", {"layer 0 is \"M2\"", "not built yet"}},
      {"hybrid_override_pattern", "\"GKA-\"", {"layer 1 is \"\"", "no layer kind"}},
      {"hybrid_override_pattern", "\"GKA,*\"", {"layer 0 is \"GKA,*\""}},
      {"hybrid_override_pattern", "7", {"must be a string"}},
      {"rope_theta", "0", {"rope_theta", "above 0"}},
      {"rope_parameters", R"({"rope_type":"yarn"})", {"rope_parameters.rope_type", "\"yarn\""}},
      {"rope_parameters", R"({"factor":4})", {"rope_parameters.factor"}},
      {"rope_scaling", R"({"type":"linear"})", {"rope_scaling.type"}},
      {"rms_norm_eps", "0", {"rms_norm_eps"}},
      {"attention_bias", "1", {"true or false"}},
      {"attention_dropout", "0.1", {"attention_dropout", "must be 0"}},
      {"use_sliding_window", "true", {"use_sliding_window"}},
      {"partial_rotary_factor", "0.5", {"partial_rotary_factor", "must be 1"}},
      {"torch_dtype", "\"float64\"", {"torch_dtype", "bfloat16"}},
      {"eos_token_id", "257", {"eos_token_id", "vocab_size-1 = 256"}},
      {"eos_token_id", "[1,2]", {"eos_token_id", "one token id"}},
      {"architectures", "\"x\"", {"architectures", "array of strings"}},
      {"gka_config", "[]", {"\"gka_config\" is", "must be a JSON object"}},
      {"gka_config", R"({"num_iter":-1})", {"gka_config.num_iter", "-1"}},
      {"gka_config", R"({"num_iter":0})", {"gka_config.num_iter"}},
      {"gka_config", R"({"num_iter":"many"})", {"\"auto\""}},
      {"gka_config", R"({"ridge_strength":0})", {"gka_config.ridge_strength", "above 0"}},
      {"gka_config", R"({"ridge_ratio":0.1})", {"spelled ridge_strength"}},
      {"gka_config", R"({"solver_type":"magic"})", {"solver_type", "\"chebyshev\""}},
      {"gka_config", R"({"conv_size":17})", {"conv_size", "16"}},
      {"gka_config", R"({"kv_proj_rank":0})", {"kv_proj_rank", "1"}},
      {"gka_config", R"({"kv_proj_rank":"8"})", {"kv_proj_rank"}},
      {"gka_config",
       R"({"kv_learnable_residual":true})",
       {"kv_learnable_residual", "kv_proj_rank"}},
      {"gka_config", R"({"expand_v":0.3})", {"expand_v", "integer"}},
      {"gka_config", R"({"num_q_heads":2,"num_v_heads":3})", {"heads", "divide 3"}},
      {"gka_config", R"({"fixed_alpha":2})", {"fixed_alpha"}},
      {"gka_config", R"({"fixed_alpha":0,"learned_ridge":true})", {"learned_ridge", "no effect"}},
      {"linear_num_key_heads", "\"4\"", {"linear_num_key_heads"}},
  };
  for (const Case& c : cases) {
    std::vector<std::string> message = c.message;
    message.emplace_back("config.json");
    expect_refused(
        c.key + " = " + c.value, [&] { parse_config(config_with(c.key, c.value), "config.json"); },
        message);
  }
}

TEST(HostileFiles, ConfigAsText) {
  const std::vector<FileCase> cases = {
      {"empty", "", {"not valid JSON"}},
      {"a number", "1", {"the file is 1", "JSON object"}},
      {"cut short", config_with().substr(0, 40), {"not valid JSON"}},
      {"comments", "{/*x*/}", {"not valid JSON"}},
      {"NaN", config_with("rms_norm_eps", "NaN"), {"not valid JSON"}},
      {"a key twice", "{\"a\":1,\"a\":2}", {"\"a\"", "twice"}},
      {"deep", std::string(1000000, '['), {"nested deeper"}},
      {"control characters in a message", config_with("model_type", "\"\\u001b[2J\""), {"\\x1b"}},
  };
  for (const FileCase& c : cases) {
    expect_refused(c.what, [&] { parse_config(c.file, "config.json"); }, c.message);
  }
  EXPECT_EQ(message_of([] {
              parse_config(config_with("model_type", "\"\\u001b[2J\""), "c");
            }).find('\x1b'),
            std::string::npos);
}

TEST(HostileFiles, TokenizerTable) {
  const std::string good = ByteTokenizer().to_json();
  ASSERT_NO_THROW(ByteTokenizer::parse(good, "tokenizer.json"));
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
  };
  const std::vector<FileCase> cases = {
      {"not an object", "[]", {"it is []"}},
      {"no model", "{}", {"\"model\""}},
      {"another model", replaced("\"BPE\"", "\"Unigram\""), {"model.type", "Unigram"}},
      {"merges", replaced("\"merges\": []", "\"merges\": [\"a b\"]"), {"merges"}},
      {"exchanged bytes", replaced("\"A\": 65", "\"A\": 66"), {"byte 65"}},
      {"a byte left out", replaced("\"A\": 65,", ""), {"256 bytes"}},
      {"another special id", replaced("\"id\": 256", "\"id\": 300"), {"added_tokens"}},
      {"prefix space",
       replaced("\"add_prefix_space\": false", "\"add_prefix_space\": true"),
       {"pre_tokenizer"}},
      {"model is text", R"({"model":"BPE"})", {"\"model\""}},
  };
  for (const FileCase& c : cases) {
    expect_refused(c.what, [&] { ByteTokenizer::parse(c.file, "tokenizer.json"); }, c.message);
  }
}

}  // namespace
}  // namespace kalmanet::models
