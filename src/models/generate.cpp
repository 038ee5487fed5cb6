// Sampling from logits and the generation loop.
#include "models/generate.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <mutex>
#include <numeric>
#include <string>

#include "kalmanet/error.hpp"

namespace kalmanet::models {
namespace {

using at::Tensor;

[[noreturn]] void reject(const char* argument, const std::string& message) {
  throw Error(ErrorCode::invalid_argument, argument, message);
}

// Tokens of a prompt read at once: enough for full speed, few enough that a long prompt's
// activations stay small.
constexpr int64_t kPromptPiece = 1024;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options)
    : options_(options), generator_(at::detail::createCPUGenerator(options.seed)) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    reject("temperature", "is " + std::to_string(options.temperature) +
                              "; it must be 0 (the likeliest token) or a positive number");
  }
  if (options.top_k < 0) {
    reject("top_k", "is " + std::to_string(options.top_k) + "; it must be 0 (all tokens) or more");
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    reject("top_p", "is " + std::to_string(options.top_p) + "; it must be above 0 and at most 1");
  }
  if (options.max_new_tokens < 0) {
    reject("max_new_tokens",
           "is " + std::to_string(options.max_new_tokens) + "; it must be 0 or more");
  }
  if (options.vocab_limit < 0) {
    reject("vocab_limit",
           "is " + std::to_string(options.vocab_limit) + "; it must be 0 (all) or more");
  }
}

int64_t Sampler::sample(const Tensor& logits) {
  if (logits.dim() != 1 || logits.numel() == 0 || !logits.is_cpu()) {
    reject("logits", "must be one row [vocab] on the CPU");
  }
  const Tensor row = logits.to(at::kFloat).contiguous();
  const float* data = row.data_ptr<float>();
  int64_t n = row.numel();
  if (options_.vocab_limit > 0) n = std::min(n, options_.vocab_limit);
  int64_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(data[i])) {
      reject("logits", "hold NaN at token " + std::to_string(i) +
                           "; the model's weights or its state are not finite");
    }
    if (data[i] > data[best]) best = i;
  }
  if (!std::isfinite(data[best])) reject("logits", "hold no finite largest value");
  if (options_.temperature == 0) return best;

  // Candidates by falling logit (ties: the smaller id first), as far as top_k and top_p need them.
  order_.resize(static_cast<size_t>(n));
  std::iota(order_.begin(), order_.end(), 0);
  const auto likelier = [data](int32_t a, int32_t b) {
    return data[a] != data[b] ? data[a] > data[b] : a < b;
  };
  size_t kept = order_.size();
  if (options_.top_k > 0 && options_.top_k < n) {
    kept = static_cast<size_t>(options_.top_k);
    std::partial_sort(order_.begin(), order_.begin() + options_.top_k, order_.end(), likelier);
  } else if (options_.top_p < 1) {
    std::sort(order_.begin(), order_.end(), likelier);
  }
  weights_.resize(kept);
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    weights_[i] = static_cast<float>(
        std::exp((static_cast<double>(data[order_[i]]) - data[best]) / options_.temperature));
    total += weights_[i];
  }
  if (options_.top_p < 1) {  // the shortest beginning that holds top_p of what top_k left
    double sum = 0;
    size_t end = 0;
    while (end < kept && sum < options_.top_p * total) sum += weights_[end++];
    kept = std::max<size_t>(end, 1);
    total = sum;
  }
  double uniform = 0;  // [0, 1) with 53 random bits
  {
    auto* random = at::check_generator<at::CPUGeneratorImpl>(generator_);
    const std::lock_guard<std::mutex> lock(random->mutex_);
    uniform = static_cast<double>(random->random64() >> 11) * 0x1p-53;
  }
  double left = uniform * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weights_[i];
    if (left < 0) return order_[i];
  }
  for (size_t i = kept; i-- > 1;) {  // rounding used the sum up: the last one with any weight
    if (weights_[i] > 0) return order_[i];
  }
  return order_[0];
}

GenerationReport generate(HybridLanguageModel& model, std::span<const int64_t> prompt,
                          const SamplingOptions& options, const TokenCallback& on_token,
                          ModelState* state) {
  Sampler sampler(options);
  if (prompt.empty()) {
    reject("prompt", "is empty; give at least one token (the end-of-text token begins a new text)");
  }
  const at::NoGradGuard no_grad;
  ModelState own;
  if (state == nullptr) state = &own;
  GenerationReport report;
  const auto last_logits = [&](const Tensor& ids) {
    const Tensor hidden = model->hidden_states(ids, {}, state);
    return model->logits(hidden.select(1, ids.size(1) - 1)).select(0, 0).to(at::kCPU);
  };

  const auto start = std::chrono::steady_clock::now();
  const int64_t length = static_cast<int64_t>(prompt.size());
  Tensor logits;
  for (int64_t begin = 0; begin < length; begin += kPromptPiece) {
    const int64_t count = std::min(kPromptPiece, length - begin);
    Tensor ids = at::empty({1, count}, at::kLong);
    std::copy_n(prompt.data() + begin, count, ids.data_ptr<int64_t>());
    logits = last_logits(ids.to(model->device()));
  }
  report.prefill_seconds = seconds_since(start);

  const auto decode_start = std::chrono::steady_clock::now();
  Tensor id = at::empty({1, 1}, at::kLong);
  while (report.num_tokens < options.max_new_tokens) {
    if (report.num_tokens > 0) logits = last_logits(id.to(model->device()));
    const int64_t token = sampler.sample(logits);
    if (options.eos_token_id && token == *options.eos_token_id) {
      report.stop = StopReason::end_of_text;
      break;
    }
    ++report.num_tokens;
    if (!on_token(token)) {
      report.stop = StopReason::callback;
      break;
    }
    id.data_ptr<int64_t>()[0] = token;
  }
  report.decode_seconds = seconds_since(decode_start);
  return report;
}

}  // namespace kalmanet::models
