// The gate of the whole sequences.
#include "sequence_gate.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

#include "gate.hpp"

namespace kalmanet::bench {
namespace {

constexpr int64_t kHeadTokens = 96, kTailTokens = 96;

struct States {
  Array h, u;
};

// Tokens [begin, end) of a sequence in float64: every dtype converts without loss.
class Doubles {
 public:
  Doubles(const Sequence& sequence, int64_t begin, int64_t end)
      : shape_(sequence.recipe.shape), begin_(begin), tokens_(end - begin) {
    q = part(sequence.q);
    k = part(sequence.k);
    v = part(sequence.v);
    g = part(sequence.g);
    alpha = part(sequence.alpha);
    beta = part(sequence.beta);
    if (!sequence.ridge.empty()) ridge = part(sequence.ridge);
    if (!sequence.d_o.empty()) d_o = part(sequence.d_o);
  }

  Array q, k, v, g, alpha, beta, ridge, d_o;

  // Elements of an array of the whole sequence that come before these tokens.
  int64_t before(const Array& whole) const { return begin_ * (whole.size() / shape_.T); }
  Array part(const Array& whole) const {
    Array result(DType::float64, tokens_ * (whole.size() / shape_.T));
    for (int64_t i = 0; i < result.size(); ++i) result.set(i, whole.at(before(whole) + i));
    return result;
  }
  View tokens(Array& array) const {
    const int64_t width = array.size() / (tokens_ * shape_.H);
    return width == 1 ? array.view({1, tokens_, shape_.H})
                      : array.view({1, tokens_, shape_.H, width});
  }
  GkaInputs inputs(States* states) {
    GkaInputs in;
    in.q = tokens(q);
    in.k = tokens(k);
    in.v = tokens(v);
    in.g = in.gk = tokens(g);
    in.alpha = tokens(alpha);
    in.beta = tokens(beta);
    if (!ridge.empty()) in.ridge_ratio = tokens(ridge);
    if (states != nullptr) {
      in.h0 = states->h.view({1, shape_.H, shape_.K, shape_.K});
      in.u0 = states->u.view({1, shape_.H, shape_.K, shape_.V});
    }
    return in;
  }

