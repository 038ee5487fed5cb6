// The training loop (see trainer.hpp).
#include "train/trainer.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <utility>

#include "models/device.hpp"
#include "models/io.hpp"
#include "train/autocast.hpp"
#include "train/checkpoint.hpp"
#include "train/data.hpp"
#include "train/files.hpp"
#include "train/interrupt.hpp"
#include "train/metrics.hpp"
#include "train/optimizer.hpp"
#include "train/schedule.hpp"

namespace kalmanet::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point a, Clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

// Tokens a second over a sliding window, so that the display follows what the machine does now.
class Throughput {
 public:
  void add(double seconds, double tokens) {
    total_seconds_ += seconds;
    total_tokens_ += tokens;
    // The first steps pay for caches and allocations; a decaying mean forgets them.
    recent_seconds_ = 0.95 * recent_seconds_ + seconds;
    recent_tokens_ = 0.95 * recent_tokens_ + tokens;
  }
  double recent() const { return recent_seconds_ > 0 ? recent_tokens_ / recent_seconds_ : 0; }
  double overall() const { return total_seconds_ > 0 ? total_tokens_ / total_seconds_ : 0; }

 private:
  double total_seconds_ = 0, total_tokens_ = 0, recent_seconds_ = 0, recent_tokens_ = 0;
};

class Run {
 public:
  Run(TrainOptions options, const models::ModelConfig& config, fs::path out, StartMode mode,
      const TrainObserver& observer)
      : options_(std::move(options)), out_(std::move(out)), observer_(observer) {
    check(options_);
    device_ = models::device_named(options_.device);
    if (options_.threads > 0) at::set_num_threads(options_.threads);
    std::optional<FoundCheckpoint> found = open_run(mode);
    // Two checkpoints lie on the disk while one replaces the other.
    const int64_t parameters = found ? 0 : models::num_parameters(config);
    const int64_t room = found ? checkpoint_size(found->folder) : checkpoint_bytes(parameters);
    require_writable(out_, 2 * room);
    open_text();
    if (found) {
      model_ = models::load_model(found->folder, {.device = device_});
      state_ = found->state;
      // Where and how may change; what is computed may not.
      state_.options = options_;
      if (state_.data != data_->identity()) {
        throw std::runtime_error("text " + options_.text + " is not the one that " + out_.string() +
                                 " was trained on; give the same text or start anew with another "
                                 "--out");
      }
    } else {
      models::validate(config);
      if (config.vocab_size <= kEndOfTextToken) {
        throw std::runtime_error("vocab_size " + std::to_string(config.vocab_size) +
                                 ": training on bytes needs at least 257");
      }
      if (config.has_attention() && config.max_position_embeddings < options_.context) {
        throw std::runtime_error("context " + std::to_string(options_.context) +
                                 " exceeds the config's max_position_embeddings " +
                                 std::to_string(config.max_position_embeddings) +
                                 "; give a smaller --context or a larger limit");
      }
      torch::manual_seed(options_.seed);
      // Drawn on the CPU, so that a seed means one model on every device.
      model_ = models::HybridLanguageModel(config);
      model_->to(device_);
      state_.options = options_;
      state_.data = data_->identity();
    }
    if (model_->config().vocab_size <= kEndOfTextToken) {
      throw std::runtime_error("the model's vocabulary is too small for bytes");
    }
    model_->train();
    model_->set_gradient_checkpointing(options_.gradient_checkpointing);
    make_optimizer();
    if (found) load_training_tensors(found->folder, *optimizer_);
    metrics_.emplace(out_ / "metrics.jsonl", state_.step > 0 ? state_.step : -1);
    schedule_ = Schedule{schedule_kind(options_.schedule), options_.lr, options_.final_lr_ratio,
                         options_.warmup, options_.steps};
    if (found) checkpoint_ = found->folder;
  }

