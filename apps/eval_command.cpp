// kalmanet eval: bits per byte and perplexity of a model on a file of any length.
#include <ATen/Parallel.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "command.hpp"
#include "models/device.hpp"
#include "models/io.hpp"
#include "terminal.hpp"
#include "train/checkpoint.hpp"
#include "train/evaluate.hpp"
#include "train/interrupt.hpp"

namespace kalmanet::apps {
namespace {

struct EvalCommand {
  CLI::App* app = nullptr;
  std::string model_path, text, device = "cpu";
  int64_t window = 2048, max_bytes = 0;
  int threads = 0;
  bool json = false, quiet = false;

  void declare() {
    app->add_option("--model", model_path, "A model folder, or a run of kalmanet train")
        ->required();
    app->add_option("--text", text, "The file to predict")->required();
    app->add_option("--window", window, "Bytes read at a time; the state is carried across")
        ->capture_default_str()
        ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
    app->add_option("--max-bytes", max_bytes, "Stop after so many; 0 reads all")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
    app->add_option("--device", device, "cpu, cuda or cuda:N")->capture_default_str();
    app->add_option("--threads", threads, "0 for PyTorch's choice")
        ->capture_default_str()
        ->check(CLI::Range(0, 4096));
    app->add_flag("--json", json, "Print one JSON object");
    app->add_flag("--quiet", quiet, "No progress");
  }

  int run() {
    if (threads > 0) at::set_num_threads(threads);
    const at::Device where = models::device_named(device);
    models::HybridLanguageModel model =
        models::load_model(train::resolve_model_folder(model_path), {.device = where});
    model->eval();
    const train::InterruptGuard guard;
    std::unique_ptr<ProgressBar> bar;
    const auto begin = std::chrono::steady_clock::now();
    const auto seconds_since = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    const train::FileScore result =
        train::score_file(model, text, window, max_bytes, [&](int64_t done, int64_t total) {
          if (!bar) bar = std::make_unique<ProgressBar>(total, quiet);
          const double rate = static_cast<double>(done) / seconds_since();
          bar->update(done, describe_count(rate) + " bytes/s  " +
                                describe_seconds(static_cast<double>(total - done) / rate) +
                                " left");
        });
    bar.reset();
    const double rate = static_cast<double>(result.score.tokens) / seconds_since();
    if (json) {
      const nlohmann::ordered_json line = {{"bytes", result.score.tokens},
                                           {"nats", result.score.nats},
                                           {"bits_per_byte", result.bits_per_byte()},
                                           {"byte_perplexity", result.perplexity()},
                                           {"words", result.words},
                                           {"word_perplexity", result.word_perplexity()},
                                           {"state_resets", result.resets},
                                           {"bytes_per_second", rate},
                                           {"interrupted", result.interrupted}};
      std::printf("%s\n", line.dump().c_str());
      return 0;
    }
    if (result.interrupted) std::printf("stopped early; the figures are of what was read\n");
    std::printf("bits per byte    %.4f  (%.4f nats, %lld bytes)\n", result.bits_per_byte(),
                result.score.loss(), static_cast<long long>(result.score.tokens));
    std::printf("perplexity       %.4f a byte, %.1f a word (%lld words and line ends)\n",
                result.perplexity(), result.word_perplexity(),
                static_cast<long long>(result.words));
    if (model->config().has_attention()) {
      std::printf("attention layers hold %lld positions: started from an empty state %lld times\n",
                  static_cast<long long>(model->config().max_position_embeddings),
                  static_cast<long long>(result.resets));
    }
    std::printf("speed            %s bytes/s\n", describe_count(rate).c_str());
    return 0;
  }
};

}  // namespace

Command add_eval(CLI::App& app) {
  const auto command = std::make_shared<EvalCommand>();
  command->app = app.add_subcommand("eval", "How well a model predicts a file");
  command->declare();
  command->app->footer(
      "The file may have any length: the state is carried from window to window, in constant\n"
      "memory. Models with attention layers start afresh when their positions are used up.\n"
      "Examples:\n"
      "  kalmanet eval --model runs/demo --text book.txt\n"
      "  kalmanet eval --model runs/demo --text book.txt --max-bytes 100000 --json");
  return {command->app, [command] { return command->run(); }};
}

}  // namespace kalmanet::apps
