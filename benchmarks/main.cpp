// kalmanet_bench: the CPU kernels beside OpenBLAS, in one process, turn by turn. Every case passes
// the correctness gate of gate.hpp before it is timed.
//
//   kalmanet_bench [--quick] [--threads=2] [Google Benchmark's flags, e.g.
//   --benchmark_filter=decode]
//   kalmanet_bench --peer    only OpenBLAS's rate: GFLOP/s of one thread, and its kernels' name
#include <benchmark/benchmark.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>

#include "cases.hpp"
#include "gate.hpp"
#include "kalmanet/kalmanet.hpp"
#include "peer.hpp"

namespace kalmanet::bench {
namespace {

bool parse(int argc, char** argv, Settings& settings) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    constexpr std::string_view kThreads = "--threads=";
    if (flag == "--quick") {
      settings.quick = true;
    } else if (flag == "--spoil") {
      settings.spoil = true;
    } else if (flag == "--peer") {
      settings.peer_only = true;
    } else if (flag.starts_with(kThreads)) {
      const std::string_view number = flag.substr(kThreads.size());
      const char* end = number.data() + number.size();
      const auto [stop, error] = std::from_chars(number.data(), end, settings.threads);
      if (error != std::errc() || stop != end || settings.threads < 1) {
        std::fprintf(stderr, "--threads is \"%s\"; it takes a number >= 1\n",
                     std::string(number).c_str());
        return false;
      }
    } else {
      std::fprintf(
          stderr,
          "unknown flag %s; there are --quick, --threads=N, --peer (OpenBLAS's rate alone), "
          "--spoil (the gates must refuse) and Google Benchmark's --benchmark_...\n",
          argv[i]);
      return false;
    }
  }
  return true;
}

// For benchmarks/run, which tries OpenBLAS's kernels one after the other.
void print_peer() {
  MatrixProduct product(2048);
  double best = 0;
  for (int round = 0; round < 3; ++round) best = std::max(best, product.rate_of_one_thread());
  std::printf("%.1f %s\n", best * 1e-9, openblas_core().c_str());
}

int run(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  Settings settings;
  if (!parse(argc, argv, settings)) return 2;
  if (settings.peer_only) {
    print_peer();
    return 0;
  }
  set_num_threads(settings.threads);
  benchmark::AddCustomContext("openblas_core", openblas_core());
  benchmark::AddCustomContext("openblas_build", openblas_build());
  benchmark::AddCustomContext("instruction_set", name(instruction_set()));
  benchmark::AddCustomContext("threads", std::to_string(settings.threads));
  benchmark::AddCustomContext("copy_gbytes", std::to_string(memory_copy_rate() * 1e-9));
  register_sequence_cases(settings);
  register_length_cases(settings);
  register_decode_cases(settings);
  register_decode_states_cases(settings);
  register_arithmetic_cases(settings);
  register_choice_cases(settings);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  if (failed_gates() > 0) {
    std::fprintf(stderr, "kalmanet_bench: %d case(s) gave a wrong answer and were not timed\n",
                 failed_gates());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace kalmanet::bench

int main(int argc, char** argv) {
  try {
    return kalmanet::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kalmanet_bench: %s\n", error.what());
    return 1;
  }
}
