// The sequences that are timed, and the ways to compute them: any dtype, any solver, any memory.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "array.hpp"
#include "kalmanet/kalmanet.hpp"
#include "problem.hpp"

namespace kalmanet::bench {

inline constexpr double kUnlimited = std::numeric_limits<double>::infinity();

// What the tensors hold: unit queries and keys, v uniform with variance one, alpha and beta uniform
// in 0.2..1. Queries, keys and values are of `dtype`; what is one number a token is float32 beside
// 16 bits, as the layer hands it over.
struct Recipe {
  Shape shape;
  DType dtype = DType::float32;
  // Gates uniform in [-2 / memory, 0]: pairs fade to 1/e in `memory` tokens; kUnlimited: gates of
  // 0.
  double memory = 256;
  // Ridge ratios of their own for every token and head, log-uniform between the two; 0: a scalar,
  // Method::ridge_ratio.
  double ridge_low = 0, ridge_high = 0;

  bool operator==(const Recipe&) const = default;
};

// How it is computed.
struct Method {
  Solver solver = Solver::chebyshev;
  int num_iter = 30;
  double ridge_ratio = 0.02;
  double tolerance = kDtypeTolerance;  // 1e-5 in float32
  InstructionSet isa = InstructionSet::baseline;
  Executor* executor = nullptr;

  // "chebyshev(30)", "direct", "chebyshev(auto)", ...
  std::string text() const;
  GkaOptions options() const;
};

enum class Pass { forward, forward_backward };
const char* name(Pass pass);

class Sequence {
 public:
  explicit Sequence(const Recipe& recipe);

  const Recipe recipe;
  Array q, k, v, g, alpha, beta, ridge, d_o;  // g is both gates; ridge is empty where it is scalar
  // Results. h [1,H,K,K], u [1,H,K,V]: the states after the last token.
  Array o, x, segment_states, h, u;
  Array dq, dk, dv, dg, dgk, dalpha, dbeta, dridge;

  GkaInputs inputs() const;
  // o and the final states; or o, x and every gradient, as in training: x is kept for the backward.
  GkaReport run(Pass pass, const Method& method);
  // Bytes of all tensors that a pass reads or writes: what it must move at least.
  double bytes(Pass pass) const;
  // Bytes of all tensors that exist now, each once.
  double held_bytes() const;

 private:
  void make_room_for_gradients();
};

// The sequence of a recipe, made once for all cases that want it at the same time.
std::shared_ptr<Sequence> sequence_of(const Recipe& recipe);

}  // namespace kalmanet::bench
