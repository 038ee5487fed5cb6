// What a subcommand is to main(): options declared on a CLI::App, and what to do with them.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <stdexcept>

namespace kalmanet::apps {

// A wrong command line (exit code 2), as against work that failed (exit code 1).
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Each declares its subcommand on `app`; the returned function runs it after parsing and returns
// the exit code.
struct Command {
  CLI::App* app;
  std::function<int()> run;
};

Command add_train(CLI::App& app);
Command add_generate(CLI::App& app);
Command add_eval(CLI::App& app);
Command add_info(CLI::App& app);
Command add_experiment(CLI::App& app);
Command add_version(CLI::App& app);

}  // namespace kalmanet::apps
