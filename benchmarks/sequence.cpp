// The sequences that are timed.
#include "sequence.hpp"

#include <cmath>

#include "random.hpp"

namespace kalmanet::bench {
namespace {

constexpr uint64_t kSeed = 20261123;

Array uniform(Random& random, DType dtype, int64_t size, float low, float high) {
  Array values(dtype, size);
  for (int64_t i = 0; i < size; ++i) values.set(i, random.uniform(low, high));
  return values;
}

Array unit_rows(Random& random, DType dtype, int64_t rows, int64_t width) {
  Array values(dtype, rows * width);
  std::vector<float> row(static_cast<size_t>(width));
  for (int64_t r = 0; r < rows; ++r) {
    float norm2 = 0.0f;
    for (float& value : row) {
      value = random.uniform(-1.0f, 1.0f);
      norm2 += value * value;
    }
    const float gain = 1.0f / std::sqrt(norm2);
    for (int64_t i = 0; i < width; ++i) {
      values.set(r * width + i, gain * row[static_cast<size_t>(i)]);
    }
  }
  return values;
}

DType token_dtype(DType dtype) {
  return core::is_half(dtype) ? DType::float32 : dtype;
}
DType state_dtype(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

}  // namespace

std::string Method::text() const {
  std::string text = kalmanet::name(solver);
  if (solver == Solver::chebyshev || solver == Solver::cg) {
    text += num_iter == kAutoNumIter ? "(auto)" : "(" + std::to_string(num_iter) + ")";
  }
  return text;
}

GkaOptions Method::options() const {
  GkaOptions options;
  options.solver = solver;
  options.num_iter = num_iter;
  options.ridge_ratio = ridge_ratio;
  options.tolerance = tolerance;
  options.executor = executor;
  return options;
}

const char* name(Pass pass) {
  return pass == Pass::forward ? "forward" : "forward_backward";
}

Sequence::Sequence(const Recipe& r) : recipe(r) {
  Random random{kSeed};
  const Shape& s = recipe.shape;
  const int64_t rows = s.T * s.H;
  const DType dtype = recipe.dtype, scalars = token_dtype(dtype), states = state_dtype(dtype);
  q = unit_rows(random, dtype, rows, s.K);
  k = unit_rows(random, dtype, rows, s.K);
  v = uniform(random, dtype, rows * s.V, -1.7f, 1.7f);
  g = uniform(random, scalars, rows, static_cast<float>(-2.0 / recipe.memory), 0.0f);
  alpha = uniform(random, scalars, rows, 0.2f, 1.0f);
  beta = uniform(random, scalars, rows, 0.2f, 1.0f);
  if (recipe.ridge_low > 0) {
    ridge = uniform(random, scalars, rows, static_cast<float>(std::log(recipe.ridge_low)),
                    static_cast<float>(std::log(recipe.ridge_high)));
    for (int64_t i = 0; i < rows; ++i) ridge.set(i, std::exp(ridge.at(i)));
  }
  o = Array(dtype, rows * s.V);
  h = Array(states, s.H * s.K * s.K);
  u = Array(states, s.H * s.K * s.V);
}

GkaInputs Sequence::inputs() const {
  const Shape& s = recipe.shape;
  GkaInputs in;
  in.q = q.view(0, {1, s.T, s.H, s.K});
  in.k = k.view(0, {1, s.T, s.H, s.K});
  in.v = v.view(0, {1, s.T, s.H, s.V});
  in.g = in.gk = g.view(0, {1, s.T, s.H});
  in.alpha = alpha.view(0, {1, s.T, s.H});
  in.beta = beta.view(0, {1, s.T, s.H});
  if (!ridge.empty()) in.ridge_ratio = ridge.view(0, {1, s.T, s.H});
  return in;
}

void Sequence::make_room_for_gradients() {
  if (!x.empty()) return;
  const int64_t rows = recipe.shape.T * recipe.shape.H;
  const int64_t keys = rows * recipe.shape.K, values = rows * recipe.shape.V;
  const DType dtype = recipe.dtype, scalars = token_dtype(dtype);
  Random random{12};
  d_o = uniform(random, dtype, values, -1.7f, 1.7f);
  x = Array(scalars, keys);
  segment_states =
      Array(state_dtype(dtype), recipe.shape.H * (recipe.shape.T / kSegmentTokens) *
                                    gka_segment_state_size(recipe.shape.K, recipe.shape.V));
  dq = Array(dtype, keys);
  dk = Array(dtype, keys);
  dv = Array(dtype, values);
  for (Array* gate : {&dg, &dgk, &dalpha, &dbeta}) *gate = Array(scalars, rows);
  if (!ridge.empty()) dridge = Array(scalars, rows);
}

GkaReport Sequence::run(Pass pass, const Method& method) {
  const Shape& s = recipe.shape;
  const bool both = pass == Pass::forward_backward;
  GkaOutputs out;
  out.o = o.view({1, s.T, s.H, s.V});
  if (both) {
    make_room_for_gradients();
    out.x = x.view({1, s.T, s.H, s.K});
    out.segment_states =
        segment_states.view({1, s.H, s.T / kSegmentTokens, gka_segment_state_size(s.K, s.V)});
  } else {
    out.h_final = h.view({1, s.H, s.K, s.K});
    out.u_final = u.view({1, s.H, s.K, s.V});
  }
  const GkaReport report = gka_forward(inputs(), out, method.options());
  if (!both) return report;
  GkaOutputGrads output_grads;
  output_grads.d_o = d_o.view({1, s.T, s.H, s.V});
  GkaInputGrads grads;
  grads.dq = dq.view({1, s.T, s.H, s.K});
  grads.dk = dk.view({1, s.T, s.H, s.K});
  grads.dv = dv.view({1, s.T, s.H, s.V});
  grads.dg = dg.view({1, s.T, s.H});
  grads.dgk = dgk.view({1, s.T, s.H});
  grads.dalpha = dalpha.view({1, s.T, s.H});
  grads.dbeta = dbeta.view({1, s.T, s.H});
  if (!ridge.empty()) grads.d_ridge_ratio = dridge.view({1, s.T, s.H});
  gka_backward(inputs(), {out.x, out.segment_states}, output_grads, grads, method.options());
  return report;
}

double Sequence::bytes(Pass pass) const {
  double bytes = 0;
  const auto add = [&](std::initializer_list<const Array*> arrays, int times) {
    for (const Array* array : arrays) bytes += times * array->bytes();
  };
  if (pass == Pass::forward) {
    add({&q, &k, &v, &g, &g, &alpha, &beta, &ridge, &o, &h, &u}, 1);
  } else {  // inputs once for each of the two calls; x is written by the one and read by the other
    add({&q, &k, &v, &g, &g, &alpha, &beta, &ridge, &x, &segment_states}, 2);
    add({&o, &d_o, &dq, &dk, &dv, &dg, &dgk, &dalpha, &dbeta, &dridge}, 1);
  }
  return bytes;
}

double Sequence::held_bytes() const {
  double bytes = 0;
  for (const Array* array :
       {&q, &k, &v,  &g,  &alpha, &beta, &ridge, &d_o,    &o,     &x,     &segment_states,
        &h, &u, &dq, &dk, &dv,    &dg,   &dgk,   &dalpha, &dbeta, &dridge}) {
    bytes += array->bytes();
  }
  return bytes;
}

std::shared_ptr<Sequence> sequence_of(const Recipe& recipe) {
  static std::vector<std::weak_ptr<Sequence>> made;
  for (const auto& weak : made) {
    if (auto sequence = weak.lock(); sequence && sequence->recipe == recipe) return sequence;
  }
  auto sequence = std::make_shared<Sequence>(recipe);
  made.push_back(sequence);
  return sequence;
}

}  // namespace kalmanet::bench