  TrainSummary go() {
    const InterruptGuard guard;
    const WindowSampler sampler(data_->train(), options_.context,
                                options_.sequential ? WindowOrder::sequential : WindowOrder::random,
                                options_.seed);
    TrainSummary summary;
    bool time_up = false;
    while (state_.step < options_.steps && !time_up && !InterruptGuard::requested()) {
      const Clock::time_point begin = Clock::now();
      const StepReport report = step(sampler, begin);
      if (observer_.step) observer_.step(report);
      const bool last = state_.step == options_.steps;
      if (state_.step % options_.log_every == 0 || last || state_.step == 1) log(report);
      time_up = options_.minutes > 0 && state_.seconds >= options_.minutes * 60;
      if (!last && !time_up && state_.step % options_.eval_every == 0) {
        evaluate(options_.eval_tokens);
      }
      if (!last && !time_up && state_.step % options_.checkpoint_every == 0) save();
    }
    summary.interrupted = state_.step < options_.steps && !time_up;
    if (saved_step_ != state_.step) save();
    if (!summary.interrupted) summary.valid = evaluate(options_.final_eval_tokens);
    summary.step = state_.step;
    summary.parameters = model_->num_parameters();
    summary.state_bytes = models::state_bytes(model_->config(), options_.context);
    summary.seconds = state_.seconds;
    summary.tokens_per_second = throughput_.overall();
    summary.checkpoint = checkpoint_;
    return summary;
  }

 private:
  std::optional<FoundCheckpoint> open_run(StartMode mode) {
    std::optional<FoundCheckpoint> found;
    if (fs::exists(out_ / "checkpoints")) found = find_checkpoint(out_);
    if (mode == StartMode::fresh) {
      if (found) {
        throw std::runtime_error(out_.string() + " already holds a run (at step " +
                                 std::to_string(found->state.step) +
                                 "); pass --resume to go on, or choose another --out");
      }
      // What a start without a checkpoint left: its text may have been another one.
      std::error_code ignored;
      fs::remove(out_ / "text.bin", ignored);
      return std::nullopt;
    }
    if (!found) {
      throw std::runtime_error(out_.string() +
                               " has no checkpoint to resume from; start it without --resume");
    }
    const std::string differing = differing_options(found->state.options, options_);
    if (!differing.empty()) {
      throw std::runtime_error("a resumed run must have the options it began with; differing: " +
                               differing + "; leave them out or choose another --out");
    }
    for (const std::string& skipped : found->skipped)
      note("skipped a damaged checkpoint: " + skipped);
    note("resuming at step " + std::to_string(found->state.step) + " from " +
         found->folder.string());
    saved_step_ = found->state.step;
    return found;
  }

  void open_text() {
    const TextSource source = prepare_text(options_.text, out_);
    data_.emplace(source.file, options_.held_out, options_.context);
    if (source.documents > 1) {
      note("packed " + std::to_string(source.documents) + " text files into " +
           source.file.string() + " (" + std::to_string(source.skipped) + " others left out)");
    }
    note("text: " + describe_bytes(static_cast<int64_t>(data_->train().size())) + " to train on, " +
         describe_bytes(static_cast<int64_t>(data_->valid().size())) + " held out");
  }

  void make_optimizer() {
    AdamW::NamedTensors parameters;
    for (const auto& item : model_->named_parameters()) {
      parameters.emplace_back(item.key(), item.value());
    }
    optimizer_.emplace(parameters,
                       AdamWOptions{options_.beta1, options_.beta2, 1e-8, options_.weight_decay});
  }

  // One optimizer step; `begin` is when it began.
  StepReport step(const WindowSampler& sampler, Clock::time_point begin) {
    const int64_t context = options_.context;
    const at::Tensor ids = torch::empty({options_.batch, context + 1}, torch::kInt64);
    optimizer_->zero_grad();
    double loss_sum = 0;
    for (int64_t pass = 0; pass < options_.accumulate; ++pass) {
      for (int64_t row = 0; row < options_.batch; ++row) {
        sampler.window(state_.windows++, ids.data_ptr<int64_t>() + row * (context + 1));
      }
      const at::Tensor loss = loss_of(ids.to(device_));
      loss_sum += loss.item<double>();
      (options_.accumulate > 1 ? loss / static_cast<double>(options_.accumulate) : loss).backward();
    }
    StepReport report;
    report.loss = loss_sum / static_cast<double>(options_.accumulate);
    report.grad_norm = optimizer_->clip(options_.clip);
    if (!std::isfinite(report.loss) || !std::isfinite(report.grad_norm)) {
      throw std::runtime_error(
          std::string(std::isfinite(report.loss) ? "the gradient" : "the loss") +
          " is not a number at step " + std::to_string(state_.step + 1) +
          "; nothing was saved of it. Try a smaller --lr, a longer --warmup or --clip 1" +
          (checkpoint_.empty() ? "" : "; the last good checkpoint is " + checkpoint_.string()));
    }
    const double time_share =
        options_.minutes > 0 ? std::min(1.0, state_.seconds / (options_.minutes * 60)) : 0;
    report.lr = schedule_.at(state_.step, time_share);
    optimizer_->step(report.lr);
    ++state_.step;

    const auto tokens = static_cast<double>(options_.batch * options_.accumulate * context);
    const double seconds = seconds_between(begin, Clock::now());
    throughput_.add(seconds, tokens);
    state_.seconds += seconds;
    report.step = state_.step;
    report.steps = options_.steps;
    report.tokens_per_second = throughput_.recent();
    report.seconds = state_.seconds;
    report.seconds_left = static_cast<double>(options_.steps - state_.step) * tokens /
                          std::max(1e-9, throughput_.recent());
    if (options_.minutes > 0) {
      report.seconds_left =
          std::clamp(options_.minutes * 60 - state_.seconds, 0.0, report.seconds_left);
    }
    return report;
  }

