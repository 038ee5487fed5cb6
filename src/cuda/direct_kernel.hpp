// The direct solver on matrix units: chunks of up to 64 tokens of one head that share one inverse,
// K = V = 128, bfloat16 tensors.
//
// Token t's system divided by e^{G_t} mu (docs/math.md, "The direct solver") is (M_t + d_t I) x = q
//
//   M_t = H_0 / mu + I + sum_{j<=t} k_j k_j^T     k_j scaled by e^{-G_j/2} beta_j / sqrt(mu)
//   d_t = lambda_t e^{-G_t} / mu - 1              mu the geometric mean of the extreme shifts
//
// and with P = (H_0 / mu + I)^{-1}, Y = P K^T, R R^T = I + K Y (Cholesky; R's leading blocks serve
// every token) and the gains Z = Y R^{-T}
//
//   N_t = M_t^{-1}:  N_t b = P b - Z mask(Z^T b)      mask: token t keeps the columns j <= t of Z
//
// because R^{-1} is lower triangular: one mask does. P and Z are formed once a chunk; d_t is taken
// in by a polynomial of N_t:  x = N_t p(N_t) q,  p(nu) near 1 / (1 + d_t nu) for 0 <= nu <= 1. The
// best one for n products leaves the residual 1 - (1 + d nu) p(nu) = T_n(2 nu - 1) / T_n(-1 - 2 /
// d), at most 2 R^n: it interpolates at Chebyshev's nodes nu_k. In Newton's form its coefficients
// are
//
//   a_0 = 1 / (1 + d nu_0),   a_k = -(d / 2) / (1 + d nu_k) a_{k-1},
//
// by Horner  w <- (2 N - 2 nu_k) w + a_k q,  so that the last product alone, x = N w, needs more
// than float16: an error made before it is one of q, which U does not magnify.
//
// M_t >= I, so that P, Z <= 1 and every factor fits float16, split in two (high + low, 22 bits)
// wherever its rounding would show: bfloat16's split keeps 16. Keys, values and queries are scaled
// by a power of two a token, which loses nothing.
//
// In the solve tokens are rows: warps w and w + 4 have tokens 16 w .. with all 128 dims of the
// iterate as left factor in their registers, and make half of the next one's dims each: sums lie as
// the next left factor does, so that what one warp of a pair made is all that the other must fetch.
// Elsewhere warp w has dims 16 w .. of a matrix of dims, or tokens 16 (w % 4) .. and half of the
// other side.
#pragma once

#include <cstdint>

#include "cuda/chunk_kernel.hpp"
#include "cuda/group.hpp"

