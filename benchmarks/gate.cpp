// The gates: results of the timed problems against the float64 reference.
#include "gate.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

namespace kalmanet::bench {
namespace {

int failures = 0;

constexpr int64_t kHeadTokens = 96, kTailTokens = 96;

struct States {
  Floats h, u;
};

GkaOptions reference_options(int num_iter) {
  GkaOptions options;
  options.backend = Backend::reference;
  options.num_iter = num_iter;
  return options;
}

// The states before token `end`. They do not depend on the solver, so one step of it will do.
States reference_states(const Problem& p, int64_t end) {
  const Shape& s = p.shape;
  States states{Floats(p.h.size()), Floats(p.u.size())};
  if (end == 0) return states;
  Floats o(static_cast<size_t>(end * s.H * s.V));
  GkaOutputs out;
  out.o = dense(o.data(), {1, end, s.H, s.V});
  out.h_final = dense(states.h.data(), {1, s.H, s.K, s.K});
  out.u_final = dense(states.u.data(), {1, s.H, s.K, s.V});
  gka_forward(p.inputs(0, end), out, reference_options(1));
  return states;
}

// Inputs of tokens [begin, T) that start from `states`.
GkaInputs inputs_from(const Problem& p, int64_t begin, const States& states) {
  const Shape& s = p.shape;
  GkaInputs in = p.inputs(begin, s.T);
  in.h0 = dense(states.h.data(), {1, s.H, s.K, s.K});
  in.u0 = dense(states.u.data(), {1, s.H, s.K, s.V});
  return in;
}

std::span<const float> tokens(const Floats& data, const Shape& s, int64_t begin, int64_t end) {
  const size_t width = data.size() / static_cast<size_t>(s.T);
  return std::span(data).subspan(static_cast<size_t>(begin) * width,
                                 static_cast<size_t>(end - begin) * width);
}

void compare_first_tokens(const Problem& p, Gate& gate) {
  const Shape& s = p.shape;
  const int64_t end = std::min(s.T, kHeadTokens);
  Floats o(static_cast<size_t>(end * s.H * s.V));
  GkaOutputs out;
  out.o = dense(o.data(), {1, end, s.H, s.V});
  gka_forward(p.inputs(0, end), out, reference_options(kNumIter));
  gate.compare("o of the first tokens", tokens(p.o, s, 0, end), o, kOutputBound);
}

}  // namespace

int failed_gates() {
  return failures;
}

void Gate::compare(const char* name, std::span<const float> got, std::span<const float> want,
                   double bound) {
  double difference2 = 0.0, want2 = 0.0;
  for (size_t i = 0; i < want.size(); ++i) {
    // --spoil: 1 in 1000 of one value in three.
    const double value = settings_.spoil && i % 3 == 0 ? 1.001 * got[i] : got[i];
    difference2 += (value - want[i]) * (value - want[i]);
    want2 += static_cast<double>(want[i]) * want[i];
  }
  const double error = std::sqrt(difference2 / want2);
  if (got.size() == want.size() && error <= bound) {  // a NaN fails
    worst_ = std::max(worst_, error / bound);
    return;
  }
  char line[160];
  std::snprintf(line, sizeof line, "\n    %s: relative difference %.2e, at most %.0e allowed", name,
                error, bound);
  failures_ += line;
}

bool Gate::passed() const {
  if (failures_.empty()) {
    std::fprintf(stderr, "gate passed: %s (largest difference %.0f%% of its bound)\n",
                 what_.c_str(), 100.0 * worst_);
    return true;
  }
  ++failures;
  std::fprintf(stderr, "refused to time a wrong answer: %s%s\n", what_.c_str(), failures_.c_str());
  return false;
}

bool check_forward(Problem& p, const Settings& settings) {
  const Shape& s = p.shape;
  Gate gate("forward " + s.text() + " on " + name(instruction_set()), settings);
  p.forward();
  compare_first_tokens(p, gate);
  const int64_t begin = std::max<int64_t>(0, s.T - kTailTokens), tail = s.T - begin;
  const States before = reference_states(p, begin);
  Floats o(static_cast<size_t>(tail * s.H * s.V));
  States after{Floats(p.h.size()), Floats(p.u.size())};
  GkaOutputs out;
  out.o = dense(o.data(), {1, tail, s.H, s.V});
  out.h_final = dense(after.h.data(), {1, s.H, s.K, s.K});
  out.u_final = dense(after.u.data(), {1, s.H, s.K, s.V});
  gka_forward(inputs_from(p, begin, before), out, reference_options(kNumIter));
  gate.compare("o of the last tokens", tokens(p.o, s, begin, s.T), o, kOutputBound);
  gate.compare("final state H", p.h, after.h, kOutputBound);
  gate.compare("final state U", p.u, after.u, kOutputBound);
  return gate.passed();
}

bool check_forward_backward(Problem& p, const Settings& settings) {
  const Shape& s = p.shape;
  Gate gate("forward and backward " + s.text() + " on " + name(instruction_set()), settings);
  p.forward_backward();
  compare_first_tokens(p, gate);
  const int64_t begin = std::max<int64_t>(0, s.T - kTailTokens), tail = s.T - begin;
  const States before = reference_states(p, begin);
  const auto rows = static_cast<size_t>(tail * s.H);
  Floats dq(rows * static_cast<size_t>(s.K)), dk(dq.size());
  Floats dv(rows * static_cast<size_t>(s.V));
  Floats dg(rows), dgk(rows), dalpha(rows), dbeta(rows);
  GkaOutputGrads output_grads;
  output_grads.d_o = tokens_of(p.d_o, s, s.V, begin, s.T);
  GkaInputGrads grads;
  grads.dq = dense(dq.data(), {1, tail, s.H, s.K});
  grads.dk = dense(dk.data(), {1, tail, s.H, s.K});
  grads.dv = dense(dv.data(), {1, tail, s.H, s.V});
  grads.dg = dense(dg.data(), {1, tail, s.H});
  grads.dgk = dense(dgk.data(), {1, tail, s.H});
  grads.dalpha = dense(dalpha.data(), {1, tail, s.H});
  grads.dbeta = dense(dbeta.data(), {1, tail, s.H});
  gka_backward(inputs_from(p, begin, before), {}, output_grads, grads, reference_options(kNumIter));
  const auto compare = [&](const char* name, const Floats& got, const Floats& want) {
    gate.compare(name, tokens(got, s, begin, s.T), want, kGradientBound);
  };
  compare("dq of the last tokens", p.dq, dq);
  compare("dk of the last tokens", p.dk, dk);
  compare("dv of the last tokens", p.dv, dv);
  compare("dg of the last tokens", p.dg, dg);
  compare("dgk of the last tokens", p.dgk, dgk);
  compare("dalpha of the last tokens", p.dalpha, dalpha);
  compare("dbeta of the last tokens", p.dbeta, dbeta);
  return gate.passed();
}

}  // namespace kalmanet::bench
