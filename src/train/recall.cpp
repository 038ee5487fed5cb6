// Associative recall: data, model and training loop (see recall.hpp).
#include "train/recall.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "kalmanet/error.hpp"
#include "train/clock.hpp"
#include "train/data.hpp"
#include "train/interrupt.hpp"
#include "train/optimizer.hpp"
#include "train/schedule.hpp"

namespace kalmanet::train {
namespace {

constexpr uint64_t kEvalStream = 0x5eed0e7a1ULL;
constexpr double kNormEps = 1e-6;
// A second moment that remembers a hundred steps: the large gradients of the first steps, when only
// the head learns, otherwise hold the updates down for a thousand.
constexpr double kBeta2 = 0.99;

// Counter-based: the n-th draw of (seed, index) is the same on every machine.
class Draws {
 public:
  Draws(uint64_t seed, int64_t index) : key_(mix64(mix64(seed) + static_cast<uint64_t>(index))) {}
  int64_t below(int64_t n) {
    return static_cast<int64_t>(mix64(key_ + count_++) % static_cast<uint64_t>(n));
  }

 private:
  uint64_t key_, count_ = 0;
};

void check(const RecallOptions& o) {
  if (o.pairs < 1 || o.vocab_size < 2 * o.pairs) {
    throw Error(ErrorCode::invalid_argument, "pairs",
                std::to_string(o.pairs) + " keys without repeats need a vocabulary of at least " +
                    std::to_string(2 * std::max<int64_t>(o.pairs, 1)) + "; it is " +
                    std::to_string(o.vocab_size));
  }
  if (o.width < 1 || o.heads < 1 || o.width % o.heads != 0) {
    throw Error(ErrorCode::invalid_argument, "heads",
                std::to_string(o.heads) + " must divide the width " + std::to_string(o.width));
  }
  if (o.steps < 1 || o.batch < 1 || o.layers < 1) {
    throw Error(ErrorCode::invalid_argument, "steps", "steps, batch and layers must be at least 1");
  }
}

double accuracy_of(RecallModel& model, const RecallOptions& options, int64_t batches) {
  const torch::NoGradGuard no_grad;
  int64_t right = 0, asked = 0;
  for (int64_t i = 0; i < batches; ++i) {
    const RecallBatch batch = make_recall_batch(options, options.seed ^ kEvalStream, i);
    const at::Tensor guess = model->forward(batch.tokens, batch.asked).argmax(-1);
    right += guess.eq(batch.answers).sum().item<int64_t>();
    asked += guess.numel();
  }
  return static_cast<double>(right) / static_cast<double>(asked);
}

}  // namespace

const std::vector<std::string>& recall_variants() {
  static const std::vector<std::string> kVariants = {"gka", "linear", "learned"};
  return kVariants;
}

RecallBatch make_recall_batch(const RecallOptions& options, uint64_t seed, int64_t index) {
  const int64_t n = options.pairs, half = options.vocab_size / 2;
  RecallBatch batch;
  batch.tokens = torch::empty({options.batch, 4 * n}, torch::kInt64);
  batch.answers = torch::empty({options.batch, n}, torch::kInt64);
  batch.asked = torch::arange(2 * n, 4 * n, 2, torch::kInt64);
  std::vector<int64_t> keys(static_cast<size_t>(half)), values(static_cast<size_t>(n)),
      order(static_cast<size_t>(n));
  std::iota(keys.begin(), keys.end(), 0);
  Draws draw(seed, index);
  for (int64_t b = 0; b < options.batch; ++b) {
    auto* tokens = batch.tokens.data_ptr<int64_t>() + b * 4 * n;
    auto* answers = batch.answers.data_ptr<int64_t>() + b * n;
    for (int64_t i = 0; i < n; ++i) {  // the first n steps of a shuffle: n keys without repeats
      std::swap(keys[static_cast<size_t>(i)], keys[static_cast<size_t>(i + draw.below(half - i))]);
      values[static_cast<size_t>(i)] = half + draw.below(options.vocab_size - half);
      tokens[2 * i] = keys[static_cast<size_t>(i)];
      tokens[2 * i + 1] = values[static_cast<size_t>(i)];
      order[static_cast<size_t>(i)] = i;
    }
    for (int64_t i = 0; i < n; ++i) {
      std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(i + draw.below(n - i))]);
      const auto pair = static_cast<size_t>(order[static_cast<size_t>(i)]);
      tokens[2 * n + 2 * i] = keys[pair];
      tokens[2 * n + 2 * i + 1] = draw.below(options.vocab_size);
      answers[i] = values[pair];
    }
  }
  return batch;
}

