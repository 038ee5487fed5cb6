// The backward's direct solver on matrix units (backward_direct_body.hpp): chunks of up to 32
// tokens of one head that share one inverse, K = V = 128, bfloat16 tensors. (The forward's,
// direct_kernel.hpp, has other chunks and other products: this one's serve two right-hand sides, of
// which one is not exact.)
//
// Token t's system divided by e^{G_t} mu (docs/math.md, "The direct solver") is (M_t + d_t I) x = q
//
//   M_t = H_0 / mu + I + sum_{j<=t} k_j k_j^T     k_j scaled by e^{-G_j/2} beta_j / sqrt(mu)
//   d_t = lambda_t e^{-G_t} / mu - 1              mu the geometric mean of the extreme shifts
//
// and with P = (H_0 / mu + I)^{-1}, Y = P K^T, R R^T = I + K Y (Cholesky; R's leading blocks serve
// every token) and the gains Z = Y R^{-T}
//
//   M_t^{-1} b = P b - Z mask(Z^T b)              mask: column t keeps the rows j <= t
//
// because R^{-1} is lower triangular: one mask does. P and Z are formed once a chunk; d_t is taken
// in by Richardson's iteration whose steps are Chebyshev's nodes: x += g p, s <- (1 - g) s - g d p
// for p = M_t^{-1} s, since (M_t + d_t I) p = s + d_t p. The error after n products is 2 R^n.
//
// M_t >= I, so that P, Z <= 1 and every factor fits float16, split in two (high + low, 22 bits)
// wherever its rounding would show: bfloat16's split keeps 16. What a product is taken of (q,
// exact; then the residual s) is rounded once: an error there is one of q. Keys, values and queries
// are scaled by a power of two a chunk, which loses nothing.
//
// Warp w has dims 16 w .. of every matrix of dims x tokens, and the tile (w / 4, w % 4) of those of
// tokens x tokens. Its rows of P are the sums that the inversion left in its registers.
#pragma once

#include <cstdint>

#include "cuda/chunk_kernel.hpp"
#include "cuda/group.hpp"

namespace kalmanet::cuda::direct32 {

struct DirectLayout {
  static constexpr int kDim = 128;
  static constexpr int kTokens = 32;
  static constexpr int kThreads = 256;
  static constexpr int kTile = 2 * 8 * 32;  // fragments of 32 x 128
  static constexpr int kMostSteps = 20;
};

// A shift ratio that needs more steps is left over, as is a matrix whose norm is so many times mu:
// dk is a small difference of products of x and z, each the more magnified, and apart from one
// rounding its error was found to be 5e-4 at 1000, 6e-3 at 2400 and 0.2 at 7400 (emulated, ratios
// of 0.02 to 0.001, memories of 6 to 5000 tokens; 1000 is a ratio of 0.001 or, at a memory of 10,
// of 0.005).
inline constexpr float kLargestEntry = 1e3f;
// P is kept 2^8 times as large, Z 2^4: the low parts of what is 1e-3 of the largest stay normal.
inline constexpr float kInverseScale = 256.0f, kGainScale = 16.0f;

struct DirectShared {
  Left keys[DirectLayout::kTile];      // K: tokens x dims [(m * 8 + k) * 32 + lane]
  Left columns[DirectLayout::kTile];   // K^T: dims x tokens [(m * 2 + k) * 32 + lane]
  Left values[DirectLayout::kTile];    // V^T likewise
  Left queries[DirectLayout::kTile];   // Q, as keys
  Left right[DirectLayout::kTile];     // what products are taken of, transposed: as keys
  Left gains[2][DirectLayout::kTile];  // Y^T, then Z^T: high, low. While inverting: panels
  Left low[8 * 8 * 32];                // P's low parts [(m * 8 + k) * 32 + lane]
  Right middle[2][8 * 32];             // tokens x tokens as right factor [(k * 4 + n) * 32 + lane]
  Left pivot[2][2][32];                // D^{-1} of this pivot and the next
  alignas(16) float tile[8 * 32][4];   // I + K Y, each warp's
  float gain[DirectLayout::kMostSteps][DirectLayout::kTokens];
  float dots[2][8][DirectLayout::kTokens];
  float gram[4][DirectLayout::kTokens];  // sum_j u_j (k_t . k_j)^2, four parts
  float norm2[DirectLayout::kTokens];
  float ridge[DirectLayout::kTokens], alpha[DirectLayout::kTokens], beta2[DirectLayout::kTokens];
  float weight[DirectLayout::kTokens];  // u_j = beta_j^2 e^{-G_j}
  float start[2][DirectLayout::kTokens], since_end[2][DirectLayout::kTokens];  // e^{G_t}, see body
  float value_weight[DirectLayout::kTokens];
  float key_scale[DirectLayout::kTokens], delta[DirectLayout::kTokens];
  float solution_scale[DirectLayout::kTokens];  // of x beside q
  float query_scale[DirectLayout::kTokens];     // a power of two for m
  float output_scale[DirectLayout::kTokens];    // for what comes of it
  float total[2];                               // e^{G_C}
  uint32_t largest[3][8];
  double warp[2][8];
  float largest_beta2;
  float mu;
  int tokens, steps, ill;
};

struct DirectRegisters {
  float h[16][4];       // 16 rows of H, of what is being inverted, of U^T
  uint32_t p[8][4];     // P, high
  uint32_t z[2][2][4];  // Z's rows as left factor: high, low
  float y[4][4], s[4][4], x[4][4];
  uint32_t raw[3][2][4];  // k, q, v on their way
  uint32_t a[2][4], b[2][4][2], c[2][4];
  uint32_t t[4];
  float g[2][4];
  float row[2][4], col[2][2], pivots[3];  // of an elimination step
  float f[2][4][4];                       // I + K Y
  float rows[2][8];
  float cols[4][2];
  uint32_t most[3];
  float extreme[2];
  double scan[2], other, sum;
  float dot[2];
};

// 2^(log2 - exponent of the largest), for the bits of the largest bfloat16's magnitude.
KALMANET_KERNEL float power_for(uint32_t largest, int log2) {
  int exponent = 254 + log2 - static_cast<int>(largest >> 7);
  if (largest == 0) exponent = 127;
  exponent = exponent < 1 ? 1 : (exponent > 254 ? 254 : exponent);
  return ldexpf(1.0f, exponent - 127);
}

template <class Group>
struct DirectProducts {
  using L = DirectLayout;
  using Registers = DirectRegisters;
  Group& group;
  DirectShared& shared;
  int dims = L::kDim;  // that are more than zeros (any_rows.hpp)