  at::Tensor loss_of(const at::Tensor& ids) {
    const Autocast autocast(options_.dtype == "bf16", device_);
    const at::Tensor logits = model_->forward(ids.narrow(1, 0, options_.context).contiguous());
    return at::cross_entropy_loss(logits.flatten(0, 1).to(at::kFloat),
                                  ids.narrow(1, 1, options_.context).flatten());
  }

  Score evaluate(int64_t tokens) {
    const Clock::time_point begin = Clock::now();
    model_->eval();
    const Score score = score_windows(model_, data_->valid(), options_.context, options_.batch,
                                      tokens, options_.dtype == "bf16");
    model_->train();
    state_.seconds += seconds_between(begin, Clock::now());
    metrics_->write({{"step", state_.step},
                     {"valid_loss", score.loss()},
                     {"valid_bits_per_byte", score.bits_per_byte()},
                     {"valid_tokens", score.tokens}});
    if (observer_.evaluated) observer_.evaluated(state_.step, score);
    return score;
  }

  void log(const StepReport& report) {
    metrics_->write({{"step", report.step},
                     {"loss", report.loss},
                     {"grad_norm", report.grad_norm},
                     {"lr", report.lr},
                     {"tokens_per_second", report.tokens_per_second},
                     {"seconds", report.seconds}});
  }

  void save() {
    const Clock::time_point begin = Clock::now();
    try {
      checkpoint_ = save_checkpoint(out_, model_, *optimizer_, state_, options_.keep_checkpoints);
    } catch (const std::exception& error) {
      throw std::runtime_error(
          "cannot write the checkpoint of step " + std::to_string(state_.step) + ": " +
          error.what() + "\n" +
          (checkpoint_.empty() ? "Nothing of this run is saved; free some space and start again."
                               : "The last good one is " + checkpoint_.string() +
                                     "; free some space and run again with --resume."));
    }
    state_.seconds += seconds_between(begin, Clock::now());
    saved_step_ = state_.step;
    if (observer_.saved) observer_.saved(state_.step, checkpoint_);
  }

  static int64_t checkpoint_size(const fs::path& folder) {
    int64_t bytes = 0;
    for (const auto& entry : fs::directory_iterator(folder)) {
      bytes += static_cast<int64_t>(entry.file_size());
    }
    return bytes;
  }

  void note(const std::string& line) const {
    if (observer_.note) observer_.note(line);
  }

  TrainOptions options_;
  at::Device device_ = at::kCPU;
  fs::path out_;
  const TrainObserver& observer_;
  std::optional<TextData> data_;
  models::HybridLanguageModel model_{nullptr};
  std::optional<AdamW> optimizer_;
  std::optional<MetricsFile> metrics_;
  Schedule schedule_;
  TrainingState state_;
  Throughput throughput_;
  fs::path checkpoint_;
  int64_t saved_step_ = -1;
};

}  // namespace

TrainSummary train_model(const TrainOptions& options, const models::ModelConfig& config,
                         const fs::path& out, StartMode mode, const TrainObserver& observer) {
  Run run(options, config, out, mode, observer);
  return run.go();
}

}  // namespace kalmanet::train
