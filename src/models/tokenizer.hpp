// Byte-level tokenizer: one token a byte, plus the end-of-text token; and its tokenizer.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kalmanet::models {

class ByteTokenizer {
 public:
  static constexpr int64_t kEndOfText = 256;  // "<|endoftext|>": begins a text and ends it
  static constexpr int64_t kVocabSize = 257;  // a model's vocab_size may be larger (padding)

  int64_t vocab_size() const noexcept { return kVocabSize; }
  // One id a byte. Text that spells "<|endoftext|>" stays text.
  std::vector<int64_t> encode(std::string_view text) const;
  // The bytes; kEndOfText is nothing. Throws Error for an id outside 0..256.
  std::string decode(std::span<const int64_t> ids) const;
  std::string decode(int64_t id) const;

  // Hugging Face's tokenizer.json: a BPE model without merges over the byte-level alphabet.
  std::string to_json() const;
  // Throws Error unless the text is a byte tokenizer of this layout.
  static ByteTokenizer parse(std::string_view json_text, const std::string& source);
  static ByteTokenizer read(const std::filesystem::path& path);  // the file, or its folder
  void write(const std::filesystem::path& path) const;
};

// Turns a stream of bytes into a stream of whole UTF-8 code points: what is unfinished waits for
// its rest; what can never become valid is replaced by U+FFFD, as Python's errors="replace" does.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);  // what can be shown now
  std::string finish();                      // what was left, replaced

 private:
  std::string pending_;
};

}  // namespace kalmanet::models
