// The choice of `auto` beside what it chooses from: the same problem by Chebyshev's iteration with
// as many steps as the tolerance takes, by direct, and by auto, one thread each, turn by turn, by
// its processor time. A row's ratio is auto's time over the faster of the two; the share of rows
// within 1.2 closes the table. After a change of a kernel, rows beyond it say which constant of
// src/cpu/direct_plan.hpp (DirectCosts) or src/cpu/step_solver.hpp (choose_step_solver) is stale.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cases.hpp"
#include "gate.hpp"
#include "kalmanet/kalmanet.hpp"
#include "problem.hpp"

namespace kalmanet::bench {
namespace {

constexpr double kAllowed = 1.2;  // auto's time over the fastest admissible one
constexpr std::array kSolvers = {Solver::chebyshev, Solver::direct, Solver::automatic};
constexpr double kPerToken = 0;  // a ridge ratio of each token, log-uniform in 0.005..0.05

struct Row {
  double ridge, memory, tolerance;  // memory 0: unlimited
};

class ChoiceProblem {
 public:
  ChoiceProblem(const Shape& shape, const Row& row) : problem_(shape, 11), row_(row) {
    Problem& p = problem_;
    const float decay = row.memory > 0 ? static_cast<float>(1 / row.memory) : 0.0f;
    for (float& g : p.g) g *= 50 * decay;  // from about fifty tokens' memory
    residual_.resize(p.g.size());
    if (row.ridge != kPerToken) return;
    ridge_.resize(p.g.size());
    // alpha is uniform in 0.2..1 and as good a source as any.
    for (size_t i = 0; i < ridge_.size(); ++i) {
      ridge_[i] = 0.005f * std::pow(10.0f, (p.alpha[i] - 0.2f) / 0.8f);
    }
  }

  GkaReport run(Solver solver, bool step, bool want_residual = false) {
    Problem& p = problem_;
    const Shape& s = p.shape;
    GkaInputs in = p.inputs(0, p.shape.T);
    if (!ridge_.empty()) in.ridge_ratio = tokens_of(ridge_, s, 0, 0, s.T);
    GkaOutputs out;
    out.o = dense(p.o.data(), {1, s.T, s.H, s.V});
    out.h_final = dense(p.h.data(), {1, s.H, s.K, s.K});
    out.u_final = dense(p.u.data(), {1, s.H, s.K, s.V});
    if (want_residual) out.residual = dense(residual_.data(), {1, s.T, s.H});
    if (step) {  // from the state that the forward left
      in.h0 = out.h_final;
      in.u0 = out.u_final;
    }
    GkaOptions options;
    options.solver = solver;
    options.num_iter = kAutoNumIter;
    options.tolerance = row_.tolerance;
    if (row_.ridge != kPerToken) options.ridge_ratio = row_.ridge;
    return step ? gka_step(in, out, options) : gka_forward(in, out, options);
  }

  // The largest residual by the certificate, in units of what the tolerance and float32's x allow
  // (docs/numerics.md, section 4).
  double worst(Solver solver, bool step) {
    run(solver, step, true);
    const double smallest = row_.ridge == kPerToken ? 0.005 : row_.ridge;
    const double allowed = 3 * row_.tolerance + 8 * 0x1p-24 / smallest;
    return *std::max_element(residual_.begin(), residual_.end()) / allowed;
  }

 private:
  Problem problem_;
  Row row_;
  Floats ridge_, residual_;
};

std::vector<Row> rows(const Settings& settings, bool step) {
  std::vector<Row> all;
  for (const double ridge : {0.1, 0.02, 0.005, 0.001, kPerToken}) {
    for (const double memory : {8.0, 32.0, 256.0, 0.0}) {
      if (step && memory != 256.0) continue;  // a step's cost does not depend on it
      for (const double tolerance : {1e-5, 1e-3}) all.push_back({ridge, memory, tolerance});
    }
  }
  if (settings.quick) all.resize(2);
  return all;
}

void run(benchmark::State& state, const Settings& settings, int64_t K, bool step) {
  set_num_threads(1);
  Shape shape{step ? 64 : 512, 1, K, K};
  if (K == 256) shape.T /= 2;
  const int rounds = settings.quick ? 1 : 5;
  int within = 0;
  double worst_ratio = 0;
  const std::vector<Row> table = rows(settings, step);
  for (auto _ : state) {
    std::printf("%s K=%lld T=%lld: ms\n%10s %7s %9s  %9s %9s %9s  %6s  %s\n",
                step ? "step" : "forward", static_cast<long long>(K),
                static_cast<long long>(shape.T), "ridge", "memory", "tolerance", "chebyshev",
                "direct", "auto", "ratio", "auto: direct solves");
    for (const Row& row : table) {
      ChoiceProblem problem(shape, row);
      // The step starts where a forward has filled the state.
      if (step) problem.run(Solver::chebyshev, false);
      bool right = true;
      for (const Solver solver : kSolvers) {
        const double worst = settings.spoil ? 2 : problem.worst(solver, step);
        if (worst <= 1) continue;
        Gate gate("choice " + shape.text(), settings);
        gate.fail(std::string(name(solver)) + ": the largest residual is " + std::to_string(worst) +
                  " times what is allowed");
        right = gate.passed();
      }
      if (!right) {
        state.SkipWithError("refused to time a wrong answer");
        break;
      }
      std::array<Samples, 3> times;
      GkaReport report;
      for (int round = 0; round < rounds; ++round) {
        for (size_t i = 0; i < kSolvers.size(); ++i) {
          times[i].add(
              1e3 * cpu_seconds_of(Cpu::thread, [&] { report = problem.run(kSolvers[i], step); }));
        }
      }
      const double fastest = std::min(times[0].median(), times[1].median());
      const double ratio = times[2].median() / fastest;
      within += ratio <= kAllowed;
      worst_ratio = std::max(worst_ratio, ratio);
      const std::string ridge = row.ridge == kPerToken ? ".005..05" : std::to_string(row.ridge);
      std::printf("%10.8s %7g %9g  %9.3f %9.3f %9.3f  %6.2f%s %lld of %lld\n", ridge.c_str(),
                  row.memory, row.tolerance, times[0].median(), times[1].median(),
                  times[2].median(), ratio, ratio > kAllowed ? "*" : " ",
                  static_cast<long long>(report.direct_solves),
                  static_cast<long long>(report.solves));
    }
    state.SetIterationTime(1e-3);  // the table is the result
  }
  state.counters["rows"] = static_cast<double>(table.size());
  state.counters["within"] = within;
  state.counters["share_within"] = within / static_cast<double>(table.size());
  state.counters["worst_ratio"] = worst_ratio;
  std::printf("within %.1f times the fastest: %d of %zu (%.0f%%)\n", kAllowed, within, table.size(),
              100.0 * within / static_cast<double>(table.size()));
  set_num_threads(settings.threads);
}

}  // namespace

void register_choice_cases(const Settings& settings) {
  for (const bool step : {false, true}) {
    for (const int64_t K : {32, 64, 128, 256}) {
      if (settings.quick && K != 32) continue;
      const std::string name =
          std::string("choice/") + (step ? "step" : "forward") + "/K:" + std::to_string(K);
      benchmark::RegisterBenchmark(name.c_str(),
                                   [=](benchmark::State& state) { run(state, settings, K, step); })
          ->UseManualTime()
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace kalmanet::bench
