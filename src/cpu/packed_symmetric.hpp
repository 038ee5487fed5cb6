// A symmetric matrix as the blocks of its lower triangle, for the solver of one token: half the
// bytes a product reads. At K = 128 in float32 that is 36 KiB instead of 64, which a first-level
// cache of 48 KiB keeps from one iteration to the next.
#pragma once

#include <cstdint>

#include "cpu/lanes.hpp"

namespace kalmanet::cpu {

// Blocks are W x W, W the lanes of a register: block (i, j), j <= i, row-major, after the
// i (i + 1) / 2 + j blocks before it. Diagonal blocks are stored whole.
template <class Vec>
constexpr int64_t packed_row_begin(int64_t i) {
  return i * (i + 1) / 2 * Vec::kWidth * Vec::kWidth;
}

// Elements for n rows, a multiple of kLanes, whatever the vector type: W is kLanes at most.
constexpr int64_t packed_elems(int64_t n) {
  return n * (n + kLanes) / 2;
}

// Whether products by a packed matrix of n rows are faster than by the whole one, by measurement
// (one product, time of the whole matrix / of the packed one, on a processor with 48 KiB of
// first-level and 1 MiB of second-level cache):
//
//   n               32    64    128   256
//   AVX-512 float   1.03  1.15  1.75  2.45
//   AVX-512 double  0.84  0.67  2.29  2.38
//   AVX2 float      0.86  0.67  0.93  1.22
//   AVX2 double     0.61  0.64  1.14  1.14
//   baseline        0.63  0.67  0.75  0.72
//
// Registers of 16 lanes gain everywhere, those of 8 and of 4 float64 where the whole matrix leaves
// the first-level cache far behind; narrower ones spend more on broadcasts than they save.
template <class Vec>
constexpr bool packing_pays(int64_t n) {
  constexpr int64_t kElem = sizeof(typename Vec::Elem);
  if (Vec::kWidth * kElem < 32) return false;
  return Vec::kWidth == 16 ? n >= 64 : n * n * kElem >= (int64_t{128} << 10);
}

// y = M x for the packed M of n rows (a multiple of W). A block below the diagonal is read once and
// used twice: y_j += B^T x_i is a multiply-add a row with x_i[r] broadcast, and y_i += B x_j one
// with x_j, whose lanes are added up only once a row of blocks (Vec::sum_each). So a register of
// M costs two multiply-adds and two loads (it and the broadcast): on AVX-512 both ports of either
// are busy, and 16 sums of rows, 4 of columns, x_j and the register itself fit 32 registers; on
// AVX2 8 + 4 + 2 fit 16.
template <class Vec>
void packed_product(const typename Vec::Elem* m, int64_t n, const typename Vec::Elem* x,
                    typename Vec::Elem* y) {
  using Reg = typename Vec::Reg;
  constexpr int W = Vec::kWidth;
  // Sums of columns in flight: with the W of rows, enough to hide a latency of 4 cycles.
  constexpr int kColumns = W < 4 ? W : 4;
  for (int64_t i = 0; i < n; i += W) {
    const typename Vec::Elem* xi = x + i;
    Reg row[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) row[r] = Vec::zero();
    for (int64_t j = 0; j < i; j += W, m += W * W) {
      const Reg xj = Vec::load(x + j);
      Reg column[kColumns];
      column[0] = Vec::load(y + j);
#pragma GCC unroll 4
      for (int c = 1; c < kColumns; ++c) column[c] = Vec::zero();
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        const Reg b = Vec::load(m + r * W);
        row[r] = Vec::fma(b, xj, row[r]);
        column[r % kColumns] = Vec::fma(b, Vec::set1(xi[r]), column[r % kColumns]);
      }
#pragma GCC unroll 4
      for (int c = kColumns / 2; c > 0; c /= 2) {
#pragma GCC unroll 4
        for (int k = 0; k < c; ++k) column[k] = Vec::add(column[k], column[k + c]);
      }
      Vec::store(y + j, column[0]);
    }
    Reg diagonal[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) diagonal[c] = Vec::zero();
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      diagonal[r % kColumns] =
          Vec::fma(Vec::load(m + r * W), Vec::set1(xi[r]), diagonal[r % kColumns]);
    }
    m += W * W;
#pragma GCC unroll 4
    for (int c = kColumns / 2; c > 0; c /= 2) {
#pragma GCC unroll 4
      for (int k = 0; k < c; ++k) diagonal[k] = Vec::add(diagonal[k], diagonal[k + c]);
    }
    Vec::store(y + i, Vec::add(diagonal[0], Vec::sum_each(row)));
  }
}

}  // namespace kalmanet::cpu
