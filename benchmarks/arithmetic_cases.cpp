// Arithmetic::bfloat16 beside standard arithmetic: one thread each, turn by turn, by its processor
// time.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cases.hpp"
#include "gate.hpp"
#include "kalmanet/kalmanet.hpp"
#include "problem.hpp"

namespace kalmanet::bench {
namespace {

// What bfloat16 products may do to o at ridge ratio 0.02 for unit keys (docs/numerics.md, 10).
constexpr double kBfloat16Bound = 2.5e-2;
constexpr int64_t kChecked = 256;  // first tokens, compared with the float64 reference

GkaReport forward(Problem& p, Arithmetic arithmetic, int num_iter) {
  const Shape& s = p.shape;
  GkaOutputs out;
  out.o = dense(p.o.data(), {1, s.T, s.H, s.V});
  out.h_final = dense(p.h.data(), {1, s.H, s.K, s.K});
  out.u_final = dense(p.u.data(), {1, s.H, s.K, s.V});
  GkaOptions options;
  options.num_iter = num_iter;
  options.arithmetic = arithmetic;
  return gka_forward(p.inputs(0, p.shape.T), out, options);
}

bool check_bfloat16(Problem& p, const Settings& settings) {
  const Shape& s = p.shape;
  const int64_t tokens = std::min(s.T, kChecked);
  Gate gate("bfloat16 products " + s.text() + " on " + name(instruction_set()), settings);
  const GkaReport report = forward(p, Arithmetic::bfloat16, kNumIter);
  Floats o(static_cast<size_t>(tokens * s.H * s.V));
  GkaOutputs out;
  out.o = dense(o.data(), {1, tokens, s.H, s.V});
  GkaOptions options;
  options.num_iter = kNumIter;
  options.backend = Backend::reference;
  gka_forward(p.inputs(0, tokens), out, options);
  gate.compare("o", Floats(p.o.begin(), p.o.begin() + std::ssize(o)), o,
               settings.spoil ? 1e-6 : kBfloat16Bound);
  return gate.passed() && report.bfloat16_solves > 0;
}

void run(benchmark::State& state, const Settings& settings, InstructionSet isa,
         const Shape& shape) {
  set_instruction_set(isa);
  set_num_threads(1);
  Problem problem(shape, 7);
  if (!check_bfloat16(problem, settings)) {
    state.SkipWithError("refused to time a wrong answer");
  } else {
    const auto seconds = [&](Arithmetic arithmetic, int num_iter) {
      return cpu_seconds_of(Cpu::thread, [&] { forward(problem, arithmetic, num_iter); });
    };
    // Of the whole forward, and of one step of the iteration: 30 steps less 1.
    Samples standard, bfloat16, ratio, step_ratio;
    for (auto _ : state) {
      const double one = seconds(Arithmetic::standard, kNumIter);
      const double other = seconds(Arithmetic::bfloat16, kNumIter);
      const double one_rest = seconds(Arithmetic::standard, 1);
      const double other_rest = seconds(Arithmetic::bfloat16, 1);
      state.SetIterationTime(other);
      standard.add(1e3 * one);
      bfloat16.add(1e3 * other);
      ratio.add(one / other);
      step_ratio.add((one - one_rest) / (other - other_rest));
    }
    state.counters["standard_ms"] = standard.median();
    state.counters["bfloat16_ms"] = bfloat16.median();
    state.counters["times_as_fast"] = ratio.median();
    state.counters["times_as_fast_min"] = ratio.min();
    state.counters["times_as_fast_max"] = ratio.max();
    state.counters["step_times_as_fast"] = step_ratio.median();
    const bool instructions = forward(problem, Arithmetic::bfloat16, 1).bfloat16_instructions;
    state.SetLabel(instructions ? "the processor's instructions" : "by float32 instructions");
  }
  set_num_threads(settings.threads);
  reset_instruction_set();
}

}  // namespace

void register_arithmetic_cases(const Settings& settings) {
  const std::vector<InstructionSet> sets = available_instruction_sets();
  const auto add = [&](InstructionSet isa, const Shape& shape) {
    const std::string name = "bfloat16/K:" + std::to_string(shape.K) + "/" + kalmanet::name(isa);
    benchmark::RegisterBenchmark(name.c_str(),
                                 [=](benchmark::State& state) { run(state, settings, isa, shape); })
        ->UseManualTime()
        ->Iterations(settings.quick ? 3 : 11)
        ->Unit(benchmark::kMillisecond);
  };
  if (settings.quick) return add(sets.back(), Shape{256, 2, 64, 64});
  for (const InstructionSet isa : sets) add(isa, Shape{4096, 4, 128, 128});
  for (const int64_t K : {64, 256}) add(sets.back(), Shape{1024, 2, K, K});
}

}  // namespace kalmanet::bench