  // Left fragments in shared memory, tokens x dims, are right fragments of the transposed matrix:
  // dims x tokens, k-step k, token tile n.
  KALMANET_KERNEL static void load_right(const Left* from, int thread, int k, uint32_t (&b)[4][2]) {
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      const Left left = from[(m * 8 + k) * 32 + thread % 32];
      b[2 * m][0] = left.part[0], b[2 * m][1] = left.part[2];
      b[2 * m + 1][0] = left.part[1], b[2 * m + 1][1] = left.part[3];
    }
  }

  KALMANET_KERNEL void clear_y() {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int n = 0; n < 4; ++n) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.y[n][i] = 0;
      }
    });
  }

  // y += a[part] b[part2] for all four token tiles.
  KALMANET_KERNEL void add_tiles(int part, int part2) {
    KALMANET_UNROLL
    for (int n = 0; n < 4; ++n) {
      const auto y = [n](Registers& r) -> float (&)[4] { return r.y[n]; };
      group.multiply_add_float16(
          y, y, [part](Registers& r) -> uint32_t (&)[4] { return r.a[part]; },
          [part2, n](Registers& r) -> uint32_t (&)[2] { return r.b[part2][n]; });
    }
  }

  // y <- P right, high and (kSplit) low parts.
  template <bool kSplit>
  KALMANET_KERNEL void multiply_inverse(const Left* right) {
    clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(dims, k * 16)) break;
      group.each([&](int thread, Registers& r) {
        load_right(right, thread, k, r.b[0]);
        const Left low = shared.low[(thread / 32 * 8 + k) * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.a[0][i] = r.p[k][i];
          if (kSplit) r.a[1][i] = low.part[i];
        }
      });
      if (kSplit) add_tiles(1, 0);
      add_tiles(0, 0);
    }
  }

  // g[0] <- the warp's tile of rows right: 16 tokens of `rows` (high, low) by 8 of right.
  template <bool kSplitRows, bool kSplitRight>
  KALMANET_KERNEL void multiply_tokens(const Left* rows, const Left* rows_low, const Left* right,
                                       const Left* right_low) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.g[0][i] = r.g[1][i] = 0;
    });
    const auto g0 = [](Registers& r) -> float (&)[4] { return r.g[0]; };
    const auto g1 = [](Registers& r) -> float (&)[4] { return r.g[1]; };
    const auto a = [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; };
    const auto b = [](Registers& r) -> uint32_t (&)[2] { return r.b[0][0]; };
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(dims, k * 16)) break;
      group.each([&](int thread, Registers& r) {
        const int m = thread / 128, n = thread / 32 % 4, lane = thread % 32;
        const Left left = rows[(m * 8 + k) * 32 + lane];
        const Left other = right[(n / 2 * 8 + k) * 32 + lane];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.a[0][i] = left.part[i];
        // (A run-time index into a register array would move it to memory.)
        r.b[0][0][0] = n % 2 == 0 ? other.part[0] : other.part[1];
        r.b[0][0][1] = n % 2 == 0 ? other.part[2] : other.part[3];
        if (kSplitRows) {
          const Left low = rows_low[(m * 8 + k) * 32 + lane];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.a[1][i] = low.part[i];
        }
        if (kSplitRight) {
          const Left low = right_low[(n / 2 * 8 + k) * 32 + lane];
          r.b[1][0][0] = n % 2 == 0 ? low.part[0] : low.part[1];
          r.b[1][0][1] = n % 2 == 0 ? low.part[2] : low.part[3];
        }
      });
      // Two sums, so that no product waits for the one before it.
      if (kSplitRows) {
        group.multiply_add_float16(
            g1, g1, [](Registers& r) -> uint32_t (&)[4] { return r.a[1]; }, b);
      }
      if (kSplitRight) {
        group.multiply_add_float16(g1, g1, a,
                                   [](Registers& r) -> uint32_t (&)[2] { return r.b[1][0]; });
      }
      group.multiply_add_float16(g0, g0, a, b);
    }
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.g[0][i] += r.g[1][i];
    });
  }

  // Token row (j) and column (t) of element i of the warp's tile of tokens x tokens.
  KALMANET_KERNEL static int tile_row(int thread, int i) {
    return thread / 128 * 16 + thread % 32 / 4 + i / 2 * 8;
  }
  KALMANET_KERNEL static int tile_column(int thread, int i) {
    return thread / 32 % 4 * 8 + thread % 4 * 2 + i % 2;
  }
  KALMANET_KERNEL static int token_of(int thread, int n, int i) {
    return n * 8 + thread % 4 * 2 + i % 2;
  }

  // g[0] as right fragments.
  KALMANET_KERNEL void put_middle() {
    group.each([&](int, Registers& r) {
      r.t[0] = split_float16(r.g[0][0], r.g[0][1], r.t[2]);
      r.t[1] = split_float16(r.g[0][2], r.g[0][3], r.t[3]);
    });
    transpose_all();
    group.each([&](int thread, Registers& r) {
      const int at = (thread / 128 * 4 + thread / 32 % 4) * 32 + thread % 32;
      shared.middle[0][at] = {{r.t[0], r.t[1]}};
      shared.middle[1][at] = {{r.t[2], r.t[3]}};
    });
  }
  KALMANET_KERNEL void transpose_all() {
    group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
    group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
    group.transpose([](Registers& r) -> uint32_t& { return r.t[2]; });
    group.transpose([](Registers& r) -> uint32_t& { return r.t[3]; });
  }

  // y += left middle for left fragments of the warp's dims x tokens (high, low).
  template <bool kSplit, class A>
  KALMANET_KERNEL void add_middle(A&& left) {
    KALMANET_UNROLL
    for (int k = 0; k < 2; ++k) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int n = 0; n < 4; ++n) {
          const Right high = shared.middle[0][(k * 4 + n) * 32 + thread % 32];
          const Right low = shared.middle[1][(k * 4 + n) * 32 + thread % 32];
          r.b[0][n][0] = high.part[0], r.b[0][n][1] = high.part[1];
          r.b[1][n][0] = low.part[0], r.b[1][n][1] = low.part[1];
        }
        left(r, thread, k);
      });
      if (kSplit) add_tiles(1, 0);
      add_tiles(0, 1);
      add_tiles(0, 0);
    }
  }

  // A matrix of dims x tokens, of(registers), transposed as left fragments: right factors of later
  // products, high and (where low is not null) low parts.
  template <class Of>
  KALMANET_KERNEL void put_right(Left* high, Left* low, Of&& of) {
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      KALMANET_UNROLL
      for (int part = 0; part < 2; ++part) {
        if (part == 1 && low == nullptr) break;
        group.each([&](int, Registers& r) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {  // token half i % 2, dim half i / 2
            const float (&v)[4] = of(r)[2 * m + i % 2];
            uint32_t rest;
            const uint32_t whole = split_float16(v[i / 2 * 2], v[i / 2 * 2 + 1], rest);
            r.t[i] = part == 0 ? whole : rest;
          }
        });
        transpose_all();
        group.each([&](int thread, Registers& r) {
          Left* const to = part == 0 ? high : low;
          to[(m * 8 + thread / 32) * 32 + thread % 32] = {{r.t[0], r.t[1], r.t[2], r.t[3]}};
        });
      }
    }
  }
};

}  // namespace kalmanet::cuda::direct32
