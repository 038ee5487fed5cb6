// The small matrix products everything is made of. Two layouts:
//   "lanes":  [rows][kLanes], one token a lane: element (c, t) of a chunk at c * kLanes + t
//   "rows":   [tokens][padded], token by token
// A product Y[n][t] = sum_c A(c, n) X[c][t] broadcasts the elements of A, which is streamed once,
// and keeps a block of rows of Y in registers; tokens stay in their lanes, so every number that
// belongs to a token (decay, step size, ridge) is a plain vector.
//
// Everything here is a template over the vector type, also what uses none: each instruction set's
// file compiles its own copy, and the linker can never hand one processor the code of another.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.hpp"
#include "cpu/rows.hpp"

namespace kalmanet::cpu {

// A register of a vector type from memory of either precision, and to it.
template <class Vec>
KALMANET_INLINE typename Vec::Reg load_as(const float* p) {
  return Vec::load_f32(p);
}
template <class Vec>
KALMANET_INLINE typename Vec::Reg load_as(const double* p) {
  return Vec::load(p);
}
template <class Vec>
KALMANET_INLINE void store_as(float* p, typename Vec::Reg a) {
  Vec::store_f32(p, a);
}
template <class Vec>
KALMANET_INLINE void store_as(double* p, typename Vec::Reg a) {
  Vec::store(p, a);
}

// Whether a wider precision than Vec's is there for what Vec's rounding would spoil: so for the
// kernels of float32 storage, not for those of float64.
template <class Vec>
inline constexpr bool kHasWider = sizeof(typename Vec::Elem) < sizeof(typename Vec::Wide::Elem);

template <class Vec>
struct Tile {
  using Reg = typename Vec::Reg;
  using Elem = typename Vec::Elem;
  static constexpr int kVecs = kLanes / Vec::kWidth;  // registers a row of lanes
  // Rows of Y in registers. A fused multiply-add has a latency of 4 cycles and at most two start a
  // cycle, so at least 8 accumulators are needed; beside them kVecs registers hold X and one the
  // broadcast. AVX-512: 16 accumulators of 32 registers; AVX2: 8 + 2 + 1 of 16; SSE: 8 + 4 + 1
  // of 16.
  // With float64 lanes the same registers hold half as many rows.
  static constexpr int kRows = (Vec::kRegisters == 32 ? 16 : 8) / kVecs;
  static_assert(kLanes % kRows == 0);

  Reg acc[kRows][kVecs];

  KALMANET_INLINE void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::zero();
    }
  }

  // acc[r][t] += sum_{c < inner} A(c, r) X[c][t], A(c, r) = a[c * ld + r], or a[r * ld + c]
  // transposed.
  template <bool kTransposed = false, class S, class X>
  KALMANET_INLINE void accumulate(const S* a, int64_t ld, int64_t inner, const X* x) {
    for (int64_t c = 0; c < inner; ++c) {
      Reg xc[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) xc[v] = load_as<Vec>(x + c * kLanes + v * Vec::kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Reg b = Vec::set1(static_cast<Elem>(kTransposed ? a[r * ld + c] : a[c * ld + r]));
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::fma(b, xc[v], acc[r][v]);
      }
    }
  }

  // acc[r][t] *= lane[t]
  template <class S>
  KALMANET_INLINE void scale_lanes(const S* lane) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = Vec::mul(acc[r][v], load_as<Vec>(lane + v * Vec::kWidth));
      }
    }
  }

  // f(r, offset, acc) for each register: offset = row r's lanes and within them the register's
  // first.
  template <class F>
  KALMANET_INLINE void each(F&& f) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) f(r * kLanes + v * Vec::kWidth, v * Vec::kWidth, acc[r][v]);
    }
  }

  // y[r][t] = acc
  KALMANET_INLINE void store(Elem* y) {
    each([&](int64_t offset, int, Reg a) { Vec::store(y + offset, a); });
  }
};

