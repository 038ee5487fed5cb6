// The problems that are timed: one sequence with unit queries and keys, a forgetting gate of about
// fifty tokens' memory, alpha and beta, ridge ratio 0.02, chebyshev(30); everything float32.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "floats.hpp"
#include "kalmanet/kalmanet.hpp"

namespace kalmanet::bench {

struct Shape {
  int64_t T = 4096, H = 4, K = 128, V = 128;
  std::string text() const;
};
inline constexpr int kNumIter = 30;

// Tensors of tokens [begin, end) of a problem: [1,T,H,K], [1,T,H,V] or [1,T,H] by `width`
// (0: no last dimension).
ConstView tokens_of(const Floats& data, const Shape& shape, int64_t width, int64_t begin,
                    int64_t end);

class Problem {
 public:
  Problem(const Shape& shape, uint64_t seed);

  const Shape shape;
  Floats q, k, v, g, alpha, beta, d_o;  // g is both gates
  // Results.
  Floats o, x, h, u;  // h [1,H,K,K], u [1,H,K,V]: the states after the last token
  Floats dq, dk, dv, dg, dgk, dalpha, dbeta;

  // Inputs of tokens [begin, end), without states.
  GkaInputs inputs(int64_t begin, int64_t end) const;
  GkaInputs inputs() const { return inputs(0, shape.T); }

  // o and the final states.
  GkaReport forward();
  // o, x and the gradients, as in training: x is kept for the backward.
  void forward_backward();

 private:
  void make_room_for_gradients();
};

}  // namespace kalmanet::bench