 private:
  Shape shape_;
  int64_t begin_, tokens_;
};

bool aims_at_tolerance(const Method& m) {
  return m.solver == Solver::direct || m.solver == Solver::automatic || m.num_iter == kAutoNumIter;
}

GkaOptions reference_options(const Method& method) {
  GkaOptions options = method.options();
  options.backend = Backend::reference;
  options.executor = nullptr;
  if (aims_at_tolerance(method)) options.solver = Solver::direct;  // exact
  return options;
}

struct Bounds {
  double output, gradient;
};

// Rounding of float32 kernels as the tests bound it; direct's are those of the table, also
// for what Chebyshev leaves at its own tolerance. Rounding once to 16 bits costs 1.7e-3 (bfloat16)
// and 2.1e-4 (float16) of a tensor in norm.
Bounds bounds_of(const Recipe& recipe, const Method& method) {
  if (recipe.dtype == DType::float64) {
    return aims_at_tolerance(method) ? Bounds{1e-8, 1e-7} : Bounds{1e-11, 1e-10};
  }
  Bounds bounds =
      aims_at_tolerance(method) ? Bounds{2e-5, 2e-4} : Bounds{kOutputBound, kGradientBound};
  const double rounding = recipe.dtype == DType::bfloat16  ? 1.9e-3
                          : recipe.dtype == DType::float16 ? 2.4e-4
                                                           : 0.0;
  bounds.output += rounding;
  bounds.gradient += rounding;
  return bounds;
}

States zero_states(const Shape& s) {
  return {Array(DType::float64, s.H * s.K * s.K), Array(DType::float64, s.H * s.K * s.V)};
}

GkaOutputs outputs(Doubles& part, const Shape& s, Array& o, States* after) {
  GkaOutputs out;
  out.o = part.tokens(o);
  if (after != nullptr) {
    out.h_final = after->h.view({1, s.H, s.K, s.K});
    out.u_final = after->u.view({1, s.H, s.K, s.V});
  }
  return out;
}

// The states before token `end`. They do not depend on the solver or the ridge, so one step of
// Chebyshev will do, and one computation for every case of the same tensors.
States states_before(const Sequence& sequence, int64_t end) {
  const Shape& s = sequence.recipe.shape;
  static std::vector<std::pair<Recipe, States>> known;
  for (const auto& [recipe, states] : known) {
    if (recipe == sequence.recipe) return states;
  }
  States states = zero_states(s);
  if (end > 0) {
    Doubles part(sequence, 0, end);
    Array o(DType::float64, end * s.H * s.V);
    Method one_step;
    one_step.num_iter = 1;
    gka_forward(part.inputs(nullptr), outputs(part, s, o, &states), reference_options(one_step));
  }
  known.emplace_back(sequence.recipe, states);
  return states;
}

void compare_gradients(Sequence& p, Doubles& part, States& before, const Method& method,
                       double bound, Gate& gate) {
  struct Gradient {
    const char* name;
    const Array& got;
    View GkaInputGrads::* slot;
  };
  std::vector<Gradient> list = {{"dq of the last tokens", p.dq, &GkaInputGrads::dq},
                                {"dk of the last tokens", p.dk, &GkaInputGrads::dk},
                                {"dv of the last tokens", p.dv, &GkaInputGrads::dv},
                                {"dg of the last tokens", p.dg, &GkaInputGrads::dg},
                                {"dgk of the last tokens", p.dgk, &GkaInputGrads::dgk},
                                {"dalpha of the last tokens", p.dalpha, &GkaInputGrads::dalpha},
                                {"dbeta of the last tokens", p.dbeta, &GkaInputGrads::dbeta}};
  if (!p.ridge.empty()) {
    list.push_back({"da of the last tokens", p.dridge, &GkaInputGrads::d_ridge_ratio});
  }
  std::vector<Array> want;
  GkaInputGrads grads;
  for (const Gradient& gradient : list) {
    want.push_back(part.part(gradient.got));  // of the right size; overwritten
    grads.*gradient.slot = part.tokens(want.back());
  }
  GkaOutputGrads output_grads;
  output_grads.d_o = part.tokens(part.d_o);
  gka_backward(part.inputs(&before), {}, output_grads, grads, reference_options(method));
  for (size_t i = 0; i < list.size(); ++i) {
    gate.compare(list[i].name, list[i].got, part.before(list[i].got), want[i], bound);
  }
}

}  // namespace

bool check(Sequence& p, Pass pass, const Method& method, const Settings& settings) {
  const Shape& s = p.recipe.shape;
  char problem[80];
  std::snprintf(problem, sizeof problem, " memory=%g ridge=%g ", p.recipe.memory,
                p.ridge.empty() ? method.ridge_ratio : p.recipe.ridge_low);
  Gate gate(std::string(name(pass)) + " " + s.text() + " " + name(p.recipe.dtype) + problem +
                method.text() + " on " + name(instruction_set()),
            settings);
  const Bounds bounds = bounds_of(p.recipe, method);
  p.run(pass, method);
  {
    Doubles first(p, 0, std::min(s.T, kHeadTokens));
    Array o = first.part(p.o);
    gka_forward(first.inputs(nullptr), outputs(first, s, o, nullptr), reference_options(method));
    gate.compare("o of the first tokens", p.o, 0, o, bounds.output);
  }
  const int64_t begin = std::max<int64_t>(0, s.T - kTailTokens);
  States before = states_before(p, begin), after = zero_states(s);
  Doubles last(p, begin, s.T);
  Array o = last.part(p.o);
  gka_forward(last.inputs(&before), outputs(last, s, o, &after), reference_options(method));
  gate.compare("o of the last tokens", p.o, last.before(p.o), o, bounds.output);
  if (pass == Pass::forward) {
    gate.compare("final state H", p.h, 0, after.h, bounds.output);
    gate.compare("final state U", p.u, 0, after.u, bounds.output);
  } else {
    compare_gradients(p, last, before, method, bounds.gradient, gate);
  }
  return gate.passed();
}

}  // namespace kalmanet::bench
