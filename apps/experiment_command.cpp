// kalmanet experiment: what the layer remembers (recall), and how fast it trains (speed).
#include <ATen/Parallel.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "command.hpp"
#include "models/files.hpp"
#include "plot.hpp"
#include "terminal.hpp"
#include "train/files.hpp"
#include "train/interrupt.hpp"
#include "train/recall.hpp"
#include "train/speed.hpp"

namespace kalmanet::apps {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

const char* describe(const std::string& variant) {
  if (variant == "gka") return "GKA, alpha 1, ridge ratio 0.02";
  if (variant == "linear") return "alpha 0: linear attention";
  return "GKA, alpha 1, learned ridge ratio";
}

struct RecallCommand {
  CLI::App* app = nullptr;
  train::RecallOptions options;
  std::vector<std::string> variants = train::recall_variants();
  std::string out = "recall";
  int threads = 0;

  void declare() {
    app->add_option("--out", out, "Folder for recall.json and recall.png")->capture_default_str();
    app->add_option("--variants", variants, "Any of gka, linear, learned")
        ->delimiter(',')
        ->check(CLI::IsMember(train::recall_variants()))
        ->capture_default_str();
    const auto number = [this](const char* flag, int64_t& value, const char* help) {
      app->add_option(flag, value, help)
          ->capture_default_str()
          ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
    };
    number("--steps", options.steps, "Training steps");
    number("--pairs", options.pairs, "Key-value pairs; a sequence is four times as long");
    number("--batch", options.batch, "Sequences a step");
    number("--width", options.width, "Width of the model");
    number("--heads", options.heads, "Heads");
    number("--layers", options.layers, "Layers");
    number("--vocab", options.vocab_size, "Vocabulary; keys are its lower half");
    number("--eval-every", options.eval_every, "Steps between points of the curves");
    app->add_option("--lr", options.lr, "Highest learning rate")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app->add_option("--seed", options.seed, "Of the data and of the weights")
        ->capture_default_str();
    app->add_option("--threads", threads, "0 for PyTorch's choice")
        ->capture_default_str()
        ->check(CLI::Range(0, 4096));
    app->footer(
        "Associative recall: pairs of key and value, then the keys again in random order; at each\n"
        "the model must name the value. Trains the same small model with the ridge memory (gka),\n"
        "with linear attention (linear), and with a ridge ratio learned from the input (learned).\n"
        "Examples:\n"
        "  kalmanet experiment recall\n"
        "  kalmanet experiment recall --variants gka,linear --steps 300 --out quick");
  }

  int run() {
    if (threads > 0) at::set_num_threads(threads);
    train::require_writable(out, int64_t{1} << 20);
    const train::InterruptGuard guard;
    std::vector<train::RecallRun> runs;
    for (const std::string& variant : variants) {
      ProgressBar bar(options.steps);
      bar.line(variant + ": " + describe(variant));
      double accuracy = 0, loss_shown = 0;
      const auto begin = std::chrono::steady_clock::now();
      runs.push_back(train::run_recall(
          options, variant,
          [&](int64_t step, double loss) {
            loss_shown = step == 1 ? loss : 0.9 * loss_shown + 0.1 * loss;
            const double spent =
                std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
            char text[128];
            std::snprintf(text, sizeof text, "loss %.3f  accuracy %.4f  %s left", loss_shown,
                          accuracy,
                          describe_seconds(spent / static_cast<double>(step) *
                                           static_cast<double>(options.steps - step))
                              .c_str());
            bar.update(step, text);
          },
          [&](const train::RecallPoint& point) { accuracy = point.accuracy; }));
      bar.finish();
      if (runs.back().interrupted) break;
    }
    print(runs);
    save(runs);
    return 0;
  }

  void print(const std::vector<train::RecallRun>& runs) const {
    std::printf(
        "recall of %lld pairs in %lld tokens, %lld layers of width %lld, %lld head(s); "
        "chance %.4f\n",
        static_cast<long long>(options.pairs), static_cast<long long>(4 * options.pairs),
        static_cast<long long>(options.layers), static_cast<long long>(options.width),
        static_cast<long long>(options.heads), 2.0 / static_cast<double>(options.vocab_size));
    std::printf("  %-8s  %-34s  %8s  %6s  %-9s  %s\n", "variant", "", "accuracy", "steps", "time",
                "of processors");
    for (const train::RecallRun& run : runs) {
      std::printf("  %-8s  %-34s  %8.4f  %6lld  %-9s  %.1f s%s\n", run.variant.c_str(),
                  describe(run.variant), run.accuracy,
                  static_cast<long long>(run.curve.empty() ? 0 : run.curve.back().step),
                  describe_seconds(run.seconds).c_str(), run.processor_seconds,
                  run.interrupted ? "  (stopped)" : "");
    }
  }

  void save(const std::vector<train::RecallRun>& runs) const {
    ordered_json json = {
        {"experiment", "recall"}, {"vocab_size", options.vocab_size}, {"pairs", options.pairs},
        {"batch", options.batch}, {"steps", options.steps},           {"layers", options.layers},
        {"width", options.width}, {"heads", options.heads},           {"lr", options.lr},
        {"seed", options.seed},   {"runs", ordered_json::array()}};
    for (const train::RecallRun& run : runs) {
      ordered_json curve = ordered_json::array();
      for (const train::RecallPoint& point : run.curve) {
        curve.push_back({{"step", point.step}, {"loss", point.loss}, {"accuracy", point.accuracy}});
      }
      json["runs"].push_back({{"variant", run.variant},
                              {"description", describe(run.variant)},
                              {"accuracy", run.accuracy},
                              {"seconds", run.seconds},
                              {"processor_seconds", run.processor_seconds},
                              {"parameters", run.parameters},
                              {"interrupted", run.interrupted},
                              {"curve", curve}});
    }
    const fs::path data = fs::path(out) / "recall.json", picture = fs::path(out) / "recall.png";
    models::write_file(data, json.dump(2) + "\n");
    std::printf("data: %s\n", data.c_str());
    std::fflush(stdout);
    const std::string failure = run_plot("plot_recall.py", {data.string(), picture.string()});
    if (failure.empty()) {
      std::printf("picture: %s\n", picture.c_str());
    } else {
      std::printf("no picture: %s\n", failure.c_str());
    }
  }
};

struct SpeedCommand {
  CLI::App* app = nullptr;
  std::vector<int64_t> contexts = {64, 2048, 8192};
  int64_t tokens = 768;
  int rounds = 5, threads = 0;
  double seconds = 2;
  bool json = false;

