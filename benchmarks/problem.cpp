// The problem of the decode cases.
#include "problem.hpp"

#include <cmath>

#include "random.hpp"

namespace kalmanet::bench {
namespace {

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

}  // namespace kalmanet::bench
