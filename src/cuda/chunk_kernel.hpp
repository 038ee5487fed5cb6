// The forward on matrix units: chunks of 64 tokens of one head, all their systems by Chebyshev's
// iteration together, K = V = 128, bfloat16 tensors.
//
// In the scale of token t, H_t = e^{G_t} (H_0 + sum_{j<=t} u_j k_j k_j^T), u_j = e^{-G_j} beta_j^2,
// so that one product of the iteration for all tokens (columns) is
//
//   y = H_0 d + K^T mask(u o (K d))          A d = e^{G_t} y + lambda_t d
//
// three products of matrices with the raw, exact bfloat16 keys. Factors that are not exact (H_0, d,
// the middle one) are split in two, high + low, of which three products are kept; the iteration
// carries its residual along (r -= A d, x += d), so that late steps, whose d is small, need the
// high parts alone.
//
// Fragments lie in shared memory in the order in which a warp's lanes read them: 16 bytes a lane of
// a left factor, 8 of a right one, no bank twice. Warp w has rows 32 (w % 4) .. of y and columns 32
// (w / 4) .. ; of the middle factor rows 16 (w % 4) .. and the same columns.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/any_rows.hpp"
#include "cuda/group.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

struct ChunkLayout {
  static constexpr int kDim = 128;
  static constexpr int kTokens = 64;
  static constexpr int kThreads = 256;
  static constexpr int kMain = 8 * 8 * 32;   // left fragments of a 128 x 128 matrix
  static constexpr int kKeys = 4 * 8 * 32;   // of 64 x 128, or of 128 x 64
  static constexpr int kRight = 8 * 8 * 32;  // right fragments of 128 x 64
  static constexpr int kMiddle = 4 * 8 * 32;
};

struct alignas(16) Left {
  uint32_t part[4];
};
struct alignas(8) Right {
  uint32_t part[2];
};

struct ChunkShared {
  Left main[2][ChunkLayout::kMain];       // H_0, or U^T: high, low
  Left rows[ChunkLayout::kKeys];          // K: tokens x dims
  Left columns[ChunkLayout::kKeys];       // K^T: dims x tokens
  Left values[ChunkLayout::kKeys];        // V^T
  Right right[2][ChunkLayout::kRight];    // d
  Right middle[2][ChunkLayout::kMiddle];  // mask(u o (K d))
  float gain[2][ChunkLayout::kTokens];    // step w of this iteration and the next
  float momentum[2][ChunkLayout::kTokens];
  float lambda[ChunkLayout::kTokens], start[ChunkLayout::kTokens];  // lambda_t, e^{G_t}
  float weight[ChunkLayout::kTokens];                               // u_j
  float to_end[2][ChunkLayout::kTokens];  // beta_j^2 e^{G_C - G_j}, of H and of U
  float value_start[ChunkLayout::kTokens], value_weight[ChunkLayout::kTokens];  // the same of g
  float alpha[ChunkLayout::kTokens], ridge[ChunkLayout::kTokens], beta2[ChunkLayout::kTokens];
  double gate[2][ChunkLayout::kTokens];  // gk, g
  double since[ChunkLayout::kTokens];    // G_t of H
  double norm2[ChunkLayout::kTokens];    // what token t adds to |H|^2, times e^{-2 G_t}
  float dots[2][4][ChunkLayout::kTokens];
  float total[2];  // e^{G_C}
  double warp[ChunkLayout::kThreads / 32];
  double total64[2];  // G_C
  float smallest_ridge;
  int ill;  // a token whose amplification is more than this arithmetic bears
};

struct ChunkRegisters {
  float y[2][4][4], r[2][4][4], x[2][4][4], d[2][4][4];
  float s[4][4];
  uint32_t a[2][2][4], b[2][4][2];  // high and low
  uint32_t t[4];
  float dot[2];
  float w, rho2, step;  // of token `thread`
  double sum;
};

// Where a thread's element i of tile (m, n) of y is: row (dim) and column (token).
KALMANET_KERNEL int chunk_row(int thread, int m, int i) {
  return thread / 32 % 4 * 32 + m * 16 + thread % 32 / 4 + i / 2 * 8;
}
KALMANET_KERNEL int chunk_column(int thread, int n, int i) {
  return thread / 128 * 32 + n * 8 + thread % 4 * 2 + i % 2;
}