  void declare() {
    app->add_option("--contexts", contexts, "Context lengths")
        ->delimiter(',')
        ->capture_default_str()
        ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
    app->add_option("--tokens", tokens, "Tokens a step where the context is shorter")
        ->capture_default_str()
        ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
    app->add_option("--rounds", rounds, "Turns of each model; the median counts")
        ->capture_default_str()
        ->check(CLI::Range(1, 1000));
    app->add_option("--seconds", seconds, "Length of a turn")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app->add_option("--threads", threads, "0 for PyTorch's choice")
        ->capture_default_str()
        ->check(CLI::Range(0, 4096));
    app->add_flag("--json", json, "Print one JSON object");
    app->footer(
        "Training steps of the shakespeare preset's model (4 layers, width 128, 4 heads) in "
        "turns:\n"
        "with GKA layers as the preset has them (gka: learned ridge ratio, solver direct), with a\n"
        "fixed ratio and 30 Chebyshev steps (gka-fixed), and with attention layers. The last\n"
        "columns count the time of the processors, which other programs do not stretch.\n"
        "Examples:\n"
        "  kalmanet experiment speed\n"
        "  kalmanet experiment speed --contexts 64,512 --rounds 3");
  }

  int run() const {
    if (threads > 0) at::set_num_threads(threads);
    const train::InterruptGuard guard;
    models::ModelConfig gka;
    gka.intermediate_size = 304;
    gka.tie_word_embeddings = true;
    gka.gka.chunk_size = 0;
    const models::ModelConfig fixed = gka;
    gka.gka.learned_ridge = true;
    gka.gka.solver_type = "direct";
    gka.gka.num_iter = 0;
    models::ModelConfig attention = fixed;
    attention.layers.assign(attention.layers.size(), models::LayerKind::attention);
    for (const int64_t context : contexts) {
      attention.max_position_embeddings = std::max(attention.max_position_embeddings, context);
    }
    const std::vector<train::SpeedCase> cases = {
        {"gka", gka}, {"gka-fixed", fixed}, {"attention", attention}};
    ProgressBar bar(static_cast<int64_t>(contexts.size() * cases.size()) * rounds);
    const auto results =
        train::measure_training_speed(cases, contexts, tokens, rounds, seconds,
                                      [&](int64_t done, int64_t) { bar.update(done, "turns"); });
    bar.finish();
    ordered_json list = ordered_json::array();
    for (const train::SpeedResult& r : results) {
      list.push_back({{"model", r.name},
                      {"context", r.context},
                      {"batch", r.batch},
                      {"tokens_per_second", r.tokens_per_second},
                      {"slowest", r.slowest},
                      {"fastest", r.fastest},
                      {"tokens_per_processor_second", r.tokens_per_processor_second}});
    }
    if (json) {
      std::printf(
          "%s\n",
          ordered_json({{"threads", at::get_num_threads()}, {"results", list}}).dump(2).c_str());
      return 0;
    }
    std::printf("training, %d thread(s), median of %d turns\n", at::get_num_threads(), rounds);
    std::printf("  %16s  %-9s  %8s  %-18s  %15s  %12s\n", "context", "layers", "tokens/s",
                "slowest .. fastest", "/ processor s", "of attention");
    for (const train::SpeedResult& r : results) {
      double attention_rate = 0;
      for (const train::SpeedResult& other : results) {
        if (other.context == r.context && other.name == "attention") {
          attention_rate = other.tokens_per_processor_second;
        }
      }
      char context[32], range[32], ratio[32] = "-";
      std::snprintf(context, sizeof context, "%lld x %lld", static_cast<long long>(r.batch),
                    static_cast<long long>(r.context));
      std::snprintf(range, sizeof range, "%.0f .. %.0f", r.slowest, r.fastest);
      if (attention_rate > 0) {
        std::snprintf(ratio, sizeof ratio, "%.2f", r.tokens_per_processor_second / attention_rate);
      }
      std::printf("  %16s  %-9s  %8.0f  %-18s  %15.0f  %12s\n", context, r.name.c_str(),
                  r.tokens_per_second, range, r.tokens_per_processor_second, ratio);
    }
    return 0;
  }
};

}  // namespace

Command add_experiment(CLI::App& app) {
  CLI::App* experiment = app.add_subcommand("experiment", "Shows of what the layer does");
  experiment->require_subcommand(1);
  const auto recall = std::make_shared<RecallCommand>();
  recall->app = experiment->add_subcommand("recall", "What the memory remembers");
  recall->declare();
  const auto speed = std::make_shared<SpeedCommand>();
  speed->app = experiment->add_subcommand("speed", "Training speed beside attention");
  speed->declare();
  experiment->footer(
      "Examples:\n"
      "  kalmanet experiment recall\n"
      "  kalmanet experiment speed");
  return {experiment,
          [recall, speed] { return recall->app->parsed() ? recall->run() : speed->run(); }};
}

}  // namespace kalmanet::apps
