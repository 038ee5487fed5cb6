// Interleaved timing of training steps (see speed.hpp).
#include "train/speed.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>

#include "models/language_model.hpp"
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

  // Tokens a second over at least `seconds`.
  double run(double seconds) {
    const Clock::time_point begin = Clock::now();
    int64_t steps = 0;
    double spent = 0;
    do {
      step();
      ++steps;
      spent = std::chrono::duration<double>(Clock::now() - begin).count();
    } while (spent < seconds);
    return static_cast<double>(steps * ids_.size(0) * (ids_.size(1) - 1)) / spent;
  }

 private:
  models::HybridLanguageModel model_;
  std::unique_ptr<AdamW> optimizer_;
  at::Tensor ids_;
};

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
    std::vector<std::vector<double>> rates(cases.size());
    for (const SpeedCase& one : cases) {
      trainees.push_back(std::make_unique<Trainee>(one.config, batch, context));
      trainees.back()->step();  // allocations, thread start and first touch are not timed
    }
    for (int round = 0; round < rounds && !InterruptGuard::requested(); ++round) {
      for (size_t i = 0; i < cases.size(); ++i) {
        rates[i].push_back(trainees[i]->run(seconds));
        if (progress) progress(++done, total);
      }
    }
    for (size_t i = 0; i < cases.size(); ++i) {
      if (rates[i].empty()) continue;
      std::sort(rates[i].begin(), rates[i].end());
      const size_t n = rates[i].size();
      const double median = (rates[i][(n - 1) / 2] + rates[i][n / 2]) / 2;
      results.push_back({cases[i].name, context, batch, median, rates[i].front(), rates[i].back()});
    }
  }
  return results;
}

}  // namespace kalmanet::train
