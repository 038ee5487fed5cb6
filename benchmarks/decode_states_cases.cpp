// Decode of many sequences whose states exceed the last-level cache: what a token costs beside a
// memory copy, both counted in bytes read and written. A token needs each state read once and
// written once.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cases.hpp"
#include "gate.hpp"
#include "kalmanet/kalmanet.hpp"
#include "problem.hpp"

namespace kalmanet::bench {
namespace {

// Tokens decoded again and again; the first of them are compared with the reference in a few heads.
constexpr int64_t kTokens = 128;
constexpr int64_t kChecked = 48;
constexpr int64_t kCheckedHeads = 3;

// What is timed. Without the solver: alpha 0, as gated linear attention has it, and one step of an
// iteration whose result nobody reads, so that both states are updated and U is read out.
struct Variant {
  const char* name;
  Solver solver;
  int num_iter;
  bool mix;  // alpha as the problem has it; else 0
};
constexpr Variant kVariants[] = {
    {"update", Solver::chebyshev, 1, false},
    {"chebyshev30", Solver::chebyshev, kNumIter, true},
    {"direct", Solver::direct, kNumIter, true},
};

class Decoder {
 public:
  Decoder(int64_t heads, int64_t K) : p_(Shape{kTokens, heads, K, K}, 11), zeros_(p_.alpha.size()) {
    clear();
  }

  double state_bytes() const { return 4.0 * static_cast<double>(p_.h.size() + p_.u.size()); }
  void clear() {
    std::fill(p_.h.begin(), p_.h.end(), 0.0f);
    std::fill(p_.u.begin(), p_.u.end(), 0.0f);
  }
  void step(const Variant& variant, int64_t t) {
    const Shape& s = p_.shape;
    GkaInputs in = p_.inputs(t, t + 1);
    if (!variant.mix) in.alpha = tokens_of(zeros_, s, 0, t, t + 1);
    GkaOutputs out;
    out.o = dense(p_.o.data() + t * s.H * s.V, {1, 1, s.H, s.V});
    out.h_final = dense(p_.h.data(), {1, s.H, s.K, s.K});
    out.u_final = dense(p_.u.data(), {1, s.H, s.K, s.V});
    in.h0 = out.h_final;
    in.u0 = out.u_final;
    GkaOptions options;
    options.solver = variant.solver;
    options.num_iter = variant.num_iter;
    gka_step(in, out, options);
  }

  // The first tokens from empty states, the last heads of them against the reference.
  bool right(const Variant& variant, const Settings& settings) {
    const Shape& s = p_.shape;
    Gate gate("decode of many states, " + std::string(variant.name) + ", " + s.text(), settings);
    clear();
    for (int64_t t = 0; t < kChecked; ++t) step(variant, t);
    const int64_t heads = std::min(kCheckedHeads, s.H), first = s.H - heads;
    GkaInputs in = p_.inputs(0, kChecked);
    if (!variant.mix) in.alpha = tokens_of(zeros_, s, 0, 0, kChecked);
    for (ConstView* view : {&in.q, &in.k, &in.v, &in.g, &in.gk, &in.alpha, &in.beta}) {
      view->data = static_cast<const float*>(view->data) + first * view->stride[2];
      view->size[2] = heads;
    }
    Floats o(static_cast<size_t>(kChecked * heads * s.V)), got;
    Floats h(static_cast<size_t>(heads * s.K * s.K)), u(static_cast<size_t>(heads * s.K * s.V));
    GkaOutputs out;
    out.o = dense(o.data(), {1, kChecked, heads, s.V});
    out.h_final = dense(h.data(), {1, heads, s.K, s.K});
    out.u_final = dense(u.data(), {1, heads, s.K, s.V});
    GkaOptions options;
    options.solver = variant.solver;
    options.num_iter = variant.num_iter;
    options.backend = Backend::reference;
    gka_forward(in, out, options);
    for (int64_t t = 0; t < kChecked; ++t) {
      const auto from = p_.o.begin() + (t * s.H + first) * s.V;
      got.insert(got.end(), from, from + heads * s.V);
    }
    // Direct against a Cholesky solve in float64: DESIGN's bound for it.
    gate.compare("o", got, o, variant.solver == Solver::direct ? 2e-5 : kOutputBound);
    gate.compare("state H", Floats(p_.h.end() - std::ssize(h), p_.h.end()), h, kOutputBound);
    gate.compare("state U", Floats(p_.u.end() - std::ssize(u), p_.u.end()), u, kOutputBound);
    return gate.passed();
  }

