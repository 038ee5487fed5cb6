// Sequences from 1k to 128k tokens: what a token costs in time and in memory.
#include <benchmark/benchmark.h>
#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cases.hpp"
#include "kalmanet/kalmanet.hpp"
#include "sequence.hpp"
#include "sequence_gate.hpp"

namespace kalmanet::bench {
namespace {

constexpr Solver kSolvers[] = {Solver::chebyshev, Solver::direct};
// The reference needs a second for some ten thousand tokens; longer sequences are the same code on
// more chunks.
constexpr int64_t kLongestChecked = 8192;

Method method(Solver solver) {
  Method m;
  m.solver = solver;
  m.isa = available_instruction_sets().back();
  return m;
}

struct Length {
  std::shared_ptr<Sequence> sequence;
  Samples micros[2], cpu_micros[2];  // a token, of the two solvers
};

// Every round times each length with each solver, the short ones as often as it takes to work for
// about as long as 16k tokens do.
void run_lengths(benchmark::State& state, const Settings& settings, Pass pass) {
  const int64_t H = settings.quick ? 1 : 2;
  const int64_t last = settings.quick ? 2048 : pass == Pass::forward ? 131072 : 65536;
  // The gradients' case takes every second length: it is there for its memory's sake, too.
  const int64_t growth = pass == Pass::forward ? 2 : 4;
  std::vector<Length> lengths;
  for (int64_t T = 1024; T <= last; T *= growth) {
    lengths.push_back({sequence_of({{T, H, 128, 128}, DType::float32, 256}), {}, {}});
    for (const Solver solver : kSolvers) {
      const Method m = method(solver);
      if (T <= kLongestChecked && !check(*lengths.back().sequence, pass, m, settings)) {
        state.SkipWithError("refused to time a wrong answer");
        return;
      }
    }
    lengths.back().sequence->run(pass, method(Solver::direct));  // touches all its memory
  }
  for (auto _ : state) {
    double total = 0.0;
    for (Length& length : lengths) {
      const int64_t T = length.sequence->recipe.shape.T;
      const int64_t calls = std::max<int64_t>(1, (settings.quick ? 1024 : 16384) / T);
      for (size_t i = 0; i < std::size(kSolvers); ++i) {
        const Method m = method(kSolvers[i]);
        double cpu_seconds = 0.0;
        const double seconds = seconds_of([&] {
          cpu_seconds = cpu_seconds_of(Cpu::process, [&] {
            for (int64_t call = 0; call < calls; ++call) length.sequence->run(pass, m);
          });
        });
        total += seconds;
        const double micro = 1e6 / static_cast<double>(calls * T);
        length.micros[i].add(seconds * micro);
        length.cpu_micros[i].add(cpu_seconds * micro);
      }
    }
    state.SetIterationTime(total);
  }
  for (const Length& length : lengths) {
    const std::string T = std::to_string(length.sequence->recipe.shape.T);
    for (size_t i = 0; i < std::size(kSolvers); ++i) {
      const auto set = [&](const char* field, double value) {
        state.counters[method(kSolvers[i]).text() + ":" + field + "_T" + T] = value;
      };
      set("us", length.micros[i].median());
      set("us_min", length.micros[i].min());
      set("us_max", length.micros[i].max());
      set("cpu_us", length.cpu_micros[i].median());
    }
  }
  state.SetLabel("H=" + std::to_string(H) + " K=128 V=128");
}

// A line of /proc/self/status, in bytes.
double status_bytes(const std::string& name) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(name + ":", 0) != 0) continue;
    std::istringstream rest(line.substr(name.size() + 1));
    double kilobytes = 0;
    rest >> kilobytes;
    return kilobytes * 1024;
  }
  throw std::runtime_error("/proc/self/status has no line " + name);
}

// How far the resident memory rises while `work` runs, on a thread of its own: what threads keep
// from one call to the next is given back with it.
template <class Work>
double resident_growth(Work&& work) {
  double growth = 0;
  std::thread([&] {
    malloc_trim(0);
    std::ofstream("/proc/self/clear_refs") << 5;  // the peak starts from here
    const double before = status_bytes("VmRSS");
    work();
    growth = std::max(0.0, status_bytes("VmHWM") - before);
  }).join();
  return growth;
}

void run_memory(benchmark::State& state, const Settings& settings, Pass pass) {
  const int64_t last = settings.quick ? 4096 : 65536;
  const std::unique_ptr<Executor> one = make_executor(1);
  double seconds = 0.0;
  for (auto _ : state) {
    for (int64_t T = 1024; T <= last; T *= 4) {
      Sequence sequence({{T, 1, 128, 128}, DType::float32, 256});
      for (const Solver solver : kSolvers) {
        Method m = method(solver);
        m.executor = one.get();
        sequence.run(pass, m);  // touches the tensors
        double growth = 0;
        seconds += seconds_of([&] { growth = resident_growth([&] { sequence.run(pass, m); }); });
        GkaShape shape;
        shape.T = T;
        shape.K = shape.V = 128;
        double asked =
            static_cast<double>(gka_workspace_bytes(GkaOperation::forward, shape, m.options()));
        if (pass == Pass::forward_backward) {
          const int64_t backward = gka_workspace_bytes(GkaOperation::backward, shape, m.options());
          asked = std::max(asked, static_cast<double>(backward));
        }
        const std::string suffix = "_T" + std::to_string(T);
        state.counters[m.text() + ":tensors" + suffix] = sequence.held_bytes();
        state.counters[m.text() + ":workspace" + suffix] = asked;
        state.counters[m.text() + ":resident" + suffix] = growth;
      }
    }
    state.SetIterationTime(seconds);
  }
  state.SetLabel("H=1 K=128 V=128");
}

}  // namespace

void register_length_cases(const Settings& settings) {
  for (const Pass pass : {Pass::forward, Pass::forward_backward}) {
    benchmark::RegisterBenchmark(
        (std::string("lengths/") + name(pass)).c_str(),
        [=](benchmark::State& state) { run_lengths(state, settings, pass); })
        ->UseManualTime()
        ->Iterations(settings.quick ? 1 : 4)
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark(
        (std::string("memory/") + name(pass)).c_str(),
        [=](benchmark::State& state) { run_memory(state, settings, pass); })
        ->UseManualTime()
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
  }
}

}  // namespace kalmanet::bench
