// kalmanet train: text in, a model folder out.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "command.hpp"
#include "model_flags.hpp"
#include "plot.hpp"
#include "terminal.hpp"
#include "train/checkpoint.hpp"
#include "train/files.hpp"
#include "train/trainer.hpp"

namespace kalmanet::apps {
namespace {

namespace fs = std::filesystem;
using train::TrainOptions;

constexpr int kInterrupted = 130;  // as shells report a program that Ctrl-C ended

struct Preset {
  const char* name;
  std::vector<std::pair<const char*, const char*>> flags;
};

// What a preset sets; flags given on the command line win.
const std::vector<Preset>& presets() {
  static const std::vector<Preset> kPresets = {
      // About one million parameters, trained within five minutes on two cores.
      {"demo",
       {{"--layers", "4"},
        {"--width", "128"},
        {"--heads", "4"},
        {"--mlp", "384"},
        {"--learned-ridge", "true"},
        {"--steps", "1200"},
        {"--batch", "8"},
        {"--context", "256"},
        {"--lr", "0.003"},
        {"--warmup", "60"},
        {"--minutes", "4.5"},
        {"--final-eval-tokens", "131072"},
        {"--held-out", "0.05"}}},
      // 0.8 million parameters at a context of 64, for the works of Shakespeare (a megabyte).
      {"shakespeare",
       {{"--layers", "4"},
        {"--width", "128"},
        {"--heads", "4"},
        {"--mlp", "304"},
        {"--learned-ridge", "true"},
        {"--steps", "2000"},
        {"--batch", "12"},
        {"--context", "64"},
        {"--lr", "0.003"},
        {"--warmup", "100"},
        {"--held-out", "0.1"}}},
  };
  return kPresets;
}

struct TrainCommand {
  CLI::App* app = nullptr;
  TrainOptions options;
  ModelFlags model;
  std::string out, preset;
  bool resume = false, plot = false, quiet = false;
  // Flags whose value is one of TrainOptions::to_json's keys.
  std::vector<std::pair<CLI::Option*, std::string>> keys;

  template <class T>
  CLI::Option* option(const std::string& flag, const std::string& key, T& value,
                      const std::string& help, const char* group) {
    CLI::Option* made = app->add_option(flag, value, help)->group(group);
    if constexpr (!std::is_same_v<T, std::string>) made->capture_default_str();
    keys.emplace_back(made, key);
    return made;
  }