// Y[n][t] = sum_{c < inner} A(c, n) X[c][t] for n < rows (a multiple of kLanes).
template <class Vec, bool kTransposed = false, class S, class X>
void lanes_product(const S* a, int64_t ld, int64_t inner, int64_t rows, const X* x,
                   typename Vec::Elem* y) {
  using T = Tile<Vec>;
  for (int64_t n = 0; n < rows; n += T::kRows) {
    T tile;
    tile.clear();
    tile.template accumulate<kTransposed>(kTransposed ? a + n * ld : a + n, ld, inner, x);
    tile.store(y + n * kLanes);
  }
}

// Y[n][t] = gain[n][t] * sum_{c < inner} A[c][n] X[c][t] for kLanes rows n: masked token-by-token
// products.
template <class Vec, class S>
void gained_product(const S* a_lanes, int64_t inner, const typename Vec::Elem* x, const S* gain,
                    typename Vec::Elem* y) {
  using T = Tile<Vec>;
  for (int64_t n = 0; n < kLanes; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(a_lanes + n, kLanes, inner, x);
    tile.each([&](int64_t offset, int, typename Vec::Reg acc) {
      const int64_t at = n * kLanes + offset;
      Vec::store(y + at, Vec::mul(acc, load_as<Vec>(gain + at)));
    });
  }
}

// dot[t] = sum_n A[n][t] B[n][t], in float64: these sums feed norms and gate gradients. Even and
// odd rows apart, so that no sum waits for the one before.
template <class Vec, class A, class B>
void lanes_dot(const A* a, const B* b, int64_t rows, double* dot) {
  double even[kLanes] = {}, odd[kLanes] = {};
  int64_t n = 0;
  for (; n + 2 <= rows; n += 2) {
    const A* pa = a + n * kLanes;
    const B* pb = b + n * kLanes;
    for (int64_t t = 0; t < kLanes; ++t) even[t] += static_cast<double>(pa[t]) * pb[t];
    for (int64_t t = 0; t < kLanes; ++t) {
      odd[t] += static_cast<double>(pa[kLanes + t]) * pb[kLanes + t];
    }
  }
  if (n < rows) {
    for (int64_t t = 0; t < kLanes; ++t) {
      even[t] += static_cast<double>(a[n * kLanes + t]) * b[n * kLanes + t];
    }
  }
  for (int64_t t = 0; t < kLanes; ++t) dot[t] = even[t] + odd[t];
}

// What a rank update starts from: decay * from.
template <class S>
struct RankUpdateFrom {
  const S* from;
  S decay;
};

// M[c][n] = decay * from[c][n] + sum_{j < count} A[j][c] B[j][n] for c < rows, n < cols (a multiple
// of kLanes). The new terms are summed first: what many chunks have gathered is the largest, and so
// is rounded once. M and from are row-major with stride ldm, A and B with lda and ldb.
template <class Vec, int kRows, int kVecs, class S>
KALMANET_INLINE void rank_update_block(S* m, const RankUpdateFrom<S>& start, int64_t at,
                                       int64_t ldm, const S* a, int64_t lda, const S* b,
                                       int64_t ldb, int64_t count) {
  using Reg = typename Vec::Reg;
  Reg acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::zero();
  }
  for (int64_t j = 0; j < count; ++j) {
    Reg bj[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) bj[v] = Vec::load(b + j * ldb + v * Vec::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg aj = Vec::set1(a[j * lda + r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::fma(aj, bj[v], acc[r][v]);
    }
  }
  const Reg d = Vec::set1(start.decay);
  const S* const from = start.from + at;
  S* const to = m + at;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t e = r * ldm + v * Vec::kWidth;
      Vec::store(to + e, Vec::fma(d, Vec::load(from + e), acc[r][v]));
    }
  }
}

