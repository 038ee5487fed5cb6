// Groups of variants, timed turn by turn.
#include "groups.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>

#include "flops.hpp"
#include "peer.hpp"
#include "sequence_gate.hpp"

namespace kalmanet::bench {
namespace {

// What is measured of a variant.
struct Figures {
  Samples ms, rate, ratio, speed;
  Samples one_ms, one_rate, one_ratio, one_speed;
};

struct Runner {
  const Variant& variant;
  std::shared_ptr<Sequence> sequence;
  Figures figures;
  GkaReport report;

  void run(Pass pass) {
    set_instruction_set(variant.method.isa);
    report = sequence->run(pass, variant.method);
  }
};

int64_t workspace(const Variant& variant, Pass pass) {
  GkaShape shape;
  shape.T = variant.recipe.shape.T;
  shape.H = variant.recipe.shape.H;
  shape.K = variant.recipe.shape.K;
  shape.V = variant.recipe.shape.V;
  shape.dtype = variant.recipe.dtype;
  const auto bytes = [&](GkaOperation operation) {
    return gka_workspace_bytes(operation, shape, variant.method.options());
  };
  const int64_t forward = bytes(GkaOperation::forward);
  return pass == Pass::forward ? forward : std::max(forward, bytes(GkaOperation::backward));
}

void time_rounds(benchmark::State& state, const Settings& settings, const Group& group,
                 MatrixProduct& product, std::vector<Runner>& runners, Samples& openblas) {
  product.rate(settings.threads);  // starts the threads, touches the memory
  for (auto _ : state) {
    const double peer = product.rate(settings.threads);
    openblas.add(peer * 1e-9);
    let_threads_sleep();
    double first = 0.0, total = 0.0;
    for (Runner& runner : runners) {
      const double seconds = seconds_of([&] { runner.run(group.pass); });
      if (first == 0.0) first = seconds;
      total += seconds;
      Figures& f = runner.figures;
      const double flops = counted_flops(runner.variant.recipe, runner.variant.method, group.pass);
      f.ms.add(seconds * 1e3);
      f.rate.add(flops / seconds * 1e-9);
      f.ratio.add(flops / seconds / peer);
      f.speed.add(first / seconds);
    }
    state.SetIterationTime(total);
  }
}

// One thread each, by its processor time: the figures that a busy machine cannot disturb much.
void time_one_thread(const Settings& settings, const Group& group, MatrixProduct& product,
                     std::vector<Runner>& runners, Samples& openblas) {
  set_num_threads(1);
  for (int round = 0; round < (settings.quick ? 1 : group.one_thread_rounds); ++round) {
    const double peer = product.rate_of_one_thread();
    openblas.add(peer * 1e-9);
    double first = 0.0;
    for (Runner& runner : runners) {
      const double seconds = cpu_seconds_of(Cpu::thread, [&] { runner.run(group.pass); });
      if (first == 0.0) first = seconds;
      Figures& f = runner.figures;
      const double flops = counted_flops(runner.variant.recipe, runner.variant.method, group.pass);
      f.one_ms.add(seconds * 1e3);
      f.one_rate.add(flops / seconds * 1e-9);
      f.one_ratio.add(flops / seconds / peer);
      f.one_speed.add(first / seconds);
    }
  }
  set_num_threads(settings.threads);
}

// Google Benchmark sorts counters by name: a digit in front keeps the order of the group.
void write_counters(benchmark::State& state, const Group& group, const Runner& runner,
                    size_t index) {
  const auto set = [&](const char* field, double value) {
    state.counters[std::to_string(index) + " " + runner.variant.name + ":" + field] = value;
  };
  const Figures& f = runner.figures;
  set("ms", f.ms.median());
  set("ms_min", f.ms.min());
  set("ms_max", f.ms.max());
  set("gflops", f.rate.median());
  set("ratio", f.ratio.median());
  set("speed", f.speed.median());
  set("one_ms", f.one_ms.median());
  set("one_gflops", f.one_rate.median());
  set("one_ratio", f.one_ratio.median());
  set("one_speed", f.one_speed.median());
  set("gflop", counted_flops(runner.variant.recipe, runner.variant.method, group.pass) * 1e-9);
  set("mbytes", runner.sequence->bytes(group.pass) * 1e-6);
  set("steps_min", runner.report.min_iterations);
  set("steps_max", runner.report.max_iterations);
  set("factorizations", static_cast<double>(runner.report.factorizations) /
                            static_cast<double>(std::max<int64_t>(1, runner.report.solves)));
  set("workspace", static_cast<double>(workspace(runner.variant, group.pass)));
}

void run_group(benchmark::State& state, const Settings& settings, const Group& group) {
  std::vector<Runner> runners;
  for (const Variant& variant : group.variants) {
    runners.push_back({variant, sequence_of(variant.recipe), {}, {}});
  }
  for (Runner& runner : runners) {
    set_instruction_set(runner.variant.method.isa);
    if (!check(*runner.sequence, group.pass, runner.variant.method, settings)) {
      reset_instruction_set();
      state.SkipWithError("refused to time a wrong answer");
      return;
    }
  }
  MatrixProduct product(settings.quick ? 512 : 2048);
  Samples openblas, one_openblas;
  time_rounds(state, settings, group, product, runners, openblas);
  time_one_thread(settings, group, product, runners, one_openblas);
  for (size_t i = 0; i < runners.size(); ++i) write_counters(state, group, runners[i], i);
  state.counters["openblas_gflops"] = openblas.median();
  state.counters["one_openblas_gflops"] = one_openblas.median();
  state.SetLabel(group.variants.front().recipe.shape.text());
  reset_instruction_set();
}

}  // namespace

double counted_flops(const Recipe& recipe, const Method& method, Pass pass) {
  const Shape& s = recipe.shape;
  const ChunkFlops chunk{kCountedChunk, static_cast<double>(s.K), static_cast<double>(s.V)};
  double solve = chunk.direct(kCountedInnerSteps);  // what `auto` can do with
  if (method.solver == Solver::chebyshev || method.solver == Solver::cg) {
    int num_iter = method.num_iter;
    if (num_iter == kAutoNumIter) {
      // What the smallest ridge ratio needs: with one a token every chunk has one close to it.
      const double smallest = recipe.ridge_low > 0 ? recipe.ridge_low : method.ridge_ratio;
      num_iter = chebyshev_num_iter(smallest, method.tolerance > 0 ? method.tolerance : 1e-5);
    }
    solve = chunk.chebyshev(num_iter);
  }
  const double chunks = static_cast<double>(s.T * s.H) / kCountedChunk;
  const double both = pass == Pass::forward ? 0.0 : chunk.backward(solve);
  return chunks * (chunk.forward(solve) + both);
}

void register_group(const Group& group, const Settings& settings) {
  const std::string name = "sequence/" + group.name + "/" + bench::name(group.pass);
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& state) { run_group(state, settings, group); })
      ->UseManualTime()
      ->Iterations(settings.quick ? 1 : group.rounds)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace kalmanet::bench