RecallModelImpl::RecallModelImpl(const RecallOptions& options, const std::string& variant) {
  check(options);
  layers::GatedKalmaNetOptions mixer;
  mixer.hidden_size = options.width;
  mixer.num_heads = options.heads;
  mixer.head_dim = options.width / options.heads;
  mixer.use_forgetting_gate = false;
  mixer.use_forgetting_gate_kk = false;
  if (variant == "gka") {
    mixer.fixed_alpha = 1.0;
  } else if (variant == "linear") {
    mixer.fixed_alpha = 0.0;
  } else if (variant == "learned") {
    mixer.fixed_alpha = 1.0;
    mixer.learned_ridge = true;
    mixer.solver = "direct";  // 30 steps are not enough for the small ridges it may choose
  } else {
    throw Error(ErrorCode::invalid_argument, "variant",
                "'" + variant + "'; allowed: gka, linear, learned");
  }
  embed_ = register_module("embed", torch::nn::Embedding(options.vocab_size, options.width));
  for (int64_t i = 0; i < options.layers; ++i) {
    mixers_.push_back(register_module("mixer" + std::to_string(i), layers::GatedKalmaNet(mixer)));
  }
  for (int64_t i = 0; i <= options.layers; ++i) {
    norms_.push_back(register_parameter("norm" + std::to_string(i), torch::ones({options.width})));
  }
  head_ = register_module(
      "head",
      torch::nn::Linear(torch::nn::LinearOptions(options.width, options.vocab_size).bias(false)));
  // Convolutions start near what a memory needs: queries and values from their own token, keys from
  // the mean of their own and the one before, so that a value can be stored under the key in front
  // of it. From random filters the same is found, but the seed decides whether within 1500 steps.
  const torch::NoGradGuard no_grad;
  for (auto& item : named_parameters()) {
    const std::string& name = item.key();
    if (!name.ends_with("conv1d.weight")) continue;
    at::Tensor taps =
        item.value().mul_(0.1).squeeze(1);  // [D, W], the last tap is the token itself
    const bool key = name.ends_with("k_conv1d.weight");
    taps.select(1, -1).add_(key ? 0.5 : 1.0);
    if (key) taps.select(1, -2).add_(0.5);
  }
}

at::Tensor RecallModelImpl::forward(const at::Tensor& tokens, const at::Tensor& asked) {
  at::Tensor x = embed_->forward(tokens);
  const std::vector<int64_t> shape = {x.size(-1)};
  for (size_t i = 0; i < mixers_.size(); ++i) {
    x = x + mixers_[i]->forward(at::rms_norm(x, shape, norms_[i], kNormEps));
  }
  // The head, with its 1024 outputs, only where an answer is asked for.
  return head_->forward(at::rms_norm(x.index_select(1, asked), shape, norms_.back(), kNormEps));
}

RecallRun run_recall(const RecallOptions& options, const std::string& variant,
                     const std::function<void(int64_t, double)>& on_step,
                     const std::function<void(const RecallPoint&)>& on_point) {
  torch::manual_seed(options.seed);
  RecallModel model(options, variant);
  RecallRun run;
  run.variant = variant;
  AdamW::NamedTensors parameters;
  for (const auto& item : model->named_parameters()) {
    parameters.emplace_back(item.key(), item.value());
    run.parameters += item.value().numel();
  }
  AdamW optimizer(parameters, {0.9, kBeta2, 1e-8, options.weight_decay});
  const Schedule schedule{ScheduleKind::one_cycle, options.lr, 0.0,
                          std::llround(options.warmup * static_cast<double>(options.steps)),
                          options.steps};
  const auto start = std::chrono::steady_clock::now();
  const double processor_start = processor_seconds();
  double loss_sum = 0;
  int64_t loss_count = 0;
  for (int64_t step = 0; step < options.steps && !run.interrupted; ++step) {
    const RecallBatch batch = make_recall_batch(options, options.seed, step);
    optimizer.zero_grad();
    const at::Tensor logits = model->forward(batch.tokens, batch.asked);
    const at::Tensor loss = at::cross_entropy_loss(logits.flatten(0, 1), batch.answers.flatten());
    loss.backward();
    const auto value = loss.item<double>();
    if (!std::isfinite(value)) {
      throw std::runtime_error("recall (" + variant + "): the loss is not finite at step " +
                               std::to_string(step + 1) + "; try a smaller --lr");
    }
    optimizer.clip(options.clip);
    optimizer.step(schedule.at(step));
    loss_sum += value;
    ++loss_count;
    if (on_step) on_step(step + 1, value);
    run.interrupted = InterruptGuard::requested();
    if ((step + 1) % options.eval_every == 0 || step + 1 == options.steps) {
      const bool last = step + 1 == options.steps;
      const double accuracy =
          accuracy_of(model, options, last ? options.final_batches : options.eval_batches);
      run.curve.push_back({step + 1, loss_sum / static_cast<double>(loss_count), accuracy});
      run.accuracy = accuracy;
      loss_sum = 0;
      loss_count = 0;
      if (on_point) on_point(run.curve.back());
    }
  }
  run.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  run.processor_seconds = processor_seconds() - processor_start;
  return run;
}

}  // namespace kalmanet::train