  void declare() {
    app->add_option("--text", options.text, "A text file, or a folder of text files");
    app->add_option("--out", out, "The run's folder: checkpoints, metrics")->required();
    app->add_option("--preset", preset, "demo or shakespeare: sets what other flags leave open")
        ->check(CLI::IsMember({"demo", "shakespeare"}));
    app->add_flag("--resume", resume, "Go on from the newest checkpoint in --out");
    app->add_flag("--plot", plot, "Draw the loss curve into <out>/loss.png at the end");
    app->add_flag("--quiet", quiet, "No progress");
    model.declare(*app);
    constexpr const char* kWhat = "Training";
    option("--steps", "steps", options.steps, "Optimizer steps", kWhat);
    option("--batch", "batch", options.batch, "Windows of one pass", kWhat);
    option("--accumulate", "accumulate", options.accumulate, "Passes a step", kWhat);
    option("--context", "context", options.context, "Tokens (bytes) a window", kWhat);
    option("--lr", "lr", options.lr, "Highest learning rate", kWhat);
    option("--final-lr-ratio", "final_lr_ratio", options.final_lr_ratio, "Last rate over highest",
           kWhat);
    option("--warmup", "warmup", options.warmup, "Steps of linear warm-up", kWhat);
    option("--schedule", "schedule", options.schedule, "cosine, one-cycle or constant", kWhat)
        ->capture_default_str();
    option("--weight-decay", "weight_decay", options.weight_decay, "Of the matrices alone", kWhat);
    option("--beta1", "beta1", options.beta1, "AdamW's first decay", kWhat);
    option("--beta2", "beta2", options.beta2, "AdamW's second decay", kWhat);
    option("--clip", "clip", options.clip, "Largest norm of the gradient, 0 for any", kWhat);
    option("--dtype", "dtype", options.dtype, "float32, or bf16 for matrix products in bfloat16",
           kWhat)
        ->capture_default_str();
    option("--seed", "seed", options.seed, "Of the weights and of the windows", kWhat);
    option("--held-out", "held_out", options.held_out, "Share of the text for validation", kWhat);
    keys.emplace_back(
        app->add_flag("--sequential", options.sequential, "Windows in order, not at random")
            ->group(kWhat),
        "sequential");
    constexpr const char* kHow = "Running";
    option("--minutes", "minutes", options.minutes, "Time limit; 0 for none", kHow);
    option("--device", "device", options.device, "cpu, cuda or cuda:N", kHow)
        ->capture_default_str();
    option("--threads", "threads", options.threads, "0 for PyTorch's choice", kHow);
    option("--checkpoint-every", "checkpoint_every", options.checkpoint_every,
           "Steps between checkpoints", kHow);
    option("--keep", "keep_checkpoints", options.keep_checkpoints, "Checkpoints to keep", kHow);
    option("--eval-every", "eval_every", options.eval_every, "Steps between validations", kHow);
    option("--eval-tokens", "eval_tokens", options.eval_tokens, "Bytes of each validation", kHow);
    option("--final-eval-tokens", "final_eval_tokens", options.final_eval_tokens,
           "Bytes of the last validation", kHow);
    option("--log-every", "log_every", options.log_every, "Steps between lines of metrics.jsonl",
           kHow);
    keys.emplace_back(app->add_flag("--gradient-checkpointing", options.gradient_checkpointing,
                                    "Less memory, a third more work")
                          ->group(kHow),
                      "gradient_checkpointing");
  }

  void apply_preset() {
    for (const Preset& known : presets()) {
      if (preset != known.name) continue;
      for (const auto& [flag, value] : known.flags) {
        CLI::Option* target = app->get_option(flag);
        if (target->count() > 0 || model.excludes(*app, flag)) continue;
        target->add_result(value);
        target->run_callback();
      }
    }
  }

  // The options that the run began with, and over them those given now.
  void merge_saved_options() {
    if (!fs::exists(out)) {
      throw std::runtime_error(out + ": no such folder; there is no run to resume");
    }
    const auto found = train::find_checkpoint(out);
    if (!found) {
      throw std::runtime_error(out +
                               " has no checkpoint to resume from; start it without --resume");
    }
    auto merged = train::to_json(found->state.options);
    const auto given = train::to_json(options);
    for (const auto& [flag, key] : keys) {
      if (flag->count() > 0) merged[key] = given.at(key);
    }
    if (app->count("--text") > 0) merged["text"] = options.text;
    options = train::train_options_from_json(merged);
  }

  int run() {
    if (resume) {
      merge_saved_options();
    } else {
      apply_preset();
      if (options.text.empty() && preset == "demo") options.text = python_library();
      if (options.text.empty()) throw UsageError("--text is required: a text file or folder");
    }
    const models::ModelConfig config = resume ? models::ModelConfig{} : model.make(*app);
    ProgressBar bar(options.steps, quiet);
    train::TrainObserver observer;
    if (!resume) bar.line("model: " + describe_model(config));
    observer.note = [&](const std::string& line) { bar.line(line); };
    observer.step = [&](const train::StepReport& report) {
      char text[128];
      std::snprintf(text, sizeof text, "loss %.3f  %s tokens/s  %s left", report.loss,
                    describe_count(report.tokens_per_second).c_str(),
                    describe_seconds(report.seconds_left).c_str());
      bar.update(report.step, text);
    };
    observer.evaluated = [&](int64_t step, const train::Score& score) {
      char text[128];
      std::snprintf(text, sizeof text, "step %lld: validation %.4f nats, %.4f bits per byte",
                    static_cast<long long>(step), score.loss(), score.bits_per_byte());
      bar.line(text);
    };
    const train::TrainSummary summary =
        train::train_model(options, config, out,
                           resume ? train::StartMode::resume : train::StartMode::fresh, observer);
    bar.finish();
    return report(summary);
  }

