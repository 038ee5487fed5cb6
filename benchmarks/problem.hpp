// The problem of the decode cases: one sequence with unit queries and keys, a forgetting gate of
// about fifty tokens' memory, alpha and beta; everything float32.
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
  bool operator==(const Shape&) const = default;
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
  Floats q, k, v, g, alpha, beta;  // g is both gates
  Floats o, h, u;  // results; h [1,H,K,K], u [1,H,K,V]: the states after the last token

  // Inputs of tokens [begin, end), without states.
  GkaInputs inputs(int64_t begin, int64_t end) const;
};

}  // namespace kalmanet::bench
