// The inverse of a Cholesky factor, grown by kLanes rows at a time.
//
// With A = [A11 a; a^T d] and L11^{-1} known, X = L11^{-1} a, C C^T = d - X^T X:
//
//   L^{-1} = [ L11^{-1}                 0      ]
//            [ -C^{-1} X^T L11^{-1}     C^{-1} ]
//
// Both products have the new rows in lanes. n rows take 2 n^3 / 3 operations, all of them lane
// products but for the kLanes x kLanes factors.
//
// Why the factor and not A^{-1}: A^{-1} rounded to float32 has errors of eps / smallest eigenvalue
// in every direction, also where A is large and the solution is read by U. L^{-T} (L^{-1} b) has
// the errors of a Cholesky solve, at the same cost.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/lanes.hpp"

namespace kalmanet::cpu {

template <class Elem>
struct InverseFactor {
  Elem* rows;  // L^{-1}, row-major; zeros above the diagonal inside blocks of kLanes
  int64_t ld;
};

// C^{-1} of one block, C C^T = d, in float64: a small share of the work, and all later rows stand
// on it. Elimination on [d | I], row by row, reading d's upper triangle: with the pivots p_c, d
// becomes P C'^T (C' = C P^{-1/2}) and I becomes C'^{-1}; its rows over sqrt(p_c) are C^{-1}'s. So
// one division a row is all that the next row waits for.
template <class Vec>
void invert_cholesky_block(double (&d)[kLanes][kLanes], double (&inverse)[kLanes][kLanes]) {
  using Wide = typename Vec::Wide;
  using Reg = typename Wide::Reg;
  constexpr int W = Wide::kWidth, kRegs = kLanes / W;
  for (int64_t c = 0; c < kLanes; ++c) {
    for (int64_t j = 0; j < kLanes; ++j) inverse[c][j] = c == j ? 1.0 : 0.0;
  }
  for (int64_t c = 0; c < kLanes; ++c) {
    Reg row[kRegs], inverse_row[kRegs];
#pragma GCC unroll 8
    for (int v = 0; v < kRegs; ++v) {
      row[v] = Wide::load(&d[c][v * W]);
      inverse_row[v] = Wide::load(&inverse[c][v * W]);
    }
    const double over_pivot = 1.0 / d[c][c];
    for (int64_t i = c + 1; i < kLanes; ++i) {
      const Reg f = Wide::set1(d[c][i] * over_pivot);
#pragma GCC unroll 8
      for (int v = 0; v < kRegs; ++v) {
        // Columns up to c are done with; the inverse has none yet beyond c.
        if ((v + 1) * W > c) {
          Wide::store(&d[i][v * W], Wide::fnma(f, row[v], Wide::load(&d[i][v * W])));
        }
        if (v * W <= c) {
          Wide::store(&inverse[i][v * W],
                      Wide::fnma(f, inverse_row[v], Wide::load(&inverse[i][v * W])));
        }
      }
    }
  }
  for (int64_t c = 0; c < kLanes; ++c) {
    const Reg scale = Wide::set1(1.0 / std::sqrt(d[c][c]));
    for (int v = 0; v < kRegs; ++v) {
      double* const at = &inverse[c][v * W];
      Wide::store(at, Wide::mul(scale, Wide::load(at)));
    }
  }
}

// Y[n][t] = sum_{c <= n} L^{-1}(n, c) B[c][t] for n < rows: epilogue(at, lane, register).
template <class Vec, class B, class Epilogue>
KALMANET_INLINE void apply_lower(const InverseFactor<typename Vec::Elem>& f, int64_t rows,
                                 const B* b, Epilogue&& epilogue) {
  using T = Tile<Vec>;
  for (int64_t n = 0; n < rows; n += T::kRows) {
    T tile;
    tile.clear();
    tile.template accumulate<true>(f.rows + n * f.ld, f.ld, n + T::kRows, b);
    tile.each([&](int64_t offset, int lane, typename Vec::Reg acc) {
      epilogue(n * kLanes + offset, lane, acc);
    });
  }
}

// Y[n][t] = sum_{c >= n} L^{-1}(c, n) B[c][t]: the transpose.
template <class Vec, class Epilogue>
KALMANET_INLINE void apply_upper(const InverseFactor<typename Vec::Elem>& f, int64_t rows,
                                 const typename Vec::Elem* b, Epilogue&& epilogue) {
  using T = Tile<Vec>;
  for (int64_t n = 0; n < rows; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(f.rows + n * f.ld + n, f.ld, rows - n, b + n * kLanes);
    tile.each([&](int64_t offset, int lane, typename Vec::Reg acc) {
      epilogue(n * kLanes + offset, lane, acc);
    });
  }
}

// Rows [from, from + kLanes) for the columns a [from + kLanes][new row] of A, the diagonal block
// included. `x`: as large as a.
template <class Vec>
void append_rows(const InverseFactor<typename Vec::Elem>& f, int64_t from,
                 const typename Vec::Elem* a, typename Vec::Elem* x) {
  using Elem = typename Vec::Elem;
  using Reg = typename Vec::Reg;
  using T = Tile<Vec>;
  apply_lower<Vec>(f, from, a, [&](int64_t at, int, Reg acc) { Vec::store(x + at, acc); });
  double d[kLanes][kLanes], inverse[kLanes][kLanes];
  alignas(64) Elem block[kLanes * kLanes];
  for (int64_t n = 0; n < kLanes; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(x + n, kLanes, from, x);
    tile.store(block + n * kLanes);
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t at = i * kLanes + j;
      d[i][j] = static_cast<double>(a[from * kLanes + at]) - block[at];
    }
  }
  invert_cholesky_block<Vec>(d, inverse);
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      f.rows[(from + i) * f.ld + from + j] = static_cast<Elem>(inverse[i][j]);
      block[j * kLanes + i] = static_cast<Elem>(-inverse[i][j]);
    }
  }
  // L11^{-T} X has the new rows in lanes; times -C^{-T}, a row of L^{-1} in each lane.
  alignas(64) Elem y[T::kRows * kLanes], left[T::kRows * kLanes];
  for (int64_t n = 0; n < from; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(f.rows + n * f.ld + n, f.ld, from - n, x + n * kLanes);
    tile.store(y);
    tile.clear();
    tile.template accumulate<true>(y, kLanes, kLanes, block);
    tile.store(left);
    for (int64_t i = 0; i < kLanes; ++i) {
      for (int64_t c = 0; c < T::kRows; ++c) {
        f.rows[(from + i) * f.ld + n + c] = left[c * kLanes + i];
      }
    }
  }
}

}  // namespace kalmanet::cpu
