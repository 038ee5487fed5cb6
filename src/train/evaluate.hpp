// How well a model predicts text: on windows of the held-out split, and on a file of any length.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>

#include "models/language_model.hpp"

namespace kalmanet::train {

struct Score {
  double nats = 0;  // summed over the tokens
  int64_t tokens = 0;
  double loss() const { return tokens > 0 ? nats / static_cast<double>(tokens) : 0; }
  // A token is a byte, so this is bits a token.
  double bits_per_byte() const;
};

// The loss on windows of `context` + 1 bytes that follow each other, each from an empty state: at
// least `tokens` predictions, or the whole span if that has fewer (its unfilled last window left
// out). `batch` windows at a time. Deterministic. bf16: matrix products in bfloat16.
Score score_windows(models::HybridLanguageModel& model, std::span<const uint8_t> bytes,
                    int64_t context, int64_t batch, int64_t tokens, bool bf16 = false);

struct FileScore {
  Score score;         // every byte but the first
  int64_t words = 0;   // separated by white space, counting one end-of-line token a line
  int64_t resets = 0;  // how often a model with attention layers had to start from an empty state
  bool interrupted = false;
  double bits_per_byte() const { return score.bits_per_byte(); }
  double perplexity() const;       // a byte
  double word_perplexity() const;  // exp(total nats / words)
};

// Reads the file through a memory map in windows of `window` bytes and carries the state across
// them: memory does not depend on the length. A model with `*` layers cannot carry more than
// max_position_embeddings tokens: it then starts from an empty state, which `resets` counts.
// `progress(bytes done, bytes)` is called after each window; `max_bytes` 0: all.
FileScore score_file(models::HybridLanguageModel& model, const std::filesystem::path& path,
                     int64_t window, int64_t max_bytes = 0,
                     const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace kalmanet::train
