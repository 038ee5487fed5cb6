// One head of one sequence, token by token: docs/math.md symbol for symbol. Everything is dense and
// everything optional has its default filled in; what views and head groups are is oracle.cpp's
// business.
#pragma once

#include <cstdint>
#include <vector>

#include "kalmanet/gka.hpp"
#include "reference/solve.hpp"

namespace kalmanet::reference {

template <class Real>
struct Head {
  int64_t T = 0, K = 0, V = 0;
  Array<Real> q, k;             // [T, K]; k already times beta
  Array<Real> v;                // [T, V]; already times beta
  Array<Real> g, gk, alpha, a;  // [T]
  Array<Real> h0, u0;           // [K, K], [K, V]
  Real scale = 1;
  Solver solver = Solver::direct;
  std::vector<int> num_iter;  // [T] solver steps (unused by direct)
  bool bp_lambda = true;
};

template <class Real>
struct HeadOutputs {
  Array<Real> o;         // [T, V]
  Array<Real> x;         // [T, K]
  Array<Real> residual;  // [T], |(H_t + lambda_t) x_t - q_t| / |q_t|; 0 where q_t or f_t is 0
  Array<Real> h, u;      // final states
};

template <class Real>
struct HeadOutputGrads {
  Array<Real> d_o;     // [T, V]
  Array<Real> dh, du;  // with respect to the final states
};

template <class Real>
struct HeadGrads {
  Array<Real> dq, dk, dv;           // of q and of k, v times beta
  Array<Real> dg, dgk, dalpha, da;  // [T]
  Array<Real> dh0, du0;
};

template <class Real>
HeadOutputs<Real> forward(const Head<Real>& head);

// x [T, K]: the forward's solutions, which the implicit gradient takes for exact.
template <class Real>
HeadGrads<Real> backward(const Head<Real>& head, const Array<Real>& x,
                         const HeadOutputGrads<Real>& output_grads);

}  // namespace kalmanet::reference