template <class Vec, int kVecs, class S>
KALMANET_INLINE void rank_update_panel(S* m, const RankUpdateFrom<S>& start, int64_t at,
                                       int64_t ldm, int64_t rows, const S* a, int64_t lda,
                                       const S* b, int64_t ldb, int64_t count) {
  // 4 rows x 4 registers of AVX-512, 4 x 2 of the others: 16 and 8 accumulators.
  const int64_t whole = rows / 4 * 4;
  for (int64_t c = 0; c < whole; c += 4) {
    rank_update_block<Vec, 4, kVecs>(m, start, at + c * ldm, ldm, a + c, lda, b, ldb, count);
  }
  for (int64_t c = whole; c < rows; ++c) {
    rank_update_block<Vec, 1, kVecs>(m, start, at + c * ldm, ldm, a + c, lda, b, ldb, count);
  }
}

// m may be start.from itself.
template <class Vec, class S>
void rank_update(S* m, const RankUpdateFrom<S>& start, int64_t ldm, int64_t rows, int64_t cols,
                 const S* a, int64_t lda, const S* b, int64_t ldb, int64_t count) {
  constexpr int kPanel = Vec::kWidth == 16 ? 4 : 2;
  constexpr int64_t kWide = kPanel * Vec::kWidth;
  int64_t n = 0;
  for (; n + kWide <= cols; n += kWide) {
    rank_update_panel<Vec, kPanel>(m, start, n, ldm, rows, a, lda, b + n, ldb, count);
  }
  for (; n < cols; n += Vec::kWidth) {
    rank_update_panel<Vec, 1>(m, start, n, ldm, rows, a, lda, b + n, ldb, count);
  }
}

// Sums over a row-major [rows, cols] block in float64 (squares of float32 numbers under- and
// overflow float32 long before the numbers do), term(c, n) from every element. Thirty-two partial
// sums, sixteen of even and sixteen of odd rows, always in the same order: fewer would wait for
// each other's additions.
template <class Vec, class Term>
KALMANET_INLINE double sum_over(int64_t rows, int64_t cols, Term&& term) {
  double sum[2][kLanes] = {};
  int64_t c = 0;
  for (; c + 2 <= rows; c += 2) {
    for (int64_t n = 0; n < cols; n += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) sum[0][i] += term(c, n + i);
      for (int64_t i = 0; i < kLanes; ++i) sum[1][i] += term(c + 1, n + i);
    }
  }
  for (; c < rows; ++c) {
    for (int64_t n = 0; n < cols; n += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) sum[0][i] += term(c, n + i);
    }
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      sum[0][i] += sum[0][i + half];
      sum[1][i] += sum[1][i + half];
    }
  }
  return sum[0][0] + sum[1][0];
}

// |M|_F^2 of a row-major [rows, cols] block, cols a multiple of kLanes.
template <class Vec, class S>
double squared_norm(const S* m, int64_t ld, int64_t rows, int64_t cols) {
  return sum_over<Vec>(rows, cols, [&](int64_t c, int64_t n) {
    const double e = m[c * ld + n];
    return e * e;
  });
}

// The same of a symmetric matrix [ld][ld] with rows < K: blocks of kLanes above the diagonal count
// twice, those below are not read.
template <class Vec, class S>
double symmetric_squared_norm(const S* m, int64_t ld, int64_t K) {
  double diagonal = 0.0, above = 0.0;
  for (int64_t c = 0; c < K; c += kLanes) {
    const int64_t rows = K - c < kLanes ? K - c : kLanes, next = c + kLanes;
    diagonal += squared_norm<Vec>(m + c * ld + c, ld, rows, kLanes);
    if (next < ld) above += squared_norm<Vec>(m + c * ld + next, ld, rows, ld - next);
  }
  return diagonal + 2.0 * above;
}

// <M, N> of two row-major [rows, cols] blocks with the same stride, cols a multiple of kLanes.
template <class Vec, class S>
double frobenius_dot(const S* m, const S* n, int64_t ld, int64_t rows, int64_t cols) {
  return sum_over<Vec>(rows, cols, [&](int64_t c, int64_t i) {
    return static_cast<double>(m[c * ld + i]) * n[c * ld + i];
  });
}

}  // namespace kalmanet::cpu