namespace kalmanet::cuda {

struct DirectLayout {
  static constexpr int kDim = 128;
  static constexpr int kTokens = 64;
  static constexpr int kThreads = 256;
  static constexpr int kTile = 4 * 8;           // quads of 64 x 128, [row block * 8 + column block]
  static constexpr int kSymmetric = 8 * 9 / 2;  // of a symmetric 128 x 128: the lower half
  static constexpr int kMostSteps = 20;
};

// A shift ratio that needs more steps is left to the token kernel, as is a matrix whose float16
// would overflow.
inline constexpr float kLargestEntry = 3e4f;
// 2 P and sqrt(2) Z are kept, so that a product is 2 N w; their low parts 2^11 times as large as
// they are, so that they are as accurate for small numbers.
inline constexpr float kInverseScale = 2.0f, kGainScale = 1.41421356f;
inline constexpr float kLowScale = 2048.0f;

// What is measured of a chunk's keys, where the gains will be.
struct DirectMeasured {
  float dots[8][DirectLayout::kTokens];  // k_t^T H_0 k_t, each warp's dims
  float gram[2][DirectLayout::kTokens];  // sum_j u_j (k_t . k_j)^2, two halves
  float norm2[DirectLayout::kTokens];
};

struct DirectShared {
  Quad keys[DirectLayout::kTile];  // K: tokens x dims
  // R^{-1}, high and low, 4 x 4; then Q likewise; then the iterate; then the high parts of m.
  Quad queries[DirectLayout::kTile];
  // Y, then Z: dims x tokens [row block * 4 + column block], high and low. While inverting: panels.
  // While reading out: the middle factor, and m's low parts; then o
  union {
    Quad gains[2][DirectLayout::kTile];
    DirectMeasured measured;
  };
  Quad inverse[2][DirectLayout::kSymmetric];  // P: high, low. While reading out: V
  Quad pivot[2][2];                           // D^{-1} of this pivot and the next: high, low
  alignas(16) float square[16][20];           // the pivot on its way to another order
  alignas(16) float line[2][16][4];           // four of its rows
  uint16_t coefficient[DirectLayout::kMostSteps][DirectLayout::kTokens];  // a_k, then output norms
  float node[DirectLayout::kMostSteps];                                   // -2 nu_k
  float ridge[DirectLayout::kTokens], alpha[DirectLayout::kTokens], beta2[DirectLayout::kTokens];
  float weight[DirectLayout::kTokens];  // u_j = beta_j^2 e^{-G_j}
  float start[2][DirectLayout::kTokens], since_end[2][DirectLayout::kTokens];  // see load_scalars
  float value_weight[DirectLayout::kTokens];
  float key_scale[DirectLayout::kTokens], shift[DirectLayout::kTokens];
  float solution_scale[DirectLayout::kTokens];  // of x beside q
  float query_scale[DirectLayout::kTokens];     // a power of two for m
  float output_scale[DirectLayout::kTokens];    // for what comes of it
  float unit[3][DirectLayout::kTokens];  // what a token's k, v, q are multiplied by: 1 / unit
  float x2[2][DirectLayout::kTokens];    // |x|^2, of either half of the dims
  float total[2];                        // e^{G_C}
  double warp[2][8];
  float mu;
  int tokens, steps, ill;
};
static_assert(sizeof(DirectMeasured) <= 2 * DirectLayout::kTile * sizeof(Quad));
static_assert(8 * DirectLayout::kTokens * sizeof(float) <= sizeof(DirectShared::coefficient));

struct DirectRegisters {
  float h[16][4];       // 16 rows of H, of what is being inverted, of U^T
  float y[8][4];        // sums
  uint32_t w[8][4];     // the iterate: 16 tokens x 128 dims as left factor
  uint32_t q[4][4];     // half of Q's dims
  uint32_t next[4][4];  // half of the next iterate
  uint32_t s[2][4][4];  // mask(Z^T w): high, low
  uint32_t z[2][4][4];  // weighted keys or values
  float f[2][4];        // of a state, on their way
  uint32_t raw[8][4];   // rows on their way
  uint32_t a[2][4], b[2][2][2];
  uint32_t t[4], most, coefficient[2];
  float g[2][4];
  float column[8], own[4], pivots[4][4], diagonal;  // of a pivot
  float dot[2], part[2], extreme[3], largest;
  double scan, pair[2], since[2][2], other, sum;
};

// As split_float16, low parts times kLowScale.
KALMANET_KERNEL uint32_t split_scaled(float a, float b, uint32_t& low) {
  const uint32_t high = pack_float16(a, b);
  low = pack_float16((a - low_float16(high)) * kLowScale, (b - high_float16(high)) * kLowScale);
  return high;
}

// log2 - exponent of the largest, for the bits of the largest bfloat16's magnitude.
KALMANET_KERNEL int exponent_for(uint32_t largest, int log2) {
  int exponent = 254 + log2 - static_cast<int>(largest >> 7);
  if (largest == 0) exponent = 127;
  exponent = exponent < 1 ? 1 : (exponent > 253 ? 253 : exponent);
  return exponent - 127;
}

// Where block (row, column) of a symmetric matrix lies, column <= row.
KALMANET_KERNEL constexpr int lower_block(int row, int column) {
  return row * (row + 1) / 2 + column;
}

// What a kernel that solves directly keeps where, for what such kernels share.
struct DirectTraits {
  using L = DirectLayout;
  using Shared = DirectShared;
  using Registers = DirectRegisters;
};

template <class Group, class Traits = DirectTraits>
struct DirectProducts {
  using L = typename Traits::L;
  using Registers = typename Traits::Registers;
  Group& group;
  typename Traits::Shared& shared;

