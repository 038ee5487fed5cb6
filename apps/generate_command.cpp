// kalmanet generate: text from a model, streamed, in constant memory.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>

#include "command.hpp"
#include "models/device.hpp"
#include "models/files.hpp"
#include "models/generate.hpp"
#include "models/io.hpp"
#include "models/tokenizer.hpp"
#include "terminal.hpp"
#include "train/checkpoint.hpp"
#include "train/clock.hpp"
#include "train/files.hpp"
#include "train/interrupt.hpp"

namespace kalmanet::apps {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kBlock = 1000;  // tokens whose speed is reported
constexpr int64_t kMaxPromptBytes = int64_t{1} << 30;

// Resident bytes of this process.
int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

// Speed of the first and last thousand tokens, and memory after the first thousand and at the end.
// Speed by the clock, and by the time of the processors, which other programs do not stretch.
class Statistics {
 public:
  void token() {
    ++count_;
    if (count_ % kBlock != 1) return;
    const Clock::time_point now = Clock::now();
    const double processor_now = train::processor_seconds();
    if (count_ > 1) {
      last_ = kBlock / std::chrono::duration<double>(now - block_begin_).count();
      last_by_processor_ = kBlock / (processor_now - processor_begin_);
    }
    block_begin_ = now;
    processor_begin_ = processor_now;
    if (first_ == 0 && count_ > 1) {
      first_ = last_;
      first_by_processor_ = last_by_processor_;
      memory_ = resident_bytes();
    }
  }
  void print() const {
    if (first_ == 0) {
      std::fprintf(stderr, "stats: %lld tokens are too few; more than %lld are needed\n",
                   static_cast<long long>(count_), static_cast<long long>(kBlock));
      return;
    }
    const int64_t end = resident_bytes();
    std::fprintf(stderr, "stats: memory after %lld tokens %.2f MiB, at the end %.2f MiB (%+.2f)\n",
                 static_cast<long long>(kBlock), mib(memory_), mib(end), mib(end - memory_));
    std::fprintf(stderr,
                 "stats: first thousand %.1f tokens/s, last whole thousand %.1f (%+.1f%%)\n",
                 first_, last_, (last_ / first_ - 1) * 100);
    std::fprintf(stderr,
                 "stats: the same a processor second: %.1f tokens, last whole thousand %.1f "
                 "(%+.1f%%)\n",
                 first_by_processor_, last_by_processor_,
                 (last_by_processor_ / first_by_processor_ - 1) * 100);
  }

 private:
  static double mib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }
  int64_t count_ = 0, memory_ = 0;
  double first_ = 0, last_ = 0, first_by_processor_ = 0, last_by_processor_ = 0;
  Clock::time_point block_begin_;
  double processor_begin_ = 0;
};

struct GenerateCommand {
  CLI::App* app = nullptr;
  std::string model_path, prompt, prompt_file, device = "cpu";
  models::SamplingOptions sampling;
  int threads = 0;
  bool stats = false, no_echo = false;

  void declare() {
    app->add_option("--model", model_path, "A model folder, or a run of kalmanet train")
        ->required();
    auto* text = app->add_option("--prompt", prompt, "Text to continue");
    app->add_option("--prompt-file", prompt_file, "A file with it; - is standard input")
        ->excludes(text);
    app->add_option("--max-new-tokens", sampling.max_new_tokens, "How many bytes to generate")
        ->capture_default_str();
    app->add_option("--temperature", sampling.temperature, "0 always takes the likeliest")
        ->capture_default_str();
    app->add_option("--top-k", sampling.top_k, "Keep the k likeliest; 0 for all")
        ->capture_default_str();
    app->add_option("--top-p", sampling.top_p, "Keep the likeliest that reach p together")
        ->capture_default_str();
    app->add_option("--seed", sampling.seed, "The same seed, the same text")->capture_default_str();
    app->add_option("--device", device, "cpu, cuda or cuda:N")->capture_default_str();
    app->add_option("--threads", threads, "0 for PyTorch's choice")->capture_default_str();
    app->add_flag("--stats", stats, "Memory and speed, first and last thousand tokens");
    app->add_flag("--no-echo", no_echo, "Print the continuation without the prompt");
  }

  std::string read_prompt() const {
    if (app->count("--prompt") > 0) return prompt;
    if (!prompt_file.empty() && prompt_file != "-") {
      return models::read_text(prompt_file, kMaxPromptBytes);
    }
    // Piped text is the prompt; a terminal is not waited for.
    if (prompt_file == "-" || ::isatty(STDIN_FILENO) == 0) {
      return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
    }
    return "";
  }

  int run() {
    if (threads < 0) throw UsageError("--threads must be 0 or more");
    if (threads > 0) at::set_num_threads(threads);
    const models::Sampler checked(sampling);  // says what is wrong before the model is loaded
    const at::Device where = models::device_named(device);
    models::HybridLanguageModel model =
        models::load_model(train::resolve_model_folder(model_path), {.device = where});
    model->eval();
    const models::ByteTokenizer tokenizer;
    const std::string text = read_prompt();
    std::vector<int64_t> tokens = tokenizer.encode(text);
    if (tokens.empty()) tokens.push_back(models::ByteTokenizer::kEndOfText);
    sampling.vocab_limit = tokenizer.vocab_size();
    sampling.eos_token_id = models::ByteTokenizer::kEndOfText;

    const train::InterruptGuard guard;
    models::Utf8Stream stream;
    Statistics statistics;
    const bool terminal = ::isatty(STDOUT_FILENO) == 1;
    const auto show = [&](const std::string& piece) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      if (terminal) std::fflush(stdout);
    };
    if (!no_echo) show(text);
    models::ModelState state;
    const models::GenerationReport report = models::generate(
        model, tokens, sampling,
        [&](int64_t token) {
          if (stats) statistics.token();
          show(stream.push(tokenizer.decode(token)));
          return !train::InterruptGuard::requested();
        },
        &state);
    show(stream.finish());
    show("\n");
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      throw std::runtime_error("cannot write to standard output: is the disk full?");
    }
    const double seconds = std::max(1e-9, report.decode_seconds);
    std::fprintf(stderr,
                 "%lld tokens in %.2f s (%.0f tokens/s), prompt of %zu in %.2f s, state %s%s\n",
                 static_cast<long long>(report.num_tokens), report.decode_seconds,
                 static_cast<double>(report.num_tokens) / seconds, tokens.size(),
                 report.prefill_seconds, train::describe_bytes(state.bytes()).c_str(),
                 report.stop == models::StopReason::end_of_text ? "; end of text" : "");
    if (stats) statistics.print();
    return 0;
  }
};

}  // namespace

Command add_generate(CLI::App& app) {
  const auto command = std::make_shared<GenerateCommand>();
  command->app = app.add_subcommand("generate", "Continue a text");
  command->declare();
  command->app->footer(
      "The prompt comes from --prompt, --prompt-file or standard input; without any, a new text\n"
      "begins.\n"
      "Examples:\n"
      "  kalmanet generate --model runs/demo --prompt 'class Queue:' --temperature 0.8\n"
      "  kalmanet generate --model runs/demo --prompt-file chapter.txt --top-p 0.9 --seed 7\n"
      "  head -c 2000 book.txt | kalmanet generate --model runs/demo --max-new-tokens 500\n"
      "  kalmanet generate --model runs/demo --max-new-tokens 100000 --stats > long.txt");
  return {command->app, [command] { return command->run(); }};
}

}  // namespace kalmanet::apps
