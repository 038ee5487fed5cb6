// Finding Python and the plot scripts, and running them (see plot.hpp).
#include "plot.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

extern char** environ;

namespace kalmanet::apps {
namespace {

namespace fs = std::filesystem;

// KALMANET_TOOLS names the folder where the command was moved away from its source tree.
fs::path tools_folder() {
  const char* given = std::getenv("KALMANET_TOOLS");
  return given != nullptr && *given != '\0' ? fs::path(given) : fs::path(KALMANET_TOOLS_DIR);
}

std::string python() {
  const char* given = std::getenv("KALMANET_PYTHON");
  if (given != nullptr && *given != '\0') return given;
  return fs::exists(KALMANET_PYTHON_PATH) ? KALMANET_PYTHON_PATH : "python3";
}

}  // namespace

std::string run_plot(const std::string& script, const std::vector<std::string>& arguments) {
  const fs::path path = tools_folder() / script;
  if (!fs::exists(path)) return path.string() + " is missing (KALMANET_TOOLS names its folder)";
  const std::string program = python();
  std::vector<std::string> words = {program, path.string()};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t child = 0;
  const int failed = posix_spawnp(&child, program.c_str(), nullptr, nullptr, argv.data(), environ);
  if (failed != 0) return "there is no " + program;
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return "waiting for " + program + " failed";
  }
  constexpr int kNoMatplotlib = 3;  // what the scripts exit with then
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return "";
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNoMatplotlib) {
    return program + " has no matplotlib; install it (pip install matplotlib) and run " +
           path.string();
  }
  return path.string() + " failed";
}

}  // namespace kalmanet::apps
