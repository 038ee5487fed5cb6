// The two factorisations of the backward's direct solver: the inverse of a 128 x 128 matrix that
// lies in the block's registers, and the inverse Cholesky factor of a 32 x 32 one.
#pragma once

#include "cuda/backward_direct_kernel.hpp"

namespace kalmanet::cuda::direct32 {

template <class Group>
struct DirectInverse : DirectProducts<Group> {
  using Base = DirectProducts<Group>;
  using Base::group, Base::shared;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  // h <- -h^{-1} by the sweep operator, block by block: sweeping pivot block D out of
  //   [D B^T; B C]  gives  [-D^{-1}  D^{-1} B^T; B D^{-1}  C - B D^{-1} B^T],
  // symmetric again; all eight swept leave the negative inverse. Each step turns the columns by one
  // block (h[n] is made of h[n + 2]), so that the pivot's are always the first two tiles and no
  // register is indexed at run time. The owner of the next pivot inverts it as soon as it has it.
  // pivots: the blocks that are swept; beyond them h is the negative of its inverse already.
  KALMANET_KERNEL void invert(int pivots) {
    group.with_warp(0, [&] { invert_pivot(0); });
    put_panel(0, 0);
    group.barrier();
    KALMANET_LOOP  // eight copies would not fit the instruction cache
        for (int b = 0; b < pivots; ++b) {
      load_pivot(b);
      sweep_tiles(b, 0, 2);
      if (b + 1 < pivots) {
        group.with_warp(b + 1, [&] { invert_pivot((b + 1) % 2); });
        put_panel(b + 1, (b + 1) % 2);
      }
      sweep_tiles(b, 2, 14);
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.h[14 + j][i] = r.g[j][i];
        }
      });
      group.barrier();
    }
    if (!kAnyRows<Group>) return;
    KALMANET_LOOP
    for (int b = pivots; b < 8; ++b) {  // (turned as far as by all pivots)
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) r.g[i / 4][i % 4] = r.h[i / 4][i % 4];
        KALMANET_UNROLL
        for (int i = 0; i < 64; ++i) {
          r.h[i / 4][i % 4] = i < 56 ? r.h[i / 4 + 2][i % 4] : r.g[i / 4 - 14][i % 4];
        }
      });
    }
  }

  // The warp's 16 x 16 of the pivot's columns (tiles 0 and 1) as fragments in the order of a right
  // factor; parts 1 and 2 change places for a left one.
  KALMANET_KERNEL static void pack_block(const float (&v)[2][4], Left& high, Left& low) {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      high.part[i] = split_float16(v[i % 2][i / 2 * 2], v[i % 2][i / 2 * 2 + 1], low.part[i]);
    }
  }

  KALMANET_KERNEL void put_panel(int, int buffer) {
    group.each([&](int thread, Registers& r) {
      const float (&v)[2][4] = reinterpret_cast<const float (&)[2][4]>(r.h);
      Left high, low;
      pack_block(v, high, low);
      shared.gains[buffer][thread] = high;
      shared.gains[buffer][256 + thread] = low;
    });
  }

  // g <- B D^{-1} (the pivot's owner: -D^{-1}); a <- what multiplies the panel: -g.
  KALMANET_KERNEL void load_pivot(int b) {
    group.each([&](int thread, Registers& r) {
      const float (&v)[2][4] = reinterpret_cast<const float (&)[2][4]>(r.h);
      Left high, low;
      pack_block(v, high, low);
      const Left e = shared.pivot[b % 2][0][thread % 32],
                 rest = shared.pivot[b % 2][1][thread % 32];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = i == 1 ? 2 : (i == 2 ? 1 : i);
        r.a[0][i] = high.part[at];
        r.a[1][i] = low.part[at];
        r.b[0][i / 2][i % 2] = e.part[i];
        r.b[1][i / 2][i % 2] = rest.part[i];
        r.g[0][i] = r.g[1][i] = 0;
      }
    });
    KALMANET_UNROLL
    for (int j = 0; j < 2; ++j) {
      const auto g = [j](Registers& r) -> float (&)[4] { return r.g[j]; };
      const auto high = [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; };
      const auto b0 = [j](Registers& r) -> uint32_t (&)[2] { return r.b[0][j]; };
      group.multiply_add_float16(g, g, [](Registers& r) -> uint32_t (&)[4] { return r.a[1]; }, b0);
      group.multiply_add_float16(g, g, high,
                                 [j](Registers& r) -> uint32_t (&)[2] { return r.b[1][j]; });
      group.multiply_add_float16(g, g, high, b0);
    }
    group.each([&](int thread, Registers& r) {
      if (thread / 32 == b) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint32_t high = r.b[0][i / 2][i % 2], low = r.b[1][i / 2][i % 2];
          r.g[i % 2][i / 2 * 2] = -(low_float16(high) + low_float16(low));
          r.g[i % 2][i / 2 * 2 + 1] = -(high_float16(high) + high_float16(low));
        }
        KALMANET_UNROLL
        for (int n = 2; n < 16; ++n) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.h[n][i] = 0;
        }
      }
      float negative[2][4];
      KALMANET_UNROLL
      for (int j = 0; j < 2; ++j) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) negative[j][i] = -r.g[j][i];
      }
      Left high, low;
      pack_block(negative, high, low);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = i == 1 ? 2 : (i == 2 ? 1 : i);
        r.a[0][i] = high.part[at];
        r.a[1][i] = low.part[at];
      }
    });
  }

  // h[n] <- h[n + 2] + a panel, tiles [from, to), an even number of them.
  KALMANET_KERNEL void sweep_tiles(int b, int from, int to) {
    KALMANET_UNROLL
    for (int n = 0; n < 14; n += 2) {
      if (n < from || n >= to) continue;
      group.each([&](int thread, Registers& r) {
        const int block = (b + 1 + n / 2) % 8;
        const Left high = shared.gains[b % 2][block * 32 + thread % 32];
        const Left low = shared.gains[b % 2][256 + block * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.b[0][i / 2][i % 2] = high.part[i];
          r.b[1][i / 2][i % 2] = low.part[i];
        }
      });
      KALMANET_UNROLL
      for (int j = 0; j < 2; ++j) {
        const auto d = [n, j](Registers& r) -> float (&)[4] { return r.h[n + j]; };
        const auto c = [n, j](Registers& r) -> float (&)[4] { return r.h[n + j + 2]; };
        const auto a = [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; };
        const auto b0 = [j](Registers& r) -> uint32_t (&)[2] { return r.b[0][j]; };
        group.multiply_add_float16(
            d, c, [](Registers& r) -> uint32_t (&)[4] { return r.a[1]; }, b0);
        group.multiply_add_float16(d, d, a,
                                   [j](Registers& r) -> uint32_t (&)[2] { return r.b[1][j]; });
        group.multiply_add_float16(d, d, a, b0);
      }
    }
  }

  // One warp: the inverse of the 16 x 16 in its tiles 0 and 1, by the same sweeps of two rows and
  // columns at a time, into shared.pivot[buffer].
  KALMANET_KERNEL void invert_pivot(int buffer) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int n = 0; n < 2; ++n) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.f[0][n][i] = r.h[n][i];
      }
    });
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {
      // Rows 8 half + 2 pair and the next. (Rolled: lanes may differ at run time, registers not.)
      KALMANET_LOOP
      for (int pair = 0; pair < 4; ++pair) sweep_pair(half, pair);
    }
    group.each([&](int thread, Registers& r) {
      float inverse[2][4];
      KALMANET_UNROLL
      for (int n = 0; n < 2; ++n) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) inverse[n][i] = -r.f[0][n][i];
      }
      Left high, low;
      pack_block(inverse, high, low);
      shared.pivot[buffer][0][thread % 32] = high;
      shared.pivot[buffer][1][thread % 32] = low;
    });
  }

  KALMANET_KERNEL void sweep_pair(int half, int pair) {
    const int row = 2 * pair;
    KALMANET_UNROLL
    for (int i = 0; i < 8; ++i) {  // their columns of this lane
      const int which = i / 4, n = i / 2 % 2, c = i % 2;
      group.shuffle([=](Registers& r) -> float& { return r.rows[which][n * 2 + c]; },
                    [=](Registers& r) { return r.f[0][n][half * 2 + c]; },
                    [=](int thread) { return (row + which) * 4 + thread % 4; });
    }
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {  // their elements in this lane's rows
      const int h = i / 2, c = i % 2;
      group.shuffle([=](Registers& r) -> float& { return r.cols[h][c]; },
                    [=](Registers& r) { return r.f[0][half][h * 2 + c]; },
                    [=](int thread) { return thread % 32 / 4 * 4 + pair; });
    }
    KALMANET_UNROLL
    for (int i = 0; i < 3; ++i) {  // the pivots themselves
      group.shuffle([=](Registers& r) -> float& { return r.pivots[i]; },
                    [=](Registers& r) { return r.f[0][half][half * 2 + (i > 0 ? 1 : 0)]; },
                    [=](int) { return (row + i / 2) * 4 + pair; });
    }
    group.each([&](int thread, Registers& r) {
      const float a = r.pivots[0], b = r.pivots[1], c = r.pivots[2];
      const float inverse = divide(1.0f, a * c - b * b);
      const float e00 = c * inverse, e01 = -b * inverse, e11 = a * inverse;
      const int lane = thread % 32;
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        float g0 = r.cols[h][0] * e00 + r.cols[h][1] * e01;
        float g1 = r.cols[h][0] * e01 + r.cols[h][1] * e11;
        float keep = 1.0f;
        if (h == half && lane / 4 == row) g0 = -e00, g1 = -e01, keep = 0.0f;
        if (h == half && lane / 4 == row + 1) g0 = -e01, g1 = -e11, keep = 0.0f;
        KALMANET_UNROLL
        for (int n = 0; n < 2; ++n) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            float& e = r.f[0][n][h * 2 + i];
            e = keep * e - g0 * r.rows[0][n * 2 + i] - g1 * r.rows[1][n * 2 + i];
            if (n == half && lane % 4 == pair) e = i == 0 ? g0 : g1;
          }
        }
      }
    });
  }

  // One warp: R^{-1} of R R^T = the matrix in shared.tile, as the right factor R^{-T} in
  // shared.middle. Elimination of two rows at a time; what is below the diagonal becomes L^{-1}.
  KALMANET_KERNEL void invert_factor() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        KALMANET_UNROLL
        for (int n = 0; n < 4; ++n) {
          load4(shared.tile[(m * 4 + n) * 32 + thread % 32], r.f[m][n]);
        }
        r.extreme[m] = 1.0f;
      }
      r.dot[0] = r.dot[1] = 1.0f;
    });
    KALMANET_UNROLL
    for (int column = 0; column < 4; ++column) {
      KALMANET_LOOP
      for (int pair = 0; pair < 4; ++pair) eliminate_pair(column, pair);
    }
    // Rows divided by sqrt(d), the unit diagonal, nothing above it.
    group.each([&](int thread, Registers& r) {
      const int lane = thread % 32;
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        KALMANET_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int row = m * 16 + h * 8 + lane / 4;
          const float scale = divide(1.0f, sqrtf(m == 0 ? r.dot[h] : r.extreme[h]));
          KALMANET_UNROLL
          for (int n = 0; n < 4; ++n) {
            KALMANET_UNROLL
            for (int i = 0; i < 2; ++i) {
              const int at = n * 8 + lane % 4 * 2 + i;
              float& e = r.f[m][n][h * 2 + i];
              e = at > row ? 0.0f : scale * (at == row ? 1.0f : e);
            }
          }
          KALMANET_UNROLL
          for (int k = 0; k < 2; ++k) {
            Right high, low;
            KALMANET_UNROLL
            for (int i = 0; i < 2; ++i) {
              const float (&v)[4] = r.f[m][2 * k + i];
              high.part[i] = split_float16(v[h * 2], v[h * 2 + 1], low.part[i]);
            }
            shared.middle[0][(k * 4 + m * 2 + h) * 32 + lane] = high;
            shared.middle[1][(k * 4 + m * 2 + h) * 32 + lane] = low;
          }
        }
      }
    });
  }

  // Rows 8 column + 2 pair and the next out of what is below them.
  KALMANET_KERNEL void eliminate_pair(int column, int pair) {
    const int tile = column / 2, half = column % 2, row = 2 * pair;
    KALMANET_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int which = i / 8, n = i / 2 % 4, c = i % 2;
      group.shuffle([=](Registers& r) -> float& { return r.rows[which][n * 2 + c]; },
                    [=](Registers& r) { return r.f[tile][n][half * 2 + c]; },
                    [=](int thread) { return (row + which) * 4 + thread % 4; });
    }
    KALMANET_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int m = i / 4, h = i / 2 % 2, c = i % 2;
      if (m < tile) continue;
      group.shuffle([=](Registers& r) -> float& { return r.cols[m * 2 + h][c]; },
                    [=](Registers& r) { return r.f[m][column][h * 2 + c]; },
                    [=](int thread) { return thread % 32 / 4 * 4 + pair; });
    }
    KALMANET_UNROLL
    for (int i = 0; i < 3; ++i) {
      group.shuffle([=](Registers& r) -> float& { return r.pivots[i]; },
                    [=](Registers& r) { return r.f[tile][column][half * 2 + (i > 0 ? 1 : 0)]; },
                    [=](int) { return (row + i / 2) * 4 + pair; });
    }
    group.each([&](int thread, Registers& r) {
      const int lane = thread % 32;
      const float a = r.pivots[0], b = r.pivots[1], c = r.pivots[2];
      const float inverse = divide(1.0f, a * c - b * b);
      const float e00 = c * inverse, e01 = -b * inverse, e11 = a * inverse;
      const float l = divide(b, a);  // the second row's multiple of the first
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        KALMANET_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (m < tile || (m == tile && h < half)) continue;
          float g0 = r.cols[m * 2 + h][0] * e00 + r.cols[m * 2 + h][1] * e01;
          float g1 = r.cols[m * 2 + h][0] * e01 + r.cols[m * 2 + h][1] * e11;
          const bool here = m == tile && h == half;
          const bool first = here && lane / 4 == row, second = here && lane / 4 == row + 1;
          if (here && lane / 4 < row) g0 = g1 = 0;  // done already
          if (first) {
            g0 = g1 = 0;
            (m == 0 ? r.dot[h] : r.extreme[h]) = a;
          }
          if (second) {
            g0 = l, g1 = 0;
            (m == 0 ? r.dot[h] : r.extreme[h]) = c - l * b;
          }
          const bool below = !(here && lane / 4 <= row + 1);
          KALMANET_UNROLL
          for (int n = 0; n < 4; ++n) {
            KALMANET_UNROLL
            for (int i = 0; i < 2; ++i) {
              float& e = r.f[m][n][h * 2 + i];
              e -= g0 * r.rows[0][n * 2 + i] + g1 * r.rows[1][n * 2 + i];
              if (n == column && lane % 4 == pair) {
                if (below) e = i == 0 ? -g0 : -g1;
                if (second && i == 0) e = -l;
              }
            }
          }
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda::direct32
