// The kalmanet command: parse, call, print.
#include <c10/util/Exception.h>
#include <malloc.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "command.hpp"

namespace {

using kalmanet::apps::Command;

constexpr int kFailed = 1, kUsage = 2;

void prepare_process() {
  // Writing past a file-size limit then is an error that can be reported, not a signal that kills.
  std::signal(SIGXFSZ, SIG_IGN);
  // Training allocates and frees the same large blocks every step. Taken from the heap and kept
  // there, they cost no page faults after the first step. 32 MiB is the largest threshold that the
  // allocator accepts.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
}

int fail(const std::string& message, int code) {
  std::fflush(stdout);
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return code;
}

int run(CLI::App& app, const std::vector<Command>& commands, int argc, char** argv) {
  std::string used = "kalmanet";
  try {
    app.parse(argc, argv);
    for (const Command& command : commands) {
      if (!command.app->parsed()) continue;
      used += " " + command.app->get_name();
      return command.run();
    }
    std::fputs(app.help().c_str(), stdout);
    return 0;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help
    for (const Command& command : commands) {
      if (command.app->parsed()) used += " " + command.app->get_name();
    }
    return fail(std::string(error.what()) + "; see " + used + " --help", kUsage);
  } catch (const kalmanet::apps::UsageError& error) {
    return fail(std::string(error.what()) + "; see " + used + " --help", kUsage);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), kFailed);
  } catch (const std::bad_alloc&) {
    return fail("out of memory; use a smaller --batch, --context or model", kFailed);
  } catch (const std::exception& error) {
    return fail(error.what(), kFailed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  prepare_process();
  CLI::App app("Gated KalmaNet language models: train them on text, generate, evaluate, inspect.",
               "kalmanet");
  app.footer(
      "Examples:\n"
      "  kalmanet train --preset demo --out runs/demo        a small model in minutes\n"
      "  kalmanet generate --model runs/demo --prompt 'def '\n"
      "  kalmanet eval --model runs/demo --text book.txt\n"
      "  kalmanet info runs/demo\n"
      "  kalmanet experiment recall                          what the memory remembers\n"
      "Each has its own --help. Errors go to standard error; the exit code is 1 for work that\n"
      "failed and 2 for a wrong command line.");
  app.require_subcommand(0, 1);
  const std::vector<Command> commands = {
      kalmanet::apps::add_train(app),      kalmanet::apps::add_generate(app),
      kalmanet::apps::add_eval(app),       kalmanet::apps::add_info(app),
      kalmanet::apps::add_experiment(app), kalmanet::apps::add_version(app)};
  return run(app, commands, argc, argv);
}
