// kalmanet version: what was built, and what it runs on.
#include <ATen/Parallel.h>
#include <torch/version.h>

#include <cstdio>
#include <string>

#include "command.hpp"
#include "kalmanet/backend.hpp"
#include "kalmanet/version.hpp"
#include "models/device.hpp"

namespace kalmanet::apps {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr const char* kSanitizers = ", under AddressSanitizer";
#else
constexpr const char* kSanitizers = "";
#endif

int print_version() {
  std::string available;
  for (const InstructionSet isa : available_instruction_sets()) {
    available += (available.empty() ? "" : " ") + std::string(name(isa));
  }
  std::printf("kalmanet %s\n", version());
  std::printf("build            %s, %s%s\n", KALMANET_BUILD_TYPE, KALMANET_COMPILER, kSanitizers);
  std::printf("instruction set  %s (available: %s)\n", name(instruction_set()), available.c_str());
  for (const std::string& line : models::backend_lines()) {
    std::printf("backend          %s\n", line.c_str());
  }
  std::printf("PyTorch          %s\n", TORCH_VERSION);
  std::printf("threads          %d\n", at::get_num_threads());
  return 0;
}

}  // namespace

Command add_version(CLI::App& app) {
  CLI::App* command = app.add_subcommand("version", "Version, build, instruction set, PyTorch");
  command->footer("Example:\n  kalmanet version");
  return {command, print_version};
}

}  // namespace kalmanet::apps
