// Training text as memory-mapped bytes: one file as it is, or a folder's text files packed into
// one.
//
// A byte is a token (0..255). In a packed file documents are separated by the byte 0, which no text
// file contains and which is read as the token 256, "end of text".
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "models/files.hpp"

namespace kalmanet::train {

inline constexpr int64_t kEndOfTextToken = 256;
inline constexpr uint8_t kDocumentSeparator = 0;

// One byte's token.
inline int64_t token_of(uint8_t byte) {
  return byte == kDocumentSeparator ? kEndOfTextToken : byte;
}

struct TextSource {
  std::filesystem::path file;  // what to map
  int64_t documents = 1;
  int64_t skipped = 0;  // files of the folder that are empty or not text
};

// A file is used as it is. A folder's text files (no NUL byte; hidden ones, links, __pycache__
// and Python's installed packages left out) are packed into `cache_folder`/text.bin, in an order
// that depends on their names alone but looks shuffled, so that the held-out tail is a fair sample
// of the files. A cache that is already there is used again: a resumed run sees the text it started
// with. Throws std::runtime_error if there is no such path, no text in it, or the file looks
// binary.
TextSource prepare_text(const std::filesystem::path& text,
                        const std::filesystem::path& cache_folder);

// The mapped text, split: the last `held_out` of it (a fraction) is for validation.
class TextData {
 public:
  // Both splits must hold at least one window of context + 1 bytes; throws std::runtime_error.
  TextData(const std::filesystem::path& file, double held_out, int64_t context);

  std::span<const uint8_t> train() const { return train_; }
  std::span<const uint8_t> valid() const { return valid_; }
  // Of the size and up to 1 MiB each at start, middle and end: tells a resumed run that its text
  // is another one.
  std::string identity() const;

 private:
  std::shared_ptr<models::MappedFile> file_;
  std::span<const uint8_t> train_, valid_;
};

enum class WindowOrder { random, sequential };

// Windows of context + 1 tokens (inputs and, one to the right, targets). Window number i depends on
// (seed, i) alone, so the position in the data is one number: how many windows were drawn.
class WindowSampler {
 public:
  WindowSampler(std::span<const uint8_t> bytes, int64_t context, WindowOrder order, uint64_t seed);

  // Writes window `index` to out[0 .. context]. random: its start is uniform over the text (with
  // replacement); sequential: windows follow each other and start again at the end.
  void window(int64_t index, int64_t* out) const;
  int64_t start_of(int64_t index) const;
  // How many windows follow each other without overlap (targets do not repeat).
  int64_t sequential_windows() const { return sequential_; }

 private:
  std::span<const uint8_t> bytes_;
  int64_t context_;
  WindowOrder order_;
  uint64_t seed_;
  int64_t sequential_;
};

// The splitmix64 finaliser: a bijection of 64-bit numbers that looks random.
uint64_t mix64(uint64_t x);

}  // namespace kalmanet::train
