// Decode: one token of one sequence on one thread, beside the matrix-vector products by H that it
// cannot do without: 30 iterations and one for the read-out.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cases.hpp"
#include "gate.hpp"
#include "kalmanet/kalmanet.hpp"
#include "peer.hpp"
#include "problem.hpp"

namespace kalmanet::bench {
namespace {

// Of the sequence, decoded again and again: enough different keys to fill every direction of the
// widest H, for a state of few keys is solved in float64 and says nothing of a long sequence.
constexpr int64_t kTokens = 512;
constexpr int64_t kChecked = 64;  // its first tokens, compared with the reference
constexpr int64_t kRound = 64;    // tokens timed at a time
constexpr int64_t kFewKeys = 64;  // of the other state, whose price is measured beside it
constexpr int kProducts = kNumIter + 1;

GkaReport step(Problem& p, int64_t t) {
  const Shape& s = p.shape;
  GkaInputs in = p.inputs(t, t + 1);
  GkaOutputs out;
  out.o = dense(p.o.data() + t * s.H * s.V, {1, 1, s.H, s.V});
  out.h_final = dense(p.h.data(), {1, s.H, s.K, s.K});
  out.u_final = dense(p.u.data(), {1, s.H, s.K, s.V});
  in.h0 = out.h_final;
  in.u0 = out.u_final;
  GkaOptions options;
  options.num_iter = kNumIter;
  return gka_step(in, out, options);
}

void empty_states(Problem& p) {
  std::fill(p.h.begin(), p.h.end(), 0.0f);
  std::fill(p.u.begin(), p.u.end(), 0.0f);
}

// The first tokens one by one from empty states, against the reference; then the others.
bool check_decode(Problem& p, const Settings& settings) {
  const Shape& s = p.shape;
  Gate gate("decode " + s.text() + " on " + name(instruction_set()), settings);
  empty_states(p);
  for (int64_t t = 0; t < kChecked; ++t) step(p, t);
  Floats o(static_cast<size_t>(kChecked * s.H * s.V)), h(p.h.size()), u(p.u.size());
  GkaOutputs out;
  out.o = dense(o.data(), {1, kChecked, s.H, s.V});
  out.h_final = dense(h.data(), {1, s.H, s.K, s.K});
  out.u_final = dense(u.data(), {1, s.H, s.K, s.V});
  GkaOptions options;
  options.num_iter = kNumIter;
  options.backend = Backend::reference;
  gka_forward(p.inputs(0, kChecked), out, options);
  gate.compare("o", Floats(p.o.begin(), p.o.begin() + std::ssize(o)), o, kOutputBound);
  gate.compare("state H", p.h, h, kOutputBound);
  gate.compare("state U", p.u, u, kOutputBound);
  for (int64_t t = kChecked; t < s.T; ++t) step(p, t);
  return gate.passed();
}

void run_decode(benchmark::State& state, const Settings& settings, InstructionSet isa, int64_t H,
                int64_t K) {
  set_instruction_set(isa);
  set_num_threads(1);
  Problem problem(Shape{kTokens, H, K, K}, 7);
  if (!check_decode(problem, settings)) {
    state.SkipWithError("refused to time a wrong answer");
  } else {
    VectorProducts products(H, K, kProducts);
    products.run(false);
    products.run(true);
    Problem few(Shape{kFewKeys, H, K, K}, 7);
    empty_states(few);
    for (int64_t t = 0; t < kFewKeys; ++t) step(few, t);
    const double heads = static_cast<double>(kRound * H);
    int64_t next = 0;
    // One thread each, by its processor time. A round: 64 times the products of all heads, then 64
    // tokens of ours, then 64 with the state of few keys; each about as long, and short enough that
    // many rounds see the same machine.
    Samples ours, peer, ratio, few_keys;
    for (auto _ : state) {
      double best = std::numeric_limits<double>::infinity();
      for (const bool transposed : {false, true}) {  // the peer may choose its direction
        best = std::min(best, cpu_seconds_of(Cpu::thread, [&] {
                          for (int64_t t = 0; t < kRound; ++t) products.run(transposed);
                        }));
      }
      const double seconds = cpu_seconds_of(Cpu::thread, [&] {
        for (int64_t t = 0; t < kRound; ++t) step(problem, next + t);
      });
      next = (next + kRound) % kTokens;
      const double seconds_of_few = cpu_seconds_of(Cpu::thread, [&] {
        for (int64_t t = 0; t < kRound; ++t) step(few, t % kFewKeys);
      });
      few_keys.add(seconds_of_few / seconds);
      state.SetIterationTime(seconds);
      ours.add(1e6 * seconds / heads);
      peer.add(1e6 * best / heads);
      ratio.add(seconds / best);
    }
    state.counters["us_per_head"] = ours.median();
    state.counters["us_per_head_min"] = ours.min();
    state.counters["openblas_us"] = peer.median();
    state.counters["openblas_us_min"] = peer.min();
    state.counters["ratio"] = ratio.median();
    state.counters["ratio_min"] = ratio.min();
    state.counters["ratio_max"] = ratio.max();
    state.counters["ratio_of_best"] = ours.min() / peer.min();
    state.counters["state_keys"] = static_cast<double>(kTokens);
    state.counters["few_keys"] = static_cast<double>(kFewKeys);
    state.counters["few_keys_over_ours"] = few_keys.median();
    state.SetLabel("H=" + std::to_string(H));
  }
  set_num_threads(settings.threads);
  reset_instruction_set();
}

}  // namespace

void register_decode_cases(const Settings& settings) {
  const std::vector<InstructionSet> sets = available_instruction_sets();
  const auto add = [&](InstructionSet isa, int64_t H, int64_t K) {
    const std::string name =
        "decode/K:" + std::to_string(K) + "/H:" + std::to_string(H) + "/" + kalmanet::name(isa);
    benchmark::RegisterBenchmark(
        name.c_str(), [=](benchmark::State& state) { run_decode(state, settings, isa, H, K); })
        ->UseManualTime()
        ->Iterations(settings.quick ? 3 : 41)
        ->Unit(benchmark::kMillisecond);
  };
  if (settings.quick) return add(sets.back(), 2, 64);
  for (const int64_t K : {64, 128, 256}) add(sets.back(), 4, K);
  add(sets.back(), 16, 128);
  for (size_t i = sets.size() - 1; i-- > 0;) add(sets[i], 4, 128);
}

}  // namespace kalmanet::bench