KALMANET_KERNEL uint32_t low_parts(float a, float b, uint32_t high) {
  return pack_bfloat16(a - low_bfloat16(high), b - high_bfloat16(high));
}

// Rows of 128 bfloat16 on their way from a tensor into fragments, padded by 16 bytes so that eight
// rows' words meet no bank twice. A thread of 256 brings two pieces of 16 bytes of 32 rows, a warp
// whole rows: read by fragments, every load would touch eight lines for 16 bytes each.
struct StagedRows {
  uint32_t words[32][68];
};
KALMANET_KERNEL void fetch_rows(const uint16_t* rows, int64_t stride, int64_t count, int thread,
                                uint32_t (&raw)[2][4]) {
  KALMANET_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = thread / 16 + 16 * i;
    if (row < count) {
      load16(rows + row * stride + thread % 16 * 8, raw[i]);
    } else {
      raw[i][0] = raw[i][1] = raw[i][2] = raw[i][3] = 0;
    }
  }
}
KALMANET_KERNEL void stage_rows(const uint32_t (&raw)[2][4], int thread, StagedRows& to) {
  KALMANET_UNROLL
  for (int i = 0; i < 2; ++i) store16(&to.words[thread / 16 + 16 * i][thread % 16 * 4], raw[i]);
}
// Part `part` of a lane's left fragment of rows 16 m .., columns 16 k .. .
KALMANET_KERNEL uint32_t staged(const StagedRows& rows, int m, int k, int lane, int part) {
  return rows.words[m * 16 + lane / 4 + part % 2 * 8][k * 8 + lane % 4 + part / 2 * 4];
}

template <class Group>
struct ChunkProducts {
  using L = ChunkLayout;
  using Registers = ChunkRegisters;
  Group& group;
  ChunkShared& shared;
  // Rows and columns of main that are more than zeros: products leave the others out
  // (any_rows.hpp).
  int dims = L::kDim;

