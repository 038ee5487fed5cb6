// Three or four tokens of a decode step at once, on matrix units: what the step kernel would do one
// after the other (drafts of speculative decoding). K = V = 128, 16-bit q, k, v. More tokens go in
// groups of four.
//
// All tokens share the states before them, H_0 and U_0:
//
//   H_t d = c_t H_0 d + sum_{j<=t} m_tj k_j (k_j . d)       c_t, m_tj: products of decays, beta_j^2
//   o_t / scale = c_t U_0^T m_t + sum_{j<=t} m_tj (k_j . m_t) v_j      (with U's decays)
//
// so a product of Chebyshev's iteration for all of them is one product with H_0 and a few dots, and
// each state is brought past all tokens in one pass. H_0, in registers, is split into two float16
// (high + low: 22 bits, as many registers as float32), and so is d, whose two parts are two
// columns of the same right factor: 4 tokens fill an m16n8k16 exactly. The iteration carries its
// residual (r -= A d, x += d): a product's error of 2^-22 is one of d, not of x.
//
// A block has four warps of 32 rows: each reads the whole right factor every step, so fewer warps
// read it fewer times. Every warp makes all dots with the keys itself, eight products of 40: then a
// step needs one barrier.
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
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTiles = 8;     // of 16 columns
  static constexpr int kRowTiles = 2;  // of 16 rows, a warp's

  // H as left factors. A lane has four rows in turn: the first two are fragment rows g and g + 8 of
  // its warp's first tile, the others of the second. Of tile t its four columns lie together.
  KALMANET_KERNEL static int first_row(int thread) {
    return thread / 32 * 32 + thread % 32 / 4 * 4;
  }
  KALMANET_KERNEL static int row(int thread, int row_tile) {
    return first_row(thread) + row_tile * 2;
  }
  KALMANET_KERNEL static int column(int thread, int tile) { return tile * 16 + thread % 4 * 4; }
  // The right factor: where column n begins, 64 words of two rows each; a lane's four of two tiles
  // lie together, and so do the two that it writes. High and low parts (n even, odd) are 16 banks
  // apart, for the eight lanes that read together, and so is a token from the next, for the sixteen
  // that write.
  static constexpr int kRight = 1024;  // of which 4 * 144 are used: two of them differ in one bit
  static constexpr int kTurn = kRight * sizeof(uint32_t);
  KALMANET_KERNEL static int right_column(int n) { return n / 2 * 144 + n % 2 * 80; }
  KALMANET_KERNEL static int read_byte(int thread) {
    return (right_column(thread % 32 / 4) + thread % 4 * 4) * 4;
  }
  KALMANET_KERNEL static int own_byte(int thread) {
    return (right_column(thread % 4 * 2) + thread / 32 * 16 + thread % 16 / 4 * 4 +
            thread % 32 / 16 * 2) *
           4;
  }
  // The key that is j-th to a lane: fragment row g is key g % 4, g + 8 its neighbour; the other two
  // are another lane's.
  KALMANET_KERNEL static int key(int thread, int j) { return (thread % 32 / 4 % kTokens) ^ j; }

  // A state where it is read out and brought past tokens: 16 rows of a thread, and of each its four
  // columns of either half.
  static constexpr int kRows = 16;
  KALMANET_KERNEL static int state_row(int thread) { return thread / 16 * kRows; }
  KALMANET_KERNEL static int half_column(int thread, int half) {
    return half * (kDim / 2) + thread % 16 * 4;
  }
};

struct FewShared {
  alignas(128) float u[FewLayout::kDim * FewLayout::kDim];
  alignas(16) uint32_t right[2][FewLayout::kRight];  // high, low of each d; in turn
  alignas(16) float q[FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float k[FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float v[FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float m[FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float k_rows[FewLayout::kDim][FewLayout::kTokens];  // k and m by rows
  alignas(16) float m_rows[FewLayout::kDim][FewLayout::kTokens];
  // Of o, by the 16 rows they come from.
  alignas(16) float partial[FewLayout::kThreads / 16][FewLayout::kTokens][FewLayout::kDim];
  alignas(16) float key_dots[FewLayout::kTokens][FewLayout::kTokens];
  // [which][token][warp]; 0: k_t^T H_0 k_t, 1: |x|^2 (at first |H_0|^2), 2: |U_0|^2 in token 0.
  alignas(16) float squares[3][FewLayout::kTokens][FewLayout::kWarps];
  alignas(16) float scalar[kStepScalars][FewLayout::kTokens];  // decays, not their logarithms
  float query_norm[FewLayout::kTokens], key_norm[FewLayout::kTokens];
  float value_norm[FewLayout::kTokens];
  int steps[FewLayout::kTokens], ill[FewLayout::kTokens];
  int64_t row;  // of the states: no register holds it, or what follows from it, through the solve
};

struct FewRegisters {
  float raw[FewLayout::kRowTiles][FewLayout::kTiles][2][4];   // H: rows, columns
  uint32_t high[FewLayout::kRowTiles][FewLayout::kTiles][4];  // the same, split
  uint32_t low[FewLayout::kRowTiles][FewLayout::kTiles][4];
  uint32_t key[FewLayout::kTiles][4], b[FewLayout::kTiles][2];
  float y[FewLayout::kRowTiles][4], z[FewLayout::kRowTiles][4], c[4];
  // Of a lane's token thread % 4, at its four rows; times into, and r times step.
  float r[4], d[4], x[4], product[4];
  float dots[FewLayout::kTokens], here[FewLayout::kTokens][4], dot_scale[2];
  float w, rho2, step, lambda, start, into;
  int own_byte, read_byte;  // of the right factor; kept, as StepRegisters'
  float sum, sums[FewLayout::kTokens], o[FewLayout::kTokens][8];
  uint32_t q_bits[2], k_bits[2], v_bits[2], scalar;  // on their way
  int steps;
};

// The power of two that brings a positive number to 2^14 .. 2^15; 1 for 0. (A vector of that norm
// fits float16, and what it leaves of a float32 does not fall below float16's range.)
KALMANET_KERNEL float to_size(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255);
  if (exponent == 0) return 1.0f;
  const int wanted = 254 + 14 - exponent;
  bits = static_cast<uint32_t>(wanted < 1 ? 1 : wanted > 253 ? 253 : wanted) << 23;
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
