// The direct solver on Hopper's matrix units: the mathematics of direct_kernel.hpp, by one
// warpgroup a block and products whose right factors lie in shared memory (wgmma).
//
// Tokens are the 64 rows of every product but the states' own, so the whole solve stays in a warp's
// registers: sums lie as the next left factor does, and no warp waits for another between the first
// product and the last. What is multiplied by lies in shared memory as 8 x 8 cores, row after row:
//
//   keys     64 x 128   K: tokens x dims                                                16 KB
//   gains    64 x 128   Y^T = K P, then Z^T, high and low                               32 KB
//   inverse  three quadrants 64 x 64 of the symmetric P, high and low: P11, P21, P22    48 KB
//
// While P is not there yet, its place has H as float16; while inverting, that of the gains has the
// pivot's panels; while reading out, P's place has the first half of U's rows and V, that of the
// gains the second half. With 100 KB of these and 9 of numbers a token, two blocks share a
// multiprocessor: while one has a pivot to invert, which is one warp's work, the other multiplies.
//
// Two blocks of 128 threads may have 255 registers a thread, so one warpgroup holds all of H while
// it is inverted (128 a thread).
#pragma once

#include <cstdint>

#include "cuda/direct_pivot.hpp"
#include "cuda/direct_plan.hpp"
#include "cuda/hopper_group.hpp"
#include "cuda/job.hpp"

namespace kalmanet::cuda {

struct HopperLayout {
  static constexpr int kDim = 128;
  static constexpr int kTokens = 64;
  static constexpr int kThreads = 128;
  static constexpr int kMostSteps = DirectLayout::kMostSteps;
  static constexpr int kTile = 8 * 16;     // cores of 64 x 128
  static constexpr int kQuadrant = 8 * 8;  // of 64 x 64
};

// What is measured of a chunk's keys.
struct HopperMeasured {
  float product[HopperLayout::kTokens];  // k_t^T H_0 k_t
  float gram[HopperLayout::kTokens];     // sum_j u_j (k_t . k_j)^2
  float norm2[HopperLayout::kTokens];
};

struct HopperShared {
  Core keys[HopperLayout::kTile];
  union {
    Core gains[2][HopperLayout::kTile];
    Core panel[2][2][16 * 2];  // [buffer][high or low]: 128 x 16
  };
  union {
    Core inverse[2][3][HopperLayout::kQuadrant];
    Core state[16 * 16];  // H, float16
    struct {
      Core state_half[2][HopperLayout::kTile];  // 64 of U's rows, high and low
      Core values[HopperLayout::kTile];
    } reading;
  };
  Core factor_rows[2][2 * 8];        // 16 rows of the small factor, high and low
  Quad pivot[2][2];                  // D^{-1} of this pivot and the next: high, low
  alignas(16) float square[16][20];  // a pivot on its way to another order
  alignas(16) float line[2][16][2];  // two of its rows
  HopperMeasured measured;
  uint16_t coefficient[HopperLayout::kMostSteps][HopperLayout::kTokens];  // a_k
  float node[HopperLayout::kMostSteps];                                   // -2 nu_k
  float ridge[HopperLayout::kTokens], alpha[HopperLayout::kTokens], beta2[HopperLayout::kTokens];
  float weight[HopperLayout::kTokens];  // u_j = beta_j^2 e^{-G_j}
  float value_weight[HopperLayout::kTokens];
  float since[2][HopperLayout::kTokens];  // gates summed from the chunk's first token on
  float start[2][HopperLayout::kTokens], since_end[2][HopperLayout::kTokens];  // see set_scalars
  float key_scale[HopperLayout::kTokens], shift[HopperLayout::kTokens];
  float solution_scale[HopperLayout::kTokens];  // of x beside q
  float query_scale[HopperLayout::kTokens];     // a power of two for m
  float output_scale[HopperLayout::kTokens];    // for what comes of it
  float unit[3][HopperLayout::kTokens];  // what a token's k, v, q are multiplied by: 1 / unit
  float total[2];                        // e^{G_C}
  double warp[2][4];                     // each warp's sum of a state's squares
  // The block's work, and where it is: no register holds them through a chunk.
  Piece piece;
  int64_t head, t0;
  float* states;  // H, then U: [rows 64 m][tile of 8 columns][thread][4]
  float mu;
  int tokens, steps, ill;
};
static_assert(sizeof(HopperShared) <= 113 * 1024, "two blocks a multiprocessor");

struct HopperRegisters {
  float h[2][64];          // H, or what is inverted, or U: rows 64 m + sum_row
  float y[64];             // sums of 64 x 128
  float s[32];             // sums of 64 x 64
  uint32_t keys[32];       // K as left factor
  uint32_t q[32];          // Q
  uint32_t w[32];          // the iterate; m's high parts
  uint32_t low[32];        // m's low parts; Y's
  uint32_t f[2][16];       // a left factor of 64 x 64, high and low
  uint32_t z[2][16];       // weighted keys, columns of dims
  float next[2][2][4];     // the next pivot's columns of h
  uint32_t left[2][2][4];  // what multiplies the panel [rows 64 m][high or low]
  uint32_t raw[8][4];      // rows on their way
  uint32_t a[2][4], b[2][2][2], t[4];
  uint32_t most;
  float g[2][4];
  float column[8], own[2], pivots[4], rows[8][2], diagonal;  // of a pivot
  float dot[2], x2[2], extreme[3], largest;
  double scan, pair[2], since[2][2], other, sum;
};

struct HopperTraits {
  using L = HopperLayout;
  using Shared = HopperShared;
  using Registers = HopperRegisters;
};

}  // namespace kalmanet::cuda
