// What one warp does to 16 x 16 numbers in float32: the inverse of a pivot, and the inverse
// Cholesky factor of one.
//
// Lane l has column l % 16 of the matrix, rows 8 (l / 16) .. of it. It is symmetric, so a row that
// is eliminated lies across the lanes and says at once what every lane needs of it: the multiples
// (the row's elements of the lane's own rows) and what they multiply (of the lane's column). Four
// rows at a time go through shared memory; each lane factors their 4 x 4 for itself.
#pragma once

#include "cuda/direct_kernel.hpp"

namespace kalmanet::cuda {

template <class Group, class Traits = DirectTraits>
struct DirectPivot : DirectProducts<Group, Traits> {
  using Base = DirectProducts<Group, Traits>;
  using Base::group, Base::shared;
  using Registers = typename Traits::Registers;

  // The warp's sums of(registers, tile), two tiles, by columns.
  template <class Of>
  KALMANET_KERNEL void take_pivot(Of&& of) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) {
        shared.square[this->row_of(thread, i % 4)][this->column_of(thread, i / 4, i)] =
            of(r, i / 4)[i % 4];
      }
    });
    group.barrier_warp();
    group.each([&](int thread, Registers& r) {  // (by rows: the same)
      float v[2][4];
      load4(&shared.square[thread % 16][thread % 32 / 16 * 8], v[0]);
      load4(&shared.square[thread % 16][thread % 32 / 16 * 8 + 4], v[1]);
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) r.column[i] = v[i / 4][i % 4];
      r.diagonal = 1.0f;
    });
  }

  // own, pivots <- of rows 4 step .. . Rows go round by four after each step, so that a loop needs
  // no register by number: column[i] is row i + 4 (step % 2) of the lane's, modulo 8.
  KALMANET_KERNEL void share_rows(int step) {
    float (&line)[16][4] = shared.line[step % 2];
    group.each([&](int thread, Registers& r) {
      if (thread % 32 / 16 != step / 2) return;
      const float v[4] = {r.column[0], r.column[1], r.column[2], r.column[3]};
      store4(line[thread % 16], v);
    });
    group.barrier_warp();
    group.each([&](int thread, Registers& r) {
      load4(line[thread % 16], r.own);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) load4(line[4 * step + i], r.pivots[i]);
    });
  }

  // Rows 4 step .. taken out. L D L^T of their 4 x 4 gives y = L^{-1} own and g = L^{-T} D^{-1} y;
  // the rows become y (of the rows below alone g's multiples are taken off) or, in a sweep
  // (direct_inverse.hpp), g. In the rows' own columns `own` counts as a column of I, or of -I.
  template <bool kSweep>
  KALMANET_KERNEL void take_out(int step) {
    share_rows(step);
    group.each([&](int thread, Registers& r) {
      const int mine = thread % 32 / 16, column = thread % 16 - 4 * step;
      const bool pivot = column >= 0 && column < 4;
      const float one = kSweep ? -1.0f : 1.0f;
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        r.own[i] = pivot ? (column == i ? one : 0.0f) : r.own[i];
      }
      const float (&p)[4][4] = r.pivots;
      float d[4], inverse[4], l[4][4];
      KALMANET_UNROLL
      for (int k = 0; k < 4; ++k) {  // columns of L; rows below as they are left
        KALMANET_UNROLL
        for (int i = k; i < 4; ++i) {
          float left = p[i][k];
          KALMANET_UNROLL
          for (int m = 0; m < k; ++m) left -= l[i][m] * (l[k][m] * d[m]);
          if (i == k) {
            d[k] = left;
            inverse[k] = divide(1.0f, left);
          } else {
            l[i][k] = left * inverse[k];
          }
        }
      }
      float y[4], g[4];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        y[i] = r.own[i];
        KALMANET_UNROLL
        for (int m = 0; m < i; ++m) y[i] -= l[i][m] * y[m];
      }
      KALMANET_UNROLL
      for (int i = 3; i >= 0; --i) {
        g[i] = y[i] * inverse[i];
        KALMANET_UNROLL
        for (int m = i + 1; m < 4; ++m) g[i] -= l[m][i] * g[m];
      }
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (!kSweep && column == i) r.diagonal = d[i];
      }
      const float keep = pivot ? 0.0f : 1.0f;
      const bool all = kSweep || mine > step / 2;
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) {
        float row[4];
        load4(shared.line[step % 2][8 * mine + (i + 4 * step) % 8], row);
        const float e =
            keep * r.column[i] - row[0] * g[0] - row[1] * g[1] - row[2] * g[2] - row[3] * g[3];
        const bool below = i > 3 && mine == step / 2 && step % 2 == 0;
        r.column[i] = all || below ? e : r.column[i];
      }
      float first[4];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        first[i] = mine == step / 2 ? (kSweep ? g[i] : y[i]) : r.column[i];
        r.column[i] = r.column[i + 4];
      }
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.column[i + 4] = first[i];
    });
  }

  // column <- that of minus the inverse.
  KALMANET_KERNEL void sweep_pivot() {
    KALMANET_LOOP  // a quarter of the code
        for (int step = 0; step < 4; ++step) take_out<true>(step);
  }

  // column <- that of the inverse Cholesky factor, lower triangular: elimination; where it leaves
  // zeros the unit triangular inverse grows.
  KALMANET_KERNEL void eliminate_pivot() {
    KALMANET_LOOP
    for (int step = 0; step < 4; ++step) take_out<false>(step);
    // Rows divided by sqrt(d), nothing above the diagonal.
    float (&line)[16][4] = shared.line[0];
    group.each([&](int thread, Registers& r) {
      if (thread % 32 < 16) line[thread % 16][0] = divide(1.0f, sqrtf(r.diagonal));
    });
    group.barrier_warp();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int row = thread % 32 / 16 * 8 + i;
        r.column[i] = row >= thread % 16 ? r.column[i] * line[row][0] : 0.0f;
      }
    });
  }

  // The columns, times `sign`, into quads, high and low: as rows of their transpose.
  KALMANET_KERNEL void put_pivot(Quad& high, Quad& low, float sign) {
    group.each([&](int thread, Registers& r) {
      const int row = thread % 16, m = row / 8 * 2 + thread % 32 / 16;
      uint32_t first[4], second[4];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        first[i] = split_float16(sign * r.column[2 * i], sign * r.column[2 * i + 1], second[i]);
      }
      store16(&high.word[m][row % 8 * 4], first);
      store16(&low.word[m][row % 8 * 4], second);
    });
  }
};

}  // namespace kalmanet::cuda
