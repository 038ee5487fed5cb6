// A Cholesky factor A = L L^T, grown by kLanes rows at a time, and the solves with it for kLanes
// right-hand sides in lanes.
//
// With A = [A11 a; a^T d] and L11 known, the new rows of L are X^T and C:
//
//   X = L11^{-1} a        C C^T = d - X^T X
//
// Of the diagonal blocks C it is C^{-1} that is kept: so both triangular solves are products of
// kLanes x kLanes blocks and nothing else, at the operations of a product by L^{-1} (n^2 for both
// of them and one right-hand side), while the factor takes n^3 / 6 multiply-adds where L^{-1}
// itself would take n^3 / 3. Rounding is that of a Cholesky solve.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"
#include "cpu/transpose.hpp"

namespace kalmanet::cpu {

// L lies in memory twice, as each of the two substitutions streams through it: a product that reads
// a row of its matrix a broadcast takes half as long again as one that reads a column.
template <class Elem>
struct BlockCholesky {
  Elem* rows;     // row-major: L's blocks below the diagonal, C^{-1} on it
  Elem* columns;  // the same, transposed, block row after block row: [n + kLanes][row]
  int64_t ld;

  KALMANET_INLINE Elem* columns_of(int64_t n) const { return columns + n * (n + kLanes) / 2; }
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

// Y = L^{-1} B for the first `rows` rows, by forward substitution: Y_n = C_n^{-1} (B_n - sum_{m<n}
// L_nm Y_m). y may be b.
template <class Vec, class B>
void solve_lower(const BlockCholesky<typename Vec::Elem>& f, int64_t rows, const B* b,
                 typename Vec::Elem* y) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  alignas(64) typename Vec::Elem left[kLanes * kLanes];
  for (int64_t n = 0; n < rows; n += kLanes) {
    const typename Vec::Elem* const columns = f.columns_of(n);
    for (int64_t r = 0; r < kLanes; r += T::kRows) {
      T tile;
      tile.clear();
      tile.accumulate(columns + r, kLanes, n, y);
      tile.each([&](int64_t offset, int, Reg acc) {
        const int64_t at = r * kLanes + offset;
        Vec::store(left + at, Vec::sub(load_as<Vec>(b + n * kLanes + at), acc));
      });
    }
    for (int64_t r = 0; r < kLanes; r += T::kRows) {
      T tile;
      tile.clear();
      tile.accumulate(columns + n * kLanes + r, kLanes, r + T::kRows, left);
      tile.store(y + (n + r) * kLanes);
    }
  }
}

// Y = L^{-T} B likewise, backwards: Y_n = C_n^{-T} (B_n - sum_{m>n} L_mn^T Y_m); each register of Y
// also goes to epilogue(at, lane, register).
template <class Vec, class Epilogue>
KALMANET_INLINE void solve_upper(const BlockCholesky<typename Vec::Elem>& f, int64_t rows,
                                 const typename Vec::Elem* b, typename Vec::Elem* y,
                                 Epilogue&& epilogue) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  alignas(64) typename Vec::Elem left[kLanes * kLanes];
  for (int64_t n = rows - kLanes; n >= 0; n -= kLanes) {
    const int64_t next = n + kLanes;
    for (int64_t r = 0; r < kLanes; r += T::kRows) {
      T tile;
      tile.clear();
      tile.accumulate(f.rows + next * f.ld + n + r, f.ld, rows - next, y + next * kLanes);
      tile.each([&](int64_t offset, int, Reg acc) {
        const int64_t at = r * kLanes + offset;
        Vec::store(left + at, Vec::sub(Vec::load(b + n * kLanes + at), acc));
      });
    }
    for (int64_t r = 0; r < kLanes; r += T::kRows) {
      T tile;
      tile.clear();
      tile.accumulate(f.rows + (n + r) * f.ld + n + r, f.ld, kLanes - r, left + r * kLanes);
      tile.each([&](int64_t offset, int lane, Reg acc) {
        const int64_t at = (n + r) * kLanes + offset;
        Vec::store(y + at, acc);
        epilogue(at, lane, acc);
      });
    }
  }
}

// Rows [from, from + kLanes) for the columns a [from + kLanes][new row] of A, the diagonal block
// included.
template <class Vec>
void append_rows(const BlockCholesky<typename Vec::Elem>& f, int64_t from,
                 const typename Vec::Elem* a) {
  using Elem = typename Vec::Elem;
  Elem* const x = f.columns_of(from);
  solve_lower<Vec>(f, from, a, x);
  alignas(64) Elem block[kLanes * kLanes];
  lanes_product<Vec>(x, kLanes, from, kLanes, x, block);
  double d[kLanes][kLanes], inverse[kLanes][kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t at = i * kLanes + j;
      d[i][j] = static_cast<double>(a[from * kLanes + at]) - block[at];
    }
  }
  invert_cholesky_block<Vec>(d, inverse);
  Elem* const rows = f.rows + from * f.ld;
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      rows[i * f.ld + from + j] = x[(from + j) * kLanes + i] = static_cast<Elem>(inverse[i][j]);
    }
  }
  for (int64_t c = 0; c < from; c += kLanes) {
    transpose_block<Vec>(
        [&](int at, int i) { return Vec::load(x + (c + at) * kLanes + i); },
        [&](int i, int at, typename Vec::Reg r) { Vec::store(rows + i * f.ld + c + at, r); });
  }
}

}  // namespace kalmanet::cpu
