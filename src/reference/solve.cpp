// The three solvers of the oracles.
#include "reference/solve.hpp"

#include <algorithm>
#include <cmath>

namespace kalmanet::reference {

// Row by row: H is symmetric, so sum_j x_j H[j, :] is H x, and the inner loop needs no reduction.
template <class Real>
void apply_system(const Array<Real>& H, Real lambda, const Real* x, Real* y, int64_t K) {
  for (int64_t i = 0; i < K; ++i) y[i] = lambda * x[i];
  for (int64_t j = 0; j < K; ++j) {
    const Real* row = &H[static_cast<size_t>(j * K)];
    for (int64_t i = 0; i < K; ++i) y[i] += x[j] * row[i];
  }
}

template <class Real>
Real frobenius_norm(const Array<Real>& H) {
  Real sum = 0;
  for (Real h : H) sum += h * h;
  return std::sqrt(sum);
}

template <class Real>
void solve_exact(const Array<Real>& H, Real lambda, const Real* q, Real* x, int64_t K) {
  // L^T in place of the upper triangle, row by row: M = L L^T.
  Array<Real> M = H;
  const auto at = [&](int64_t i, int64_t j) -> Real& { return M[static_cast<size_t>(i * K + j)]; };
  for (int64_t i = 0; i < K; ++i) at(i, i) += lambda;
  for (int64_t i = 0; i < K; ++i) {
    const Real pivot = std::sqrt(at(i, i));
    for (int64_t j = i; j < K; ++j) at(i, j) /= pivot;
    for (int64_t r = i + 1; r < K; ++r) {
      const Real factor = at(i, r);
      for (int64_t j = r; j < K; ++j) at(r, j) -= factor * at(i, j);
    }
  }
  std::copy(q, q + K, x);
  for (int64_t i = 0; i < K; ++i) {  // L y = q
    x[i] /= at(i, i);
    for (int64_t j = i + 1; j < K; ++j) x[j] -= at(i, j) * x[i];
  }
  for (int64_t i = K - 1; i >= 0; --i) {  // L^T x = y
    for (int64_t j = i + 1; j < K; ++j) x[i] -= at(i, j) * x[j];
    x[i] /= at(i, i);
  }
}

template <class Real>
void solve_chebyshev(const Array<Real>& H, Real f, Real lambda, const Real* q, int num_iter,
                     Real* x, int64_t K) {
  const Real step = 2 / (2 * lambda + f);
  const Real rho = f / (2 * lambda + f) / 2;
  const Real rho2 = rho * rho;
  Array<Real> x_prev(static_cast<size_t>(K), Real(0)), Hx(static_cast<size_t>(K));
  for (int64_t i = 0; i < K; ++i) x[i] = step * q[i];
  Real w = 2;
  for (int r = 0; r < num_iter; ++r) {
    w = 1 / (1 - rho2 * w);
    apply_system(H, lambda, x, Hx.data(), K);
    for (int64_t i = 0; i < K; ++i) {
      const Real next = w * x[i] - step * w * (Hx[i] - q[i]) - (w - 1) * x_prev[i];
      x_prev[i] = x[i];
      x[i] = next;
    }
  }
}

template <class Real>
void solve_cg(const Array<Real>& H, Real lambda, const Real* q, int num_iter, Real* x, int64_t K) {
  const auto dot = [K](const Real* a, const Real* b) {
    Real sum = 0;
    for (int64_t i = 0; i < K; ++i) sum += a[i] * b[i];
    return sum;
  };
  Array<Real> r(q, q + K), p(q, q + K), Ap(static_cast<size_t>(K));
  std::fill(x, x + K, Real(0));
  Real rr = dot(r.data(), r.data());
  for (int step = 0; step < num_iter; ++step) {
    apply_system(H, lambda, p.data(), Ap.data(), K);
    const Real pAp = dot(p.data(), Ap.data());
    if (pAp == 0) break;  // the residual is zero, or so small that its square is
    const Real length = rr / pAp;
    for (int64_t i = 0; i < K; ++i) {
      x[i] += length * p[i];
      r[i] -= length * Ap[i];
    }
    const Real rr_next = dot(r.data(), r.data());
    if (rr_next == 0) break;
    for (int64_t i = 0; i < K; ++i) p[i] = r[i] + rr_next / rr * p[i];
    rr = rr_next;
  }
}

template <class Real>
void solve(Solver solver, int num_iter, const Array<Real>& H, Real f, Real lambda, const Real* q,
           Real* x, int64_t K) {
  if (f <= static_cast<Real>(kVanishedNorm)) {  // false for NaN, which must not be hidden
    std::fill(x, x + K, Real(0));
    return;
  }
  switch (solver) {
    case Solver::direct:
    case Solver::automatic:  // nothing is cheaper here than to be exact
      return solve_exact(H, lambda, q, x, K);
    case Solver::chebyshev:
      return solve_chebyshev(H, f, lambda, q, num_iter, x, K);
    case Solver::cg:
      return solve_cg(H, lambda, q, num_iter, x, K);
  }
}

#define KALMANET_INSTANTIATE(Real)                                                                 \
  template void apply_system(const Array<Real>&, Real, const Real*, Real*, int64_t);               \
  template Real frobenius_norm(const Array<Real>&);                                                \
  template void solve_exact(const Array<Real>&, Real, const Real*, Real*, int64_t);                \
  template void solve_chebyshev(const Array<Real>&, Real, Real, const Real*, int, Real*, int64_t); \
  template void solve_cg(const Array<Real>&, Real, const Real*, int, Real*, int64_t);              \
  template void solve(Solver, int, const Array<Real>&, Real, Real, const Real*, Real*, int64_t);
KALMANET_INSTANTIATE(float)
KALMANET_INSTANTIATE(double)
#undef KALMANET_INSTANTIATE

}  // namespace kalmanet::reference
