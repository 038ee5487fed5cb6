// Three or four tokens of a decode step at once, on matrix units: what the step kernel would do one
// after the other (drafts of speculative decoding). K = V = 128, 16-bit q, k, v. More tokens go in
// groups of four.
//
// All tokens share the state before them, H_0, which the registers hold:
//
//   H_t d = c_t H_0 d + sum_{j<=t} m_tj k_j (k_j . d)     c_t, m_tj: products of decays, beta_j^2
//
// so a product of Chebyshev's iteration for all of them is one product with H_0 and a few dots. H_0
// is split into two float16 (high + low / 2^11: 22 bits, as many registers as float32), and so is
// d, whose two parts are two columns of the same right factor: 4 tokens fill an m16n8k16 exactly.
// A warp has 16 rows of H_0; four of them multiply a quarter
// of the keys each as well, for all. The iteration carries its residual (r -= A d, x += d): a
// product's error of 2^-22 is one of d, not of x.
//
// The states stay where they are until all outputs are known to be good: where a token's
// amplification says that float32 is not enough (or a quarter of that: the products here are that
// much coarser), the block starts again as the step kernel, token by token.
#pragma once

#include "cuda/step_body.hpp"

namespace kalmanet::cuda {

struct FewLayout {
  static constexpr int kDim = 128;
  static constexpr int kTokens = 4;  // at once
  static constexpr int kThreads = 256;
  static constexpr int kTiles = 8;  // of 16 columns
  static constexpr int kKeyWarps = 4;
  static constexpr float kLow = 0x1p11f;  // low parts are stored so much larger
  // Words of a column of the right factor: 64, and 16 more so that the eight lanes that read
  // together meet no bank twice.
  static constexpr int kColumn = 80;

  // A warp's fragment rows g and g + 8 are its rows 2 g and 2 g + 1 (so that what a lane writes of
  // d is one word); of tile t the four columns of a lane lie together.
  KALMANET_KERNEL static int row(int thread) { return thread / 32 * 16 + thread % 32 / 4 * 2; }
  KALMANET_KERNEL static int column(int thread, int tile) { return tile * 16 + thread % 4 * 4; }
  // Where a column's element `row` (even; with the next) lies in a column of the right factor: a
  // lane's eight of two tiles together.
  KALMANET_KERNEL static int word(int row) {
    return row / 32 * 16 + row % 16 / 4 * 4 + row / 16 % 2 * 2 + row % 4 / 2;
  }
};

struct alignas(16) KeyFragment {
  uint32_t part[4];
};

struct FewShared {
  alignas(128) float u[FewLayout::kDim * FewLayout::kDim];
  alignas(16) uint32_t right[2 * FewLayout::kTokens][FewLayout::kColumn];  // high, low of each d
  alignas(16) float q[FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float k[FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float v[FewLayout::kTokens][FewLayout::kDim];  // times beta^2
  alignas(16) float m[FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float partial[8][FewLayout::kTokens][FewLayout::kDim];  // of o
  KeyFragment keys[FewLayout::kTiles][32];
  // [part of the dims][pair of keys][token][key of the pair]: half a part a load (async_copy.hpp).
  alignas(16) float dots[FewLayout::kKeyWarps][2][FewLayout::kTokens][2];
  // [which][token][warp]; 0: k_t^T H_0 k_t, 1: |x|^2 (at first |H_0|^2), 2: |U_t|^2, 3: |o|^2.
  alignas(16) float squares[4][FewLayout::kTokens][8];
  alignas(16) float scalar[kStepScalars][FewLayout::kTokens];  // decays, not their logarithms
  float query_norm[FewLayout::kTokens], key_norm[FewLayout::kTokens];
  int steps[FewLayout::kTokens];
};

struct FewRegisters {
  float raw[FewLayout::kTiles][2][4];                              // H: rows, columns
  uint32_t high[FewLayout::kTiles][4], low[FewLayout::kTiles][4];  // the same, split
  uint32_t b[FewLayout::kTiles][2], key[2][4], kb[2][2];
  float y[2][4], z[2][4], c[4], product[2], dot_scale;
  float r[2], d[2], x[2];
  float here[FewLayout::kTokens][2];  // the keys at its rows
  float w, rho2, step, lambda, start, into;
  float sum, sums[FewLayout::kTokens], o[FewLayout::kTokens][4];
  uint32_t first[2], second[2], scalar;  // on their way
  int steps;
};

// The power of two that brings a positive number to 1..2; 1 for 0.
KALMANET_KERNEL float to_one(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t exponent = bits >> 23 & 255;
  if (exponent == 0) return 1.0f;
  bits = (exponent < 254 ? 254 - exponent : 1) << 23;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// 1 / p of a power of two.
KALMANET_KERNEL float power_inverse(float p) {
  uint32_t bits;
  memcpy(&bits, &p, 4);
  bits = (254u << 23) - bits;
  memcpy(&p, &bits, 4);
  return p;
}

}  // namespace kalmanet::cuda
