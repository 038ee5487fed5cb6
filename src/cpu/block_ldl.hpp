// A = L diag(D)^{-1} L^T of a symmetric positive definite matrix, by blocks of kLanes rows and
// columns: each block is one rank-kLanes update of the rest, which runs at the rate of a matrix
// product. For one right-hand side: n^3 / 3 operations.
//
// In place on a row-major [n][n] matrix (n a multiple of kLanes) of which only the block lower
// triangle is read and written. Eliminating block k, with D = A_kk^{-1}, for i, j > k:
//
//   A_ij <- A_ij - A_ik D A_kj       A_ik <- L_ik = A_ik D       A_kk <- D
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/lanes.hpp"

namespace kalmanet::cpu {

// The inverse of a symmetric positive definite [kLanes][kLanes] block, in float64 whatever the
// matrix has: it is a hundredth of the work and what the rest inherits its error from.
template <class Vec>
void invert_block(double (&d)[kLanes][kLanes]) {
  for (int64_t p = 0; p < kLanes; ++p) {
    const double pivot = 1.0 / d[p][p];
    for (int64_t j = 0; j < kLanes; ++j) d[p][j] *= pivot;
    d[p][p] = pivot;
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i == p) continue;
      const double f = d[i][p];
      d[i][p] = 0.0;
      for (int64_t j = 0; j < kLanes; ++j) d[i][j] -= f * d[p][j];
    }
  }
}

// What one elimination needs beside the matrix: two panels [kLanes][n].
template <class Elem>
struct EliminationPanels {
  Elem* column;    // A_:k transposed: [j][row]
  Elem* weighted;  // -(A_:k D) transposed
};

template <class Vec>
void eliminate_block(typename Vec::Elem* a, int64_t n, int64_t k,
                     const EliminationPanels<typename Vec::Elem>& panels) {
  using Elem = typename Vec::Elem;
  using Reg = typename Vec::Reg;
  const int64_t k0 = k * kLanes, next = k0 + kLanes;
  double inverse[kLanes][kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) inverse[i][j] = a[(k0 + i) * n + k0 + j];
  }
  invert_block<Vec>(inverse);
  alignas(64) Elem d[kLanes * kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      d[i * kLanes + j] = a[(k0 + i) * n + k0 + j] = static_cast<Elem>(inverse[i][j]);
    }
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    for (int64_t i = next; i < n; ++i) panels.column[j * n + i] = a[i * n + k0 + j];
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    for (int64_t i = next; i < n; i += Vec::kWidth) {
      Reg sum = Vec::zero();
      for (int64_t c = 0; c < kLanes; ++c) {
        sum = Vec::fnma(Vec::set1(d[j * kLanes + c]), Vec::load(panels.column + c * n + i), sum);
      }
      Vec::store(panels.weighted + j * n + i, sum);
    }
  }
  for (int64_t i = next; i < n; i += kLanes) {
    Elem* const rest = a + i * n + next;
    rank_update<Vec>(rest, {rest, Elem{1}}, n, kLanes, i + kLanes - next, panels.weighted + i, n,
                     panels.column + next, n, kLanes);
    for (int64_t j = 0; j < kLanes; ++j) {
      for (int64_t r = 0; r < kLanes; ++r) {
        a[(i + r) * n + k0 + j] = -panels.weighted[j * n + i + r];
      }
    }
  }
}

// A <- its block factors, for solve_factored.
template <class Vec>
void factor_symmetric(typename Vec::Elem* a, int64_t n,
                      const EliminationPanels<typename Vec::Elem>& panels) {
  for (int64_t k = 0; k < n / kLanes; ++k) eliminate_block<Vec>(a, n, k, panels);
}

// x <- A^{-1} x with the factors of factor_symmetric.
template <class Vec>
void solve_factored(const typename Vec::Elem* a, int64_t n, typename Vec::Elem* x) {
  using Elem = typename Vec::Elem;
  using Reg = typename Vec::Reg;
  const int64_t blocks = n / kLanes;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = b * kLanes; b > 0 && i < (b + 1) * kLanes; ++i) {
      Reg sum = Vec::zero();
      const Elem* row = a + i * n;
      for (int64_t j = 0; j < b * kLanes; j += Vec::kWidth) {
        sum = Vec::fma(Vec::load(row + j), Vec::load(x + j), sum);
      }
      alignas(64) Elem parts[Vec::kWidth];
      Vec::store(parts, sum);
      Elem total = 0;
      for (int64_t j = 0; j < Vec::kWidth; ++j) total += parts[j];
      x[i] -= total;
    }
  }
  for (int64_t b = blocks - 1; b >= 0; --b) {
    Elem* xb = x + b * kLanes;
    Elem z[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const Elem* row = a + (b * kLanes + i) * n + b * kLanes;
      Elem sum = 0;
      for (int64_t j = 0; j < kLanes; ++j) sum += row[j] * xb[j];
      z[i] = sum;
    }
    for (int64_t i = 0; i < kLanes; ++i) xb[i] = z[i];
  }
  for (int64_t b = blocks - 1; b > 0; --b) {
    for (int64_t i = b * kLanes; i < (b + 1) * kLanes; ++i) {
      const Elem* row = a + i * n;
      const Reg xi = Vec::set1(x[i]);
      for (int64_t j = 0; j < b * kLanes; j += Vec::kWidth) {
        Vec::store(x + j, Vec::fnma(xi, Vec::load(row + j), Vec::load(x + j)));
      }
    }
  }
}

}  // namespace kalmanet::cpu
