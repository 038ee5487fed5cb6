// Whole sequences: rates beside OpenBLAS's matrix product, and the time a token takes as sequences
// grow.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cases.hpp"
#include "flops.hpp"
#include "gate.hpp"
#include "kalmanet/kalmanet.hpp"
#include "peer.hpp"
#include "problem.hpp"

namespace kalmanet::bench {
namespace {

constexpr uint64_t kSeed = 20261123;

// One round times the matrix product, then ours, so that whatever else the machine does hits both;
// the ratio is taken a round, and the median of the rounds counts.
template <class Work>
void beside_matrix_product(benchmark::State& state, int64_t size, int threads, double flops,
                           Work&& work) {
  MatrixProduct product(size);
  product.rate(threads);  // starts the threads, touches the memory
  Samples ours, peer, ratio, milliseconds;
  for (auto _ : state) {
    const double before = product.rate(threads);
    let_threads_sleep();
    const double seconds = seconds_of(work);
    state.SetIterationTime(seconds);
    const double rate = flops / seconds;
    ours.add(rate * 1e-9);
    peer.add(before * 1e-9);
    ratio.add(rate / before);
    milliseconds.add(seconds * 1e3);
  }
  // One thread each, by processor time: the ratio that a busy machine cannot disturb much.
  set_num_threads(1);
  Samples one_ours, one_peer, one_ratio;
  for (int round = 0; round < 3; ++round) {
    const double before = product.rate_of_one_thread();
    const double rate = flops / cpu_seconds_of(Cpu::thread, work);
    one_ours.add(rate * 1e-9);
    one_peer.add(before * 1e-9);
    one_ratio.add(rate / before);
  }
  set_num_threads(threads);
  state.counters["one_thread_gflops"] = one_ours.median();
  state.counters["one_thread_openblas_gflops"] = one_peer.median();
  state.counters["one_thread_ratio"] = one_ratio.median();
  state.counters["ms"] = milliseconds.median();
  state.counters["ms_min"] = milliseconds.min();
  state.counters["gflops"] = ours.median();
  state.counters["gflops_max"] = ours.max();
  state.counters["openblas_gflops"] = peer.median();
  state.counters["openblas_gflops_max"] = peer.max();
  state.counters["ratio"] = ratio.median();
  state.counters["ratio_min"] = ratio.min();
  state.counters["ratio_max"] = ratio.max();
  state.counters["ratio_of_best"] = ours.max() / peer.max();
}

enum class Pass { forward, forward_backward };

void run_pass(benchmark::State& state, const Settings& settings, Pass pass, InstructionSet isa,
              const Shape& shape) {
  set_instruction_set(isa);
  Problem problem(shape, kSeed);
  const bool both = pass == Pass::forward_backward;
  const bool right =
      both ? check_forward_backward(problem, settings) : check_forward(problem, settings);
  if (!right) {
    state.SkipWithError("refused to time a wrong answer");
    return;
  }
  double flops = forward_flops(shape.T, shape.H, shape.K, shape.V, kNumIter);
  if (both) flops += backward_flops(shape.T, shape.H, shape.K, shape.V, kNumIter);
  beside_matrix_product(state, settings.quick ? 512 : 2048, settings.threads, flops, [&] {
    both ? problem.forward_backward() : static_cast<void>(problem.forward());
  });
  state.SetLabel(shape.text());
  reset_instruction_set();
}

template <class Figure>
double spread(const std::vector<Samples>& lengths, Figure&& figure) {
  double fastest = figure(lengths[0]), slowest = fastest;
  for (const Samples& samples : lengths) {
    fastest = std::min(fastest, figure(samples));
    slowest = std::max(slowest, figure(samples));
  }
  return slowest / fastest - 1.0;
}

// Lengths from 1k to 128k; every round times each of them, the short ones as often as it takes to
// work for about as long as 16k tokens do.
void run_time_per_token(benchmark::State& state, const Settings& settings) {
  const int64_t first = 1024, last = settings.quick ? 4096 : 131072;
  const int64_t H = settings.quick ? 1 : 2;
  std::vector<std::unique_ptr<Problem>> problems;
  for (int64_t T = first; T <= last; T *= 2) {
    problems.push_back(std::make_unique<Problem>(Shape{T, H, 128, 128}, kSeed));
    if (T <= 4096 && !check_forward(*problems.back(), settings)) {
      state.SkipWithError("refused to time a wrong answer");
      return;
    }
    problems.back()->forward();  // touches all its memory
  }
  std::vector<Samples> micros(problems.size()), cpu_micros(problems.size());
  for (auto _ : state) {
    double total = 0.0;
    for (size_t i = 0; i < problems.size(); ++i) {
      Problem& problem = *problems[i];
      const int64_t calls = std::max<int64_t>(1, (settings.quick ? 1024 : 16384) / problem.shape.T);
      double cpu_seconds = 0.0;
      const double seconds = seconds_of([&] {
        cpu_seconds = cpu_seconds_of(Cpu::process, [&] {
          for (int64_t call = 0; call < calls; ++call) problem.forward();
        });
      });
      total += seconds;
      const double micro = 1e6 / static_cast<double>(calls * problem.shape.T);
      micros[i].add(seconds * micro);
      cpu_micros[i].add(cpu_seconds * micro);
    }
    state.SetIterationTime(total);
  }
  for (size_t i = 0; i < problems.size(); ++i) {
    const std::string T = std::to_string(problems[i]->shape.T);
    state.counters["us_T" + T] = micros[i].median();
    state.counters["us_min_T" + T] = micros[i].min();
    state.counters["us_max_T" + T] = micros[i].max();
    state.counters["cpu_us_T" + T] = cpu_micros[i].median();
  }
  // How much longer a token takes at the slowest length than at the fastest.
  state.counters["spread"] = spread(micros, [](const Samples& s) { return s.median(); });
  state.counters["spread_of_best"] = spread(micros, [](const Samples& s) { return s.min(); });
  state.counters["cpu_spread"] = spread(cpu_micros, [](const Samples& s) { return s.median(); });
  state.SetLabel("H=" + std::to_string(H) + " K=128 V=128");
}

}  // namespace

void register_sequence_cases(const Settings& settings) {
  const Shape shape = settings.quick ? Shape{512, 2, 64, 64} : Shape{4096, 4, 128, 128};
  const std::vector<InstructionSet> sets = available_instruction_sets();
  for (size_t i = sets.size(); i-- > 0;) {  // fastest first
    const InstructionSet isa = sets[i];
    for (const Pass pass : {Pass::forward, Pass::forward_backward}) {
      const std::string name = pass == Pass::forward ? "forward/" : "forward_backward/";
      const int rounds = settings.quick ? 2 : (isa == sets.back() ? 11 : 3);
      benchmark::RegisterBenchmark(
          (name + kalmanet::name(isa)).c_str(),
          [=](benchmark::State& state) { run_pass(state, settings, pass, isa, shape); })
          ->UseManualTime()
          ->Iterations(rounds)
          ->Unit(benchmark::kMillisecond);
    }
  }
  benchmark::RegisterBenchmark(
      "time_per_token", [=](benchmark::State& state) { run_time_per_token(state, settings); })
      ->UseManualTime()
      ->Iterations(settings.quick ? 1 : 5)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace kalmanet::bench