  // a[part] <- a block X as left factor, or its transpose (`columns`); b[part] <- X as right factor
  // (rows: those of the product's sum), or its transpose (rows: the product's columns). from(warp).
  template <class From>
  KALMANET_KERNEL void load_left(int part, From&& from) {
    group.template load_quad<false, true>([part](Registers& r) { return r.a[part]; },
                                          [&](int thread) { return from(thread / 32); });
  }
  template <class From>
  KALMANET_KERNEL void load_left_transposed(int part, From&& from) {
    group.template load_quad<true, false>([part](Registers& r) { return r.a[part]; },
                                          [&](int thread) { return from(thread / 32); });
  }
  template <class From>
  KALMANET_KERNEL void load_right(int part, From&& from) {
    group.template load_quad<true, true>([part](Registers& r) { return &r.b[part][0][0]; },
                                         [&](int thread) { return from(thread / 32); });
  }
  template <class From>
  KALMANET_KERNEL void load_right_transposed(int part, From&& from) {
    group.template load_quad<false, false>([part](Registers& r) { return &r.b[part][0][0]; },
                                           [&](int thread) { return from(thread / 32); });
  }
  // b[part] <- block (k, n) of a symmetric matrix of which the lower half is kept.
  KALMANET_KERNEL void load_inverse(int part, const Quad* from, int k, int n) {
    if (n >= k) {
      load_right_transposed(part, [=](int) { return from + lower_block(n, k); });
    } else {
      load_right(part, [=](int) { return from + lower_block(k, n); });
    }
  }

  // Tiles `tile` and the next += a b, a(registers) a left factor, b[part] a right one.
  template <class Sum, class A>
  KALMANET_KERNEL void add(Sum&& sum, A&& a, int part) {
    KALMANET_UNROLL
    for (int j = 0; j < 2; ++j) {
      const auto to = [&, j](Registers& r) -> float (&)[4] { return sum(r, j); };
      group.multiply_add_float16(
          to, to, a, [part, j](Registers& r) -> uint32_t (&)[2] { return r.b[part][j]; });
    }
  }
  KALMANET_KERNEL void add_y(int tile, int a_part, int b_part) {
    add([tile](Registers& r, int j) -> float (&)[4] { return r.y[tile + j]; },
        [a_part](Registers& r) -> uint32_t (&)[4] { return r.a[a_part]; }, b_part);
  }

  template <int kTiles = 8>
  KALMANET_KERNEL void clear_y() {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.y[n][i] = 0;
      }
    });
  }
  template <int kTiles = 8>
  KALMANET_KERNEL void scale_y(float by) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.y[n][i] *= by;
      }
    });
  }

  // a <- sign of(registers), 16 x 16, as left factor, high and low.
  template <class Of>
  KALMANET_KERNEL void pack_factor(float sign, Of&& of) {
    group.each([&](int, Registers& r) {
      const float (&v)[2][4] = of(r);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        r.a[0][i] =
            split_float16(sign * v[i / 2][i % 2 * 2], sign * v[i / 2][i % 2 * 2 + 1], r.a[1][i]);
      }
    });
  }
  // g += a b, both high and low.
  KALMANET_KERNEL void multiply_split() {
    const auto to = [](Registers& r, int j) -> float (&)[4] { return r.g[j]; };
    add(to, [](Registers& r) -> uint32_t (&)[4] { return r.a[1]; }, 0);
    add(to, [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; }, 1);
    add(to, [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; }, 0);
  }

  // Row and column of element i of a sum's tile, within the warp's 16 rows.
  KALMANET_KERNEL static int row_of(int thread, int i) { return thread % 32 / 4 + i / 2 * 8; }
  KALMANET_KERNEL static int column_of(int thread, int tile, int i) {
    return tile * 8 + thread % 4 * 2 + i % 2;
  }
};

}  // namespace kalmanet::cuda