  // f(registers, thread, m, n) for the tiles of y.
  template <class F>
  KALMANET_KERNEL void each_tile(F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        KALMANET_UNROLL
        for (int n = 0; n < 4; ++n) f(r, thread, m, n);
      }
    });
  }

  // A matrix in the layout of y (`of(registers)`) as right fragments, split or its high part alone.
  // Ends with a barrier.
  template <class Of>
  KALMANET_KERNEL void put_right(bool split, Of&& of) {
    KALMANET_UNROLL
    for (int part = 0; part < 2; ++part) {
      if (part == 1 && !split) break;
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        KALMANET_UNROLL
        for (int n = 0; n < 4; ++n) {
          group.each([&](int, Registers& r) {
            const float (&v)[4] = of(r)[m][n];
            r.t[0] = pack_bfloat16(v[0], v[1]);
            r.t[1] = pack_bfloat16(v[2], v[3]);
            if (part == 1) {
              r.t[0] = low_parts(v[0], v[1], r.t[0]);
              r.t[1] = low_parts(v[2], v[3], r.t[1]);
            }
          });
          group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
          group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
          group.each([&](int thread, Registers& r) {
            const int k = thread / 32 % 4 * 2 + m, column = thread / 128 * 4 + n;
            shared.right[part][(k * 8 + column) * 32 + thread % 32] = {{r.t[0], r.t[1]}};
          });
        }
      }
    }
    group.barrier();
  }

  // y <- main right + columns mask(weight o (rows right)). One barrier inside; right may be written
  // again afterwards, middle after one more barrier.
  KALMANET_KERNEL void apply(bool split, const Left* columns, const float* weight) {
    apply(split, shared.rows, columns, weight);
  }
  KALMANET_KERNEL void apply(bool split, const Left* token_rows, const Left* columns,
                             const float* weight) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int n = 0; n < 4; ++n) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.s[n][i] = r.y[0][n][i] = r.y[1][n][i] = 0;
      }
    });
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(dims, k * 16)) break;
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int n = 0; n < 4; ++n) {
          const int at = (k * 8 + thread / 128 * 4 + n) * 32 + thread % 32;
          const Right high = shared.right[0][at];
          r.b[0][n][0] = high.part[0], r.b[0][n][1] = high.part[1];
          if (split) {
            const Right low = shared.right[1][at];
            r.b[1][n][0] = low.part[0], r.b[1][n][1] = low.part[1];
          }
        }
        const Left rows = token_rows[(thread / 32 % 4 * 8 + k) * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.a[0][0][i] = rows.part[i];
      });
      KALMANET_UNROLL
      for (int n = 0; n < 4; ++n) {
        const auto s = [n](Registers& r) -> float (&)[4] { return r.s[n]; };
        const auto rows = [](Registers& r) -> uint32_t (&)[4] { return r.a[0][0]; };
        if (split) {
          group.multiply_add(s, rows, [n](Registers& r) -> uint32_t (&)[2] { return r.b[1][n]; });
        }
        group.multiply_add(s, rows, [n](Registers& r) -> uint32_t (&)[2] { return r.b[0][n]; });
      }
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int m = 0; m < 2; ++m) {
          const int at = ((thread / 32 % 4 * 2 + m) * 8 + k) * 32 + thread % 32;
          const Left high = shared.main[0][at];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.a[0][m][i] = high.part[i];
          if (split) {
            const Left low = shared.main[1][at];
            KALMANET_UNROLL
            for (int i = 0; i < 4; ++i) r.a[1][m][i] = low.part[i];
          }
        }
      });
      add_tiles(split, split);
    }
    put_middle(split, weight);
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int n = 0; n < 4; ++n) {
          const int at = (k * 8 + thread / 128 * 4 + n) * 32 + thread % 32;
          const Right high = shared.middle[0][at];
          r.b[0][n][0] = high.part[0], r.b[0][n][1] = high.part[1];
          if (split) {
            const Right low = shared.middle[1][at];
            r.b[1][n][0] = low.part[0], r.b[1][n][1] = low.part[1];
          }
        }
        KALMANET_UNROLL
        for (int m = 0; m < 2; ++m) {
          const Left left = columns[((thread / 32 % 4 * 2 + m) * 4 + k) * 32 + thread % 32];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.a[0][m][i] = left.part[i];
        }
      });
      add_tiles(false, split);
    }
  }

  // y += a b for the loaded fragments; which low parts there are.
  KALMANET_KERNEL void add_tiles(bool low_left, bool low_right) {
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      KALMANET_UNROLL
      for (int n = 0; n < 4; ++n) {
        const auto y = [m, n](Registers& r) -> float (&)[4] { return r.y[m][n]; };
        const auto a = [m](Registers& r) -> uint32_t (&)[4] { return r.a[0][m]; };
        const auto b = [n](Registers& r) -> uint32_t (&)[2] { return r.b[0][n]; };
        if (low_left) {
          group.multiply_add(y, [m](Registers& r) -> uint32_t (&)[4] { return r.a[1][m]; }, b);
        }
        if (low_right) {
          group.multiply_add(y, a, [n](Registers& r) -> uint32_t (&)[2] { return r.b[1][n]; });
        }
        group.multiply_add(y, a, b);
      }
    }
  }

  // s, with its weights and without what lies in a token's future, as right fragments.
  KALMANET_KERNEL void put_middle(bool split, const float* weight) {
    KALMANET_UNROLL
    for (int n = 0; n < 4; ++n) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int j = thread / 32 % 4 * 16 + thread % 32 / 4 + i / 2 * 8;
          r.s[n][i] = j <= chunk_column(thread, n, i) ? r.s[n][i] * weight[j] : 0.0f;
        }
      });
      KALMANET_UNROLL
      for (int part = 0; part < 2; ++part) {
        if (part == 1 && !split) break;
        group.each([&](int, Registers& r) {
          r.t[0] = pack_bfloat16(r.s[n][0], r.s[n][1]);
          r.t[1] = pack_bfloat16(r.s[n][2], r.s[n][3]);
          if (part == 1) {
            r.t[0] = low_parts(r.s[n][0], r.s[n][1], r.t[0]);
            r.t[1] = low_parts(r.s[n][2], r.s[n][3], r.t[1]);
          }
        });
        group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
        group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
        group.each([&](int thread, Registers& r) {
          const int k = thread / 32 % 4, column = thread / 128 * 4 + n;
          shared.middle[part][(k * 8 + column) * 32 + thread % 32] = {{r.t[0], r.t[1]}};
        });
      }
    }
    group.barrier();
  }
};

}  // namespace kalmanet::cuda
