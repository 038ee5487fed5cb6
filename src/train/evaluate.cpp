// Scoring windows and whole files (see evaluate.hpp).
#include "train/evaluate.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <stdexcept>

#include "models/files.hpp"
#include "train/autocast.hpp"
#include "train/data.hpp"
#include "train/interrupt.hpp"

namespace kalmanet::train {
namespace {

double sum_nats(const at::Tensor& logits, const at::Tensor& targets) {
  // A vocabulary of 257 sums to more than float32 holds over long files: the sum is in float64.
  return at::cross_entropy_loss(logits.flatten(0, -2).to(at::kFloat), targets.flatten(), {},
                                at::Reduction::None)
      .sum(at::kDouble)
      .item<double>();
}

bool is_space(uint8_t c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

}  // namespace

double Score::bits_per_byte() const {
  return loss() / std::numbers::ln2;
}
double FileScore::perplexity() const {
  return std::exp(score.loss());
}
double FileScore::word_perplexity() const {
  return words > 0 ? std::exp(score.nats / static_cast<double>(words)) : 0;
}

Score score_windows(models::HybridLanguageModel& model, std::span<const uint8_t> bytes,
                    int64_t context, int64_t batch, int64_t tokens, bool bf16) {
  const torch::NoGradGuard no_grad;
  const at::Device device = model->device();
  const Autocast autocast(bf16, device);
  const WindowSampler sampler(bytes, context, WindowOrder::sequential, 0);
  const int64_t windows = std::min(sampler.sequential_windows(),
                                   std::max<int64_t>(1, (tokens + context - 1) / context));
  Score score;
  for (int64_t first = 0; first < windows; first += batch) {
    const int64_t rows = std::min(batch, windows - first);
    const at::Tensor drawn = torch::empty({rows, context + 1}, torch::kInt64);
    for (int64_t r = 0; r < rows; ++r) {
      sampler.window(first + r, drawn.data_ptr<int64_t>() + r * (context + 1));
    }
    const at::Tensor ids = drawn.to(device);
    const at::Tensor logits = model->forward(ids.narrow(1, 0, context).contiguous());
    score.nats += sum_nats(logits, ids.narrow(1, 1, context));
    score.tokens += rows * context;
  }
  return score;
}

FileScore score_file(models::HybridLanguageModel& model, const std::filesystem::path& path,
                     int64_t window, int64_t max_bytes,
                     const std::function<void(int64_t, int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  const models::MappedFile file(path);
  const auto* bytes = reinterpret_cast<const uint8_t*>(file.bytes().data());
  auto total = static_cast<int64_t>(file.bytes().size());
  if (max_bytes > 0) total = std::min(total, max_bytes);
  if (total < 2) {
    throw std::runtime_error("file " + path.string() + " has " + std::to_string(total) +
                             " bytes; scoring needs at least 2");
  }
  const auto& config = model->config();
  if (config.vocab_size <= kEndOfTextToken) {
    throw std::runtime_error("the model's vocabulary has " + std::to_string(config.vocab_size) +
                             " tokens; a byte-level model has at least 257");
  }
  const bool limited = config.has_attention();
  if (limited) window = std::min(window, config.max_position_embeddings);
  FileScore result;
  models::ModelState state;
  const at::Tensor buffer = torch::empty({window + 1}, torch::kInt64);
  bool in_word = false;
  const auto count_words = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const bool space = is_space(bytes[i]);
      result.words += (!space && !in_word) + (bytes[i] == '\n');
      in_word = !space;
    }
  };
  count_words(0, 1);
  for (int64_t done = 0; done + 1 < total && !result.interrupted;) {
    const int64_t n = std::min(window, total - 1 - done);
    if (limited && state.position + n > config.max_position_embeddings) {
      state = {};
      ++result.resets;
    }
    auto* ids = buffer.data_ptr<int64_t>();
    for (int64_t i = 0; i <= n; ++i) ids[i] = token_of(bytes[done + i]);
    const at::Tensor read = buffer.to(model->device());
    const at::Tensor logits =
        model->forward(read.narrow(0, 0, n).unsqueeze(0), std::nullopt, &state);
    result.score.nats += sum_nats(logits, read.narrow(0, 1, n));
    result.score.tokens += n;
    count_words(done + 1, done + 1 + n);
    done += n;
    if (progress) progress(done, total - 1);
    result.interrupted = InterruptGuard::requested();
  }
  return result;
}

}  // namespace kalmanet::train
