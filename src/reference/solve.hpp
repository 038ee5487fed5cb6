// The three ways to solve (H + lambda I) x = q, in plain loops over a dense K x K matrix.
//
// Real is double for the oracles; float gives the naive same-precision version that error bounds
// are measured against.
#pragma once

#include <cstdint>
#include <vector>

#include "kalmanet/gka.hpp"

namespace kalmanet::reference {

// A row-major matrix, or a vector as one row.
template <class Real>
using Array = std::vector<Real>;

// y = H x + lambda x for symmetric H [K, K].
template <class Real>
void apply_system(const Array<Real>& H, Real lambda, const Real* x, Real* y, int64_t K);

// |H|_F
template <class Real>
Real frobenius_norm(const Array<Real>& H);

// `exact`: Cholesky factorisation and two triangular solves. H + lambda I must be positive definite
// (it is for lambda > 0 and H a sum of k k^T); else the result is NaN.
template <class Real>
void solve_exact(const Array<Real>& H, Real lambda, const Real* q, Real* x, int64_t K);

// chebyshev(r), on the interval [lambda, lambda + f] that holds every eigenvalue.
//   step = 2 / (2 lambda + f)        rho2 = ( f / (2 lambda + f) / 2 )^2
//   x_prev = 0,  x = step q,  w = 2
//   r times:  w = 1 / (1 - rho2 w)
//             x, x_prev = w x - step w (H x + lambda x - q) - (w - 1) x_prev,  x
// Relative error at most 2 R^r, R = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), kappa = (lambda + f) /
// lambda.
template <class Real>
void solve_chebyshev(const Array<Real>& H, Real f, Real lambda, const Real* q, int num_iter,
                     Real* x, int64_t K);

// cg(r): r steps of conjugate gradients from x = 0; fewer where the residual becomes zero.
template <class Real>
void solve_cg(const Array<Real>& H, Real lambda, const Real* q, int num_iter, Real* x, int64_t K);

// One of them; x = 0 where f <= kVanishedNorm.
template <class Real>
void solve(Solver solver, int num_iter, const Array<Real>& H, Real f, Real lambda, const Real* q,
           Real* x, int64_t K);

}  // namespace kalmanet::reference
