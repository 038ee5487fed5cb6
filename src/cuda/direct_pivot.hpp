// What one warp does to 16 x 16 numbers in float32: the inverse of a pivot, and the inverse
// Cholesky factor of one.
//
// Lane l has column l % 16 of the matrix, rows 8 (l / 16) .. of it. It is symmetric, so a row that
// is eliminated lies across the lanes and says at once what every lane needs of it: the multiples
// (the row's elements of the lane's own rows) and what they multiply (of the lane's column). Two
// rows at a time go through shared memory: one store and six loads, where shuffles would be 23.
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

  // own, pivots, rows <- of rows k = 8 half + 2 pair and k + 1. Rows go round by two after each
  // pair, so that a loop over pairs needs no register by number: column[i] is row i + 2 pair of the
  // lane's, modulo 8.
  KALMANET_KERNEL void share_rows(int half, int pair) {
    const int k = 8 * half + 2 * pair;
    float (&line)[16][2] = shared.line[pair % 2];
    group.each([&](int thread, Registers& r) {
      if (thread % 32 / 16 != half) return;
      line[thread % 16][0] = r.column[0];
      line[thread % 16][1] = r.column[1];
    });
    group.barrier_warp();
    group.each([&](int thread, Registers& r) {
      r.own[0] = line[thread % 16][0], r.own[1] = line[thread % 16][1];
      load4(line[k], r.pivots);
      KALMANET_UNROLL
      for (int i = 0; i < 8; i += 2) {
        float v[4];
        load4(line[thread % 32 / 16 * 8 + (i + 2 * pair) % 8], v);
        r.rows[i][0] = v[0], r.rows[i][1] = v[1], r.rows[i + 1][0] = v[2], r.rows[i + 1][1] = v[3];
      }
    });
  }
  // Where a pair leaves its rows, which go to the end.
  static KALMANET_KERNEL void turn_rows(Registers& r) {
    const float first = r.column[0], second = r.column[1];
    KALMANET_UNROLL
    for (int i = 0; i < 6; ++i) r.column[i] = r.column[i + 2];
    r.column[6] = first, r.column[7] = second;
  }

  // column <- that of minus the inverse: sweeps (direct_inverse.hpp) of two rows and columns.
  KALMANET_KERNEL void sweep_pivot() {
    KALMANET_LOOP  // an eighth of the code
        for (int step = 0; step < 8; ++step) {
      const int half = step / 4, pair = step % 4;
      share_rows(half, pair);
      group.each([&](int thread, Registers& r) {
        const int k = 8 * half + 2 * pair, c = thread % 16;
        const float a = r.pivots[0], b = r.pivots[1], d = r.pivots[3];
        const float inverse = divide(1.0f, a * d - b * b);
        const float e00 = d * inverse, e01 = -b * inverse, e11 = a * inverse;
        float g0 = r.own[0] * e00 + r.own[1] * e01, g1 = r.own[0] * e01 + r.own[1] * e11;
        if (c == k) g0 = -e00, g1 = -e01;
        if (c == k + 1) g0 = -e01, g1 = -e11;
        const float keep = c == k || c == k + 1 ? 0.0f : 1.0f;
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) {
          r.column[i] = keep * r.column[i] - r.rows[i][0] * g0 - r.rows[i][1] * g1;
        }
        if (thread % 32 / 16 == half) r.column[0] = g0, r.column[1] = g1;
        turn_rows(r);
      });
    }
  }

  // column <- that of the inverse Cholesky factor, lower triangular: elimination of two rows at a
  // time from what is below them; where it leaves zeros the unit triangular inverse grows.
  KALMANET_KERNEL void eliminate_pivot() {
    KALMANET_LOOP
    for (int step = 0; step < 8; ++step) {
      const int half = step / 4, pair = step % 4;
      share_rows(half, pair);
      group.each([&](int thread, Registers& r) {
        const int k = 8 * half + 2 * pair, c = thread % 16, mine = thread % 32 / 16;
        const float a = r.pivots[0], b = r.pivots[1], d = r.pivots[3];
        const float inverse = divide(1.0f, a * d - b * b), l = divide(b, a);
        const float e00 = d * inverse, e01 = -b * inverse, e11 = a * inverse;
        if (c == k) r.own[0] = 1, r.own[1] = 0, r.diagonal = a;
        if (c == k + 1) r.own[0] = 0, r.own[1] = 1, r.diagonal = d - l * b;
        const bool pivot = c == k || c == k + 1;
        const float g0 = r.own[0] * e00 + r.own[1] * e01, g1 = r.own[0] * e01 + r.own[1] * e11;
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) {
          const bool below = mine > half || (mine == half && i > 1 && i < 8 - 2 * pair);
          const float e = r.column[i], kept = pivot ? 0.0f : e;
          r.column[i] = below ? kept - r.rows[i][0] * g0 - r.rows[i][1] * g1 : e;
        }
        if (mine == half) {
          r.column[0] = r.own[0];
          r.column[1] = r.own[1] - l * r.own[0];
        }
        turn_rows(r);
      });
    }
    // Rows divided by sqrt(d), nothing above the diagonal.
    float (&line)[16][2] = shared.line[0];
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