  int report(const train::TrainSummary& summary) const {
    if (summary.interrupted) {
      std::printf(
          "stopped at step %lld of %lld and saved %s; go on with: kalmanet train --out %s "
          "--resume\n",
          static_cast<long long>(summary.step), static_cast<long long>(options.steps),
          summary.checkpoint.c_str(), out.c_str());
      return kInterrupted;
    }
    std::printf("trained %s parameters for %lld steps in %s (%s tokens/s)\n",
                describe_count(static_cast<double>(summary.parameters)).c_str(),
                static_cast<long long>(summary.step), describe_seconds(summary.seconds).c_str(),
                describe_count(summary.tokens_per_second).c_str());
    std::printf("validation loss %.4f nats, %.4f bits per byte (%lld bytes held out)\n",
                summary.valid.loss(), summary.valid.bits_per_byte(),
                static_cast<long long>(summary.valid.tokens));
    std::printf("model: %s\n", summary.checkpoint.c_str());
    std::fflush(stdout);
    if (plot) {
      const std::string picture = (fs::path(out) / "loss.png").string();
      const std::string failure =
          run_plot("plot_loss.py", {(fs::path(out) / "metrics.jsonl").string(), picture});
      if (failure.empty()) {
        std::printf("loss curve: %s\n", picture.c_str());
      } else {
        std::printf("no loss curve: %s\n", failure.c_str());
      }
    }
    return 0;
  }

  static std::string describe_model(const models::ModelConfig& config) {
    const auto parameters = static_cast<double>(models::num_parameters(config));
    const std::string text = describe_count(parameters) + " parameters, " +
                             models::to_pattern(config.layers) + ", width " +
                             std::to_string(config.hidden_size);
    if (config.num_layers(models::LayerKind::gka) == 0) return text;
    return text + ", " + (config.gka.learned_ridge ? "learned ridge" : "fixed ridge") +
           ", solver " + config.gka.solver_type;
  }

  // Where this machine's Python keeps its own sources: text that every machine with Python has.
  static std::string python_library() {
    std::string path;
    FILE* pipe = popen(
        "python3 -c \"import sysconfig; print(sysconfig.get_paths()['stdlib'])\" 2>/dev/null", "r");
    if (pipe != nullptr) {
      char block[512];
      while (std::fgets(block, sizeof block, pipe) != nullptr) path += block;
      pclose(pipe);
    }
    while (!path.empty() && path.back() == '\n') path.pop_back();
    if (path.empty() || !fs::is_directory(path)) {
      throw std::runtime_error(
          "no Python 3 was found whose sources could be the text; give --text PATH");
    }
    return path;
  }
};

}  // namespace

Command add_train(CLI::App& app) {
  const auto command = std::make_shared<TrainCommand>();
  command->app = app.add_subcommand("train", "Train a byte-level language model on text");
  command->declare();
  command->app->footer(
      "Ctrl-C saves a checkpoint and stops (exit code 130). A run that was stopped, or killed, "
      "goes on bit for "
      "bit\n"
      "with --resume (same number of threads). --minutes brings the learning rate down in time, "
      "and\n"
      "so makes a run depend on the clock.\n"
      "Examples:\n"
      "  kalmanet train --preset demo --out runs/demo\n"
      "  kalmanet train --text shakespeare.txt --preset shakespeare --out runs/s\n"
      "  kalmanet train --text shakespeare.txt --preset shakespeare --no-learned-ridge --out "
      "runs/f\n"
      "  kalmanet train --text src/ --out runs/big --layers 8 --width 256 --heads 8 --steps 20000\n"
      "  kalmanet train --text book.txt --out runs/hybrid --pattern 'GKA-GKA-GKA-*'\n"
      "  kalmanet train --out runs/big --resume");
  return {command->app, [command] { return command->run(); }};
}

}  // namespace kalmanet::apps
