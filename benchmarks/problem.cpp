// The problems that are timed.
#include "problem.hpp"

#include <cmath>

namespace kalmanet::bench {
namespace {

// splitmix64: fast, and the same on every machine.
struct Random {
  uint64_t state;

  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24f;
  }
};

Floats uniform(Random& random, int64_t size, float low, float high) {
  Floats values(static_cast<size_t>(size));
  for (float& value : values) value = random.uniform(low, high);
  return values;
}

Floats unit_rows(Random& random, int64_t rows, int64_t width) {
  Floats values = uniform(random, rows * width, -1.0f, 1.0f);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = values.data() + r * width;
    float norm2 = 0.0f;
    for (int64_t i = 0; i < width; ++i) norm2 += row[i] * row[i];
    const float gain = 1.0f / std::sqrt(norm2);
    for (int64_t i = 0; i < width; ++i) row[i] *= gain;
  }
  return values;
}

View view_of(Floats& data, const Shape& s, int64_t width) {
  return width == 0 ? dense(data.data(), {1, s.T, s.H}) : dense(data.data(), {1, s.T, s.H, width});
}

}  // namespace

std::string Shape::text() const {
  return "T=" + std::to_string(T) + " H=" + std::to_string(H) + " K=" + std::to_string(K) +
         " V=" + std::to_string(V);
}

ConstView tokens_of(const Floats& data, const Shape& shape, int64_t width, int64_t begin,
                    int64_t end) {
  const int64_t T = end - begin, H = shape.H;
  const float* first = data.data() + begin * H * (width == 0 ? 1 : width);
  return width == 0 ? dense(first, {1, T, H}) : dense(first, {1, T, H, width});
}

Problem::Problem(const Shape& s, uint64_t seed) : shape(s) {
  Random random{seed};
  const int64_t rows = s.T * s.H;
  q = unit_rows(random, rows, s.K);
  k = unit_rows(random, rows, s.K);
  v = uniform(random, rows * s.V, -1.7f, 1.7f);
  g = uniform(random, rows, -0.04f, 0.0f);
  alpha = uniform(random, rows, 0.2f, 1.0f);
  beta = uniform(random, rows, 0.2f, 1.0f);
  o.resize(static_cast<size_t>(rows * s.V));
  h.resize(static_cast<size_t>(s.H * s.K * s.K));
  u.resize(static_cast<size_t>(s.H * s.K * s.V));
}

GkaInputs Problem::inputs(int64_t begin, int64_t end) const {
  GkaInputs in;
  in.q = tokens_of(q, shape, shape.K, begin, end);
  in.k = tokens_of(k, shape, shape.K, begin, end);
  in.v = tokens_of(v, shape, shape.V, begin, end);
  in.g = in.gk = tokens_of(g, shape, 0, begin, end);
  in.alpha = tokens_of(alpha, shape, 0, begin, end);
  in.beta = tokens_of(beta, shape, 0, begin, end);
  return in;
}

GkaReport Problem::forward() {
  GkaOutputs out;
  out.o = view_of(o, shape, shape.V);
  out.h_final = dense(h.data(), {1, shape.H, shape.K, shape.K});
  out.u_final = dense(u.data(), {1, shape.H, shape.K, shape.V});
  GkaOptions options;
  options.num_iter = kNumIter;
  return gka_forward(inputs(), out, options);
}

void Problem::make_room_for_gradients() {
  if (!x.empty()) return;
  const auto rows = static_cast<size_t>(shape.T * shape.H);
  const auto keys = rows * static_cast<size_t>(shape.K);
  const auto values = rows * static_cast<size_t>(shape.V);
  Random random{12};
  d_o = uniform(random, static_cast<int64_t>(values), -1.7f, 1.7f);
  for (auto* keyed : {&x, &dq, &dk}) keyed->resize(keys);
  dv.resize(values);
  for (auto* gate : {&dg, &dgk, &dalpha, &dbeta}) gate->resize(rows);
}

void Problem::forward_backward() {
  make_room_for_gradients();
  GkaOptions options;
  options.num_iter = kNumIter;
  GkaOutputs out;
  out.o = view_of(o, shape, shape.V);
  out.x = view_of(x, shape, shape.K);
  gka_forward(inputs(), out, options);
  GkaOutputGrads output_grads;
  output_grads.d_o = view_of(d_o, shape, shape.V);
  GkaInputGrads grads;
  grads.dq = view_of(dq, shape, shape.K);
  grads.dk = view_of(dk, shape, shape.K);
  grads.dv = view_of(dv, shape, shape.V);
  grads.dg = view_of(dg, shape, 0);
  grads.dgk = view_of(dgk, shape, 0);
  grads.dalpha = view_of(dalpha, shape, 0);
  grads.dbeta = view_of(dbeta, shape, 0);
  gka_backward(inputs(), out.x, output_grads, grads, options);
}

}  // namespace kalmanet::bench
