// Text generation: sampling, and the loop that feeds each new token back in constant memory.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "models/language_model.hpp"

namespace kalmanet::models {

struct SamplingOptions {
  int64_t max_new_tokens = 200;  // >= 0
  double temperature = 1.0;      // >= 0; 0: the likeliest token (greedy)
  int64_t top_k = 0;             // keep the k likeliest; 0: all
  double top_p = 1.0;            // then keep the likeliest that together reach p; in (0, 1]
  uint64_t seed = 0;
  std::optional<int64_t> eos_token_id = {};  // stop there (the token is not handed to the callback)
  int64_t vocab_limit = 0;                   // only ids below it (a padded vocabulary); 0: all
};

// Draws tokens: the same seed and logits give the same tokens. Works in buffers that it keeps.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);  // Throws Error for values out of range
  // logits [vocab], any floating dtype, CPU. Throws Error if they hold a NaN or only -inf.
  int64_t sample(const at::Tensor& logits);

 private:
  SamplingOptions options_;
  at::Generator generator_;
  std::vector<float> weights_;
  std::vector<int32_t> order_;
};

enum class StopReason { max_new_tokens, end_of_text, callback };

struct GenerationReport {
  StopReason stop = StopReason::max_new_tokens;
  int64_t num_tokens = 0;  // handed to the callback
  double prefill_seconds = 0;
  double decode_seconds = 0;
};

// Called with each new token; false stops.
using TokenCallback = std::function<bool(int64_t token)>;

// Reads the prompt (at least one token; in pieces, so that memory does not depend on its length),
// then generates. `state`: null: a new sequence; else goes on from it, and holds every token read
// afterwards (the last one generated has not been read). Runs without gradients.
GenerationReport generate(HybridLanguageModel& model, std::span<const int64_t> prompt,
                          const SamplingOptions& options, const TokenCallback& on_token,
                          ModelState* state = nullptr);

}  // namespace kalmanet::models
