// The solvers for one token of one head.
#pragma once

#include <cstdint>

#include "cpu/block_ldl.hpp"
#include "cpu/chebyshev.hpp"
#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/packed_symmetric.hpp"
#include "cpu/step_ahead.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

// y[n] = sum_{c < rows} x[c] M[c][n] for n < cols (a multiple of kLanes): rows of M are read in
// order, eight accumulators at a time (two multiply-adds a cycle of latency 4), epilogue(n,
// register of y).
template <class Vec, class S, class Epilogue>
KALMANET_INLINE void row_combination(const S* m, int64_t ld, int64_t rows, int64_t cols,
                                     const typename Vec::Elem* x, Epilogue&& epilogue) {
  using Reg = typename Vec::Reg;
  constexpr int kBlock = 8;
  int64_t n = 0;
  for (; n + kBlock * Vec::kWidth <= cols; n += kBlock * Vec::kWidth) {
    Reg acc[kBlock];
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) acc[i] = Vec::zero();
    for (int64_t c = 0; c < rows; ++c) {
      const Reg xc = Vec::set1(x[c]);
      const S* row = m + c * ld + n;
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) {
        acc[i] = Vec::fma(xc, load_as<Vec>(row + i * Vec::kWidth), acc[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) epilogue(n + i * Vec::kWidth, acc[i]);
  }
  // Four registers at a time, split over even and odd rows to keep eight sums in flight.
  constexpr int kSmall = Vec::kWidth == 16 ? 1 : 16 / Vec::kWidth;
  for (; n < cols; n += kSmall * Vec::kWidth) {
    Reg acc[4][kSmall];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 4
      for (int i = 0; i < kSmall; ++i) acc[p][i] = Vec::zero();
    }
    int64_t c = 0;
    for (; c + 4 <= rows; c += 4) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const Reg xc = Vec::set1(x[c + p]);
#pragma GCC unroll 4
        for (int i = 0; i < kSmall; ++i) {
          acc[p][i] = Vec::fma(xc, load_as<Vec>(m + (c + p) * ld + n + i * Vec::kWidth), acc[p][i]);
        }
      }
    }
    for (; c < rows; ++c) {
      const Reg xc = Vec::set1(x[c]);
#pragma GCC unroll 4
      for (int i = 0; i < kSmall; ++i) {
        acc[0][i] = Vec::fma(xc, load_as<Vec>(m + c * ld + n + i * Vec::kWidth), acc[0][i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSmall; ++i) {
      epilogue(n + i * Vec::kWidth,
               Vec::add(Vec::add(acc[0][i], acc[1][i]), Vec::add(acc[2][i], acc[3][i])));
    }
  }
}

// What a solver needs beside its two vectors: direct, a matrix and an elimination's panels; cg, two
// vectors more.
template <class Elem>
struct StepWork {
  Elem* matrix = nullptr;
  EliminationPanels<Elem> panels{};
  Elem* extra[2] = {};
};

template <class Elem, class S>
KALMANET_INLINE StepWork<Elem> take_step_work(Arena<S>& arena, int64_t Kp, Solver solver) {
  constexpr int64_t kEach = sizeof(Elem) / sizeof(S);
  const auto take = [&](int64_t n) { return reinterpret_cast<Elem*>(arena.take(kEach * n)); };
  StepWork<Elem> work;
  if (by_blocks(solver)) {
    work.matrix = take(Kp * Kp);
    work.panels = {take(kLanes * Kp), take(kLanes * Kp)};
  } else if (solver == Solver::cg) {
    for (auto& p : work.extra) p = take(Kp);
  }
  return work;
}

// A token's H: whole, row-major, and packed beside it (null: not packed), with room for a product.
template <class S>
struct SystemMatrix {
  const S* h = nullptr;
  int64_t ld = 0, K = 0, Kp = 0;
  const S* packed = nullptr;
  S* product = nullptr;  // [Kp]

  // epilogue(n, register of H x) for all n.
  template <class Vec, class Epilogue>
  KALMANET_INLINE void times(const typename Vec::Elem* x, Epilogue&& epilogue) const {
    if constexpr (sizeof(typename Vec::Elem) == sizeof(S)) {
      if (packed != nullptr) {
        packed_product<Vec>(packed, Kp, x, product);
        for (int64_t n = 0; n < Kp; n += Vec::kWidth) epilogue(n, Vec::load(product + n));
        return;
      }
    }
    row_combination<Vec>(h, ld, K, Kp, x, epilogue);
  }
};

// One token: its ridge, and how it is to be solved for.
template <class S>
struct StepToken {
  const S* q;
  Solver solver = Solver::chebyshev;
  double f = 0, ridge = 0, alpha = 1, scale = 1;
  int num_iter = 0;
  StepAhead ahead{};  // fetched while the token is solved for
};

// The Chebyshev iteration (chebyshev.hpp) for one token; returns which of x and other has the
// solution.
template <class Vec, class S>
typename Vec::Elem* chebyshev_step(const StepToken<S>& token, const SystemMatrix<S>& matrix,
                                   typename Vec::Elem* x, typename Vec::Elem* other) {
  using Reg = typename Vec::Reg;
  using Elem = typename Vec::Elem;
  const int64_t Kp = matrix.Kp;
  const double lambda = token.ridge * token.f;
  const double step = 2.0 / (2.0 * lambda + token.f);
  const double rho = 0.5 / (2.0 * token.ridge + 1.0);
  for (int64_t n = 0; n < Kp; ++n) {
    x[n] = static_cast<Elem>(step) * token.q[n];
    other[n] = 0;
  }
  const Reg lam = Vec::set1(static_cast<Elem>(lambda));
  double w = 2.0;
  Ahead<Vec> ahead(token.ahead, token.num_iter);
  for (int iteration = 0; iteration < token.num_iter; ++iteration) {
    ahead.fetch();
    w = 1.0 / (1.0 - rho * rho * w);
    const Reg momentum = Vec::set1(static_cast<Elem>(w - 1.0));
    const Reg gain = Vec::set1(static_cast<Elem>(step * w));
    matrix.template times<Vec>(x, [&](int64_t n, Reg hx) {
      const Reg xn = Vec::load(x + n);
      const Reg residual = Vec::sub(Vec::fma(lam, xn, hx), load_as<Vec>(token.q + n));
      const Reg moved = Vec::fma(momentum, Vec::sub(xn, Vec::load(other + n)), xn);
      Vec::store(other + n, Vec::fnma(gain, residual, moved));
    });
    Elem* next = other;
    other = x;
    x = next;
  }
  return x;
}

// Conjugate gradients (cg.hpp) for one token.
template <class Vec, class S>
void cg_step(const StepToken<S>& token, const SystemMatrix<S>& matrix,
             const StepWork<typename Vec::Elem>& work, typename Vec::Elem* x,
             typename Vec::Elem* r) {
  using Reg = typename Vec::Reg;
  using Elem = typename Vec::Elem;
  const int64_t Kp = matrix.Kp;
  Elem* const p = work.extra[0];
  Elem* const ap = work.extra[1];
  const auto dot = [Kp](const Elem* a, const Elem* b) {
    double sum = 0.0;
    for (int64_t n = 0; n < Kp; ++n) sum += static_cast<double>(a[n]) * b[n];
    return sum;
  };
  for (int64_t n = 0; n < Kp; ++n) {
    x[n] = 0;
    r[n] = p[n] = static_cast<Elem>(token.q[n]);
  }
  const Reg lam = Vec::set1(static_cast<Elem>(token.ridge * token.f));
  double rr = dot(r, r);
  Ahead<Vec> ahead(token.ahead, token.num_iter);
  for (int iteration = 0; iteration < token.num_iter; ++iteration) {
    ahead.fetch();
    matrix.template times<Vec>(
        p, [&](int64_t n, Reg hp) { Vec::store(ap + n, Vec::fma(lam, Vec::load(p + n), hp)); });
    const double pap = dot(p, ap);
    if (pap == 0.0) return;
    const Elem length = static_cast<Elem>(rr / pap);
    for (int64_t n = 0; n < Kp; ++n) {
      x[n] += length * p[n];
      r[n] -= length * ap[n];
    }
    const double next = dot(r, r);
    if (next == 0.0) return;
    const Elem back = static_cast<Elem>(next / rr);
    for (int64_t n = 0; n < Kp; ++n) p[n] = r[n] + back * p[n];
    rr = next;
  }
}

// H + lambda I factored and the one system solved (K^3 / 3 operations), then once more for the
// residual: a few K^2, which leave of a Cholesky solve's error the square.
template <class Vec, class S>
void direct_step(const StepToken<S>& token, const S* h, int64_t ld, int64_t K, int64_t Kp,
                 const StepWork<typename Vec::Elem>& work, typename Vec::Elem* x,
                 typename Vec::Elem* residual) {
  using Wide = typename Vec::Wide;
  using Elem = typename Vec::Elem;
  const double lambda = token.ridge * token.f;
  Elem* const a = work.matrix;
  for (int64_t i = 0; i < Kp; ++i) {
    const int64_t end = padded(i + 1);  // up to the diagonal block
    if (i < K) {
      for (int64_t j = 0; j < end; ++j) a[i * Kp + j] = static_cast<Elem>(h[i * ld + j]);
    } else {
      for (int64_t j = 0; j < end; ++j) a[i * Kp + j] = 0;
    }
    a[i * Kp + i] = static_cast<Elem>(static_cast<double>(a[i * Kp + i]) + lambda);
    x[i] = static_cast<Elem>(token.q[i]);
  }
  factor_symmetric<Vec>(a, Kp, work.panels);
  solve_factored<Vec>(a, Kp, x);
  alignas(64) double wide_x[kMaxHeadDim];
  for (int64_t i = 0; i < Kp; ++i) wide_x[i] = x[i];
  const typename Wide::Reg lam = Wide::set1(lambda);
  alignas(64) double r[Wide::kWidth];
  row_combination<Wide>(h, ld, K, Kp, wide_x, [&](int64_t n, typename Wide::Reg hx) {
    const auto ax = Wide::fma(lam, Wide::load(wide_x + n), hx);
    Wide::store(r, Wide::sub(load_as<Wide>(token.q + n), ax));
    for (int i = 0; i < Wide::kWidth; ++i) residual[n + i] = static_cast<Elem>(r[i]);
  });
  solve_factored<Vec>(a, Kp, residual);
  for (int64_t i = 0; i < Kp; ++i) x[i] += residual[i];
}

// Whether H is worth packing for the token: it costs half a product's time in the update's pass, so
// from two products on.
template <class Vec, class S>
bool packs_for(const StepToken<S>& token, StepMatrix matrix, int64_t Kp) {
  if (token.solver == Solver::direct || matrix == StepMatrix::whole) return false;
  if (matrix == StepMatrix::packed) return true;
  return packing_pays<Vec>(Kp) && token.num_iter >= 2;
}

// The token's solver and its steps. Automatic: a factorisation takes as long as 48 + 2500 / K
// passes over H (measured, AVX2: 204, 126, 87, 64 and 53 at K = 16, 32, 64, 128 and 256), of which
// Chebyshev takes one a step.
template <class Vec, class S>
void choose_step_solver(StepToken<S>& token, const HeadInputs& in) {
  token.solver = in.solver;
  if (in.solver == Solver::direct) return;
  token.num_iter = in.num_iter != 0 && in.solver != Solver::automatic
                       ? in.num_iter
                       : counted_chebyshev_steps<Vec>(token.ridge, in.tolerance);
  if (in.solver != Solver::automatic) return;
  const bool iterate = token.num_iter < 48.0 + 2500.0 / static_cast<double>(in.K);
  token.solver = iterate ? Solver::chebyshev : Solver::direct;
  if (!iterate) token.num_iter = 0;
}

// The token's system, by its solver; returns which of x and other has the solution.
template <class Vec, class S>
typename Vec::Elem* solve_step(const StepToken<S>& token, const SystemMatrix<S>& matrix,
                               const StepWork<typename Vec::Elem>& work, typename Vec::Elem* x,
                               typename Vec::Elem* other) {
  switch (token.solver) {
    case Solver::direct:
      direct_step<Vec>(token, matrix.h, matrix.ld, matrix.K, matrix.Kp, work, x, other);
      return x;
    case Solver::cg:
      cg_step<Vec>(token, matrix, work, x, other);
      return x;
    case Solver::chebyshev:
    case Solver::automatic:  // resolved before (choose_step_solver)
      break;
  }
  return chebyshev_step<Vec>(token, matrix, x, other);
}

}  // namespace kalmanet::cpu