 private:
  Problem p_;
  Floats zeros_;
};

// memcpy of `bytes`, spread over the library's threads.
class Copy {
 public:
  explicit Copy(double bytes)
      : from_(static_cast<size_t>(bytes / 4), 1.0f), to_(from_.size(), 2.0f) {}
  void run() {
    const auto tasks = static_cast<int64_t>(num_threads());
    const size_t each = from_.size() / static_cast<size_t>(tasks);
    default_executor().run(tasks, [&](int64_t i) {
      const size_t at = static_cast<size_t>(i) * each;
      std::memcpy(to_.data() + at, from_.data() + at, 4 * each);
    });
  }

 private:
  Floats from_, to_;
};

void run_states(benchmark::State& state, const Settings& settings, int64_t heads, int64_t K) {
  Decoder decoder(heads, K);
  for (const Variant& variant : kVariants) {
    if (decoder.right(variant, settings)) continue;
    state.SkipWithError("refused to time a wrong answer");
    return;
  }
  decoder.clear();
  for (int64_t t = 0; t < kTokens; ++t) decoder.step(kVariants[0], t);
  // As much memory as the states: read and written, as they are.
  Copy copy(decoder.state_bytes());
  copy.run();
  struct Figures {
    Samples us, share, one_us, one_share;
  } figures[std::size(kVariants)];
  Samples copy_rate, one_copy_rate;
  int64_t t = 0;
  for (auto _ : state) {
    // All threads by the clock, then one by its processor time.
    for (const bool one : {false, true}) {
      set_num_threads(one ? 1 : settings.threads);
      const auto seconds = [&](auto&& work) {
        return one ? cpu_seconds_of(Cpu::thread, work) : seconds_of(work);
      };
      const double rate = 2.0 * decoder.state_bytes() / seconds([&] { copy.run(); });
      (one ? one_copy_rate : copy_rate).add(1e-9 * rate);
      for (size_t i = 0; i < std::size(kVariants); ++i) {
        const double time = seconds([&] { decoder.step(kVariants[i], t); });
        t = (t + 1) % kTokens;
        Figures& f = figures[i];
        (one ? f.one_us : f.us).add(1e6 * time / static_cast<double>(heads));
        (one ? f.one_share : f.share).add(2.0 * decoder.state_bytes() / time / rate);
      }
    }
  }
  set_num_threads(settings.threads);
  state.counters["state_mbytes"] = 1e-6 * decoder.state_bytes();
  state.counters["copy_gbytes"] = copy_rate.median();
  state.counters["one_copy_gbytes"] = one_copy_rate.median();
  for (size_t i = 0; i < std::size(kVariants); ++i) {
    const std::string name = std::string(kVariants[i].name) + ":";
    state.counters[name + "us"] = figures[i].us.median();
    state.counters[name + "share"] = figures[i].share.median();
    state.counters[name + "one_us"] = figures[i].one_us.median();
    state.counters[name + "one_share"] = figures[i].one_share.median();
  }
}

}  // namespace

void register_decode_states_cases(const Settings& settings) {
  const auto add = [&](int64_t heads, int64_t K) {
    const std::string name = "decode_states/K:" + std::to_string(K) + "/H:" + std::to_string(heads);
    benchmark::RegisterBenchmark(
        name.c_str(), [=](benchmark::State& state) { run_states(state, settings, heads, K); })
        ->Iterations(settings.quick ? 2 : 21)
        ->Unit(benchmark::kMillisecond);
  };
  if (settings.quick) return add(4, 64);
  for (const int64_t heads : {64, 256, 512, 1024}) add(heads, 128);
}

}  // namespace kalmanet::bench
