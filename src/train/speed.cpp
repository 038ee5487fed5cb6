// Interleaved timing of training steps (see speed.hpp).
#include "train/speed.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>

#include "models/language_model.hpp"
#include "train/clock.hpp"
#include "train/interrupt.hpp"
#include "train/optimizer.hpp"

namespace kalmanet::train {
namespace {

using Clock = std::chrono::steady_clock;

class Trainee {
 public:
  Trainee(const models::ModelConfig& config, int64_t batch, int64_t context) : model_(config) {
    AdamW::NamedTensors parameters;
    for (const auto& item : model_->named_parameters()) {
      parameters.emplace_back(item.key(), item.value());
    }
    optimizer_ = std::make_unique<AdamW>(parameters, AdamWOptions{});
    ids_ = torch::randint(256, {batch, context + 1}, torch::kInt64);
  }

  void step() {
    const int64_t context = ids_.size(1) - 1;
    optimizer_->zero_grad();
    const at::Tensor logits = model_->forward(ids_.narrow(1, 0, context).contiguous());
    at::cross_entropy_loss(logits.flatten(0, 1), ids_.narrow(1, 1, context).flatten()).backward();
    optimizer_->clip(1.0);
    optimizer_->step(1e-4);
  }

  struct Rates {
    double by_clock, by_processor;  // tokens a second
  };
  // Over at least `seconds`.
  Rates run(double seconds) {
    const Clock::time_point begin = Clock::now();
    const double processor_begin = processor_seconds();
    int64_t steps = 0;
    double spent = 0;
    do {
      step();
      ++steps;
      spent = std::chrono::duration<double>(Clock::now() - begin).count();
    } while (spent < seconds);
    const auto tokens = static_cast<double>(steps * ids_.size(0) * (ids_.size(1) - 1));
    return {tokens / spent, tokens / (processor_seconds() - processor_begin)};
  }

 private:
  models::HybridLanguageModel model_;
  std::unique_ptr<AdamW> optimizer_;
  at::Tensor ids_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

}  // namespace

std::vector<SpeedResult> measure_training_speed(
    const std::vector<SpeedCase>& cases, const std::vector<int64_t>& contexts,
    int64_t tokens_per_step, int rounds, double seconds,
    const std::function<void(int64_t, int64_t)>& progress) {
  std::vector<SpeedResult> results;
  const auto total = static_cast<int64_t>(contexts.size() * cases.size()) * rounds;
  int64_t done = 0;
  for (const int64_t context : contexts) {
    const int64_t batch = std::max<int64_t>(1, tokens_per_step / context);
    std::vector<std::unique_ptr<Trainee>> trainees;
    std::vector<std::vector<double>> by_clock(cases.size()), by_processor(cases.size());
    for (const SpeedCase& one : cases) {
      trainees.push_back(std::make_unique<Trainee>(one.config, batch, context));
      trainees.back()->step();  // allocations, thread start and first touch are not timed
    }
    for (int round = 0; round < rounds && !InterruptGuard::requested(); ++round) {
      for (size_t i = 0; i < cases.size(); ++i) {
        const Trainee::Rates rates = trainees[i]->run(seconds);
        by_clock[i].push_back(rates.by_clock);
        by_processor[i].push_back(rates.by_processor);
        if (progress) progress(++done, total);
      }
    }
    for (size_t i = 0; i < cases.size(); ++i) {
      if (by_clock[i].empty()) continue;
      const auto [slowest, fastest] = std::minmax_element(by_clock[i].begin(), by_clock[i].end());
      results.push_back({cases[i].name, context, batch, median(by_clock[i]), *slowest, *fastest,
                         median(by_processor[i])});
    }
  }
  return results;
}

}  // namespace kalmanet::train
