// Bytes as tokens, the byte-level alphabet of tokenizer.json, and whole code points out of a
// stream.
#include "models/tokenizer.hpp"

#include <array>

#include "models/files.hpp"
#include "models/json.hpp"

namespace kalmanet::models {
namespace fs = std::filesystem;
namespace {

constexpr const char* kEndOfTextContent = "<|endoftext|>";
constexpr int64_t kMaxTokenizerBytes = 64 << 20;

std::string utf8(uint32_t code) {  // of a code point below 0x800
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 63))};
}

// The byte-level alphabet: printable Latin-1 bytes stand for themselves, the others, in order, for
// U+0100, U+0101, ...: every byte is one visible character.
std::array<std::string, 256> byte_alphabet() {
  std::array<std::string, 256> alphabet;
  uint32_t next = 0x100;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool visible =
        (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
    alphabet[b] = utf8(visible ? b : next++);
  }
  return alphabet;
}

}  // namespace

std::vector<int64_t> ByteTokenizer::encode(std::string_view text) const {
  std::vector<int64_t> ids;
  ids.reserve(text.size());
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

std::string ByteTokenizer::decode(int64_t id) const {
  if (id < 0 || id >= kVocabSize) {
    throw Error(ErrorCode::invalid_argument, "id",
                "token " + std::to_string(id) + " is not one of this tokenizer's 0.." +
                    std::to_string(kVocabSize - 1));
  }
  return id == kEndOfText ? std::string() : std::string(1, static_cast<char>(id));
}

std::string ByteTokenizer::decode(std::span<const int64_t> ids) const {
  std::string text;
  for (const int64_t id : ids) text += decode(id);
  return text;
}

std::string ByteTokenizer::to_json() const {
  using OrderedJson = nlohmann::ordered_json;
  const auto byte_level = [](bool use_regex) {
    return OrderedJson{{"type", "ByteLevel"},
                       {"add_prefix_space", false},
                       {"trim_offsets", true},
                       {"use_regex", use_regex}};
  };
  OrderedJson vocab = OrderedJson::object();
  const auto alphabet = byte_alphabet();
  for (size_t b = 0; b < alphabet.size(); ++b) vocab[alphabet[b]] = b;
  OrderedJson j;
  j["version"] = "1.0";
  j["truncation"] = nullptr;
  j["padding"] = nullptr;
  j["added_tokens"] = {{{"id", kEndOfText},
                        {"content", kEndOfTextContent},
                        {"single_word", false},
                        {"lstrip", false},
                        {"rstrip", false},
                        {"normalized", false},
                        {"special", true}}};
  j["normalizer"] = nullptr;
  j["pre_tokenizer"] = byte_level(false);
  j["post_processor"] = nullptr;
  j["decoder"] = byte_level(false);
  j["model"] = {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", nullptr},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false},
                {"vocab", vocab},
                {"merges", OrderedJson::array()}};
  return j.dump(2) + "\n";
}

ByteTokenizer ByteTokenizer::parse(std::string_view json_text, const std::string& source) {
  const Json json = parse_json(json_text, source);
  const auto refuse = [&](const std::string& what) {
    fail(source, what + "; only the byte-level tokenizer that this project writes is built",
         ErrorCode::unsupported);
  };
  if (!json.is_object()) refuse("it is " + shown(json));
  const Json model = json.value("model", Json());
  if (!model.is_object()) refuse("key \"model\" is " + shown(model));
  if (model.value("type", Json()) != "BPE") {
    refuse("model.type is " + shown(model.value("type", Json())));
  }
  const Json merges = model.value("merges", Json());
  if (!merges.is_array() || !merges.empty()) refuse("model.merges is not an empty array");
  const Json vocab = model.value("vocab", Json());
  const auto alphabet = byte_alphabet();
  if (!vocab.is_object() || vocab.size() != alphabet.size()) {
    refuse("model.vocab is not an object of the 256 bytes");
  }
  for (size_t b = 0; b < alphabet.size(); ++b) {
    if (!vocab.contains(alphabet[b]) || vocab.at(alphabet[b]) != b) {
      refuse("model.vocab does not give byte " + std::to_string(b) + " the id " +
             std::to_string(b));
    }
  }
  const Json added = json.value("added_tokens", Json());
  if (!added.is_array() || added.size() != 1 || !added[0].is_object() ||
      added[0].value("id", Json()) != kEndOfText ||
      added[0].value("content", Json()) != kEndOfTextContent) {
    refuse(std::string("added_tokens is not the one token ") + kEndOfTextContent + " with id 256");
  }
  const Json pre = json.value("pre_tokenizer", Json());
  if (!pre.is_object() || pre.value("type", Json()) != "ByteLevel" ||
      pre.value("add_prefix_space", Json()) != false) {
    refuse("pre_tokenizer is not ByteLevel without a prefix space");
  }
  if (!json.value("normalizer", Json()).is_null()) refuse("normalizer is not null");
  return {};
}

ByteTokenizer ByteTokenizer::read(const fs::path& path) {
  std::error_code ignored;
  const fs::path file = fs::is_directory(path, ignored) ? path / "tokenizer.json" : path;
  return parse(read_text(file, kMaxTokenizerBytes), file.string());
}

void ByteTokenizer::write(const fs::path& path) const {
  write_file(path, to_json());
}

namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// How the bytes from `i` begin: a whole code point (length, ok), one that may still be finished
// (0, ok), or a broken one (the length of its longest valid beginning, at least 1; not ok).
struct Prefix {
  size_t length;
  bool ok;
};
Prefix classify(std::string_view s, size_t i) {
  const auto byte = [&](size_t j) { return static_cast<unsigned char>(s[j]); };
  const unsigned char lead = byte(i);
  if (lead < 0x80) return {1, true};
  size_t length = 0;
  // The second byte's range excludes overlong forms, surrogates and what lies above U+10FFFF.
  unsigned char low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {1, false};
  }
  for (size_t j = 1; j < length; ++j) {
    if (i + j == s.size()) return {0, true};
    if (byte(i + j) < low || byte(i + j) > high) return {j, false};
    low = 0x80;
    high = 0xBF;
  }
  return {length, true};
}

}  // namespace

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  size_t i = 0;
  while (i < pending_.size()) {
    const Prefix prefix = classify(pending_, i);
    if (prefix.length == 0) break;
    out += prefix.ok ? pending_.substr(i, prefix.length) : kReplacement;
    i += prefix.length;
  }
  pending_.erase(0, i);
  return out;
}

std::string Utf8Stream::finish() {
  const bool left = !pending_.empty();
  pending_.clear();
  return left ? kReplacement : "";
}

}  // namespace kalmanet::models
