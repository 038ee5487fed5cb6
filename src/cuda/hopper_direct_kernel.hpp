// The direct solver on Hopper's matrix units: the mathematics of direct_kernel.hpp, by products
// whose right factors, and most left ones, lie in shared memory (wgmma).
//
// A block is two warpgroups. Tokens are the 64 rows of every product but the states' own; each
// warpgroup makes half of the columns, dims 64 g .., and both make the same of what is small
// (tokens x tokens). In the states' products warpgroup g has rows 64 g .. . In shared memory, as 8
// x 8 cores, row after row:
//
//   keys     64 x 128   K: tokens x dims; while solving the iterate                     16 KB
//   gains    64 x 128   Y^T = K P, then Z^T, high and low; then m                       32 KB
//   inverse  three quadrants 64 x 64 of the symmetric P, high and low: P11, P21, P22    48 KB
//
// While P is not there yet, its place has H as float16; while inverting, that of the gains has the
// pivot's panels; while reading out, P's place has half of U's rows and V. With 9 KB of numbers a
// token beside them two blocks share a multiprocessor.
//
// What limits such a kernel is its code: much of it runs once a chunk, and a multiprocessor fetches
// what its cache of 128 KB does not hold at 5 and more cycles an instruction. Hence two warpgroups
// a chunk (half the elements a thread, half the code), loops in products, and one copy of
// everything.
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
  static constexpr int kThreads = 256;
  static constexpr int kMostSteps = DirectLayout::kMostSteps;
  static constexpr int kTile = 8 * 16;     // cores of 64 x 128
  static constexpr int kQuadrant = 8 * 8;  // of 64 x 64
};

// What is measured of a chunk's keys.
struct HopperMeasured {
  float product[2][HopperLayout::kTokens];  // k_t^T H_0 k_t, of either half of the dims; then |o|^2
  float gram[HopperLayout::kTokens];        // sum_j u_j (k_t . k_j)^2
  float norm2[HopperLayout::kTokens];
};

struct HopperShared {
  union {
    Core keys[HopperLayout::kTile];
    Core iterate[HopperLayout::kTile];
  };
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
  alignas(16) float line[2][16][4];  // four of its rows
  HopperMeasured measured;
  uint16_t coefficient[HopperLayout::kMostSteps][HopperLayout::kTokens];  // a_k
  float node[HopperLayout::kMostSteps];                                   // -2 nu_k
  float ridge[HopperLayout::kTokens], alpha[HopperLayout::kTokens], beta2[HopperLayout::kTokens];
  float weight[HopperLayout::kTokens];  // u_j = beta_j^2 e^{-G_j}
  float value_weight[HopperLayout::kTokens];
  float since[2][HopperLayout::kTokens];  // gates summed from the chunk's first token on
  float start[2][HopperLayout::kTokens], since_end[2][HopperLayout::kTokens];  // see load_scalars
  float key_scale[HopperLayout::kTokens], shift[HopperLayout::kTokens];
  float solution_scale[HopperLayout::kTokens];  // of x beside q
  float query_scale[HopperLayout::kTokens];     // a power of two for m
  float output_scale[HopperLayout::kTokens];    // for what comes of it
  float unit[3][HopperLayout::kTokens];  // what a token's k, v, q are multiplied by: 1 / unit
  float x2[2][HopperLayout::kTokens];    // |x|^2, of either half of the dims
  float total[2];                        // e^{G_C}
  float warp[2][8];                      // each warp's sum of a state's squares
  // The block's work, and where it is: no register holds them through a chunk.
  Piece piece;
  int64_t head, t0;
  float* states;  // H, then U: [tile of 8 columns][thread][4]
  float mu, zero;
  int tokens, steps, ill;
};
static_assert(sizeof(HopperShared) <= 113 * 1024, "two blocks a multiprocessor");

struct HopperRegisters {
  float h[64];          // 16 rows of H, of what is inverted, of U
  float y[32];          // sums of 64 x 128: the warpgroup's half of the columns
  float s[32];          // sums of 64 x 64
  uint32_t q[16];       // Q, likewise
  uint32_t f[2][16];    // a left factor of 64 x 64, high and low
  float next[2][4];     // the pivot's columns of h
  uint32_t left[2][4];  // what multiplies a panel, high and low
  uint32_t raw[8][4];   // rows on their way
  uint32_t a[2][4], b[2][2][2], t[4];
  uint32_t most;
  float g[2][4];
  float column[8], own[4], pivots[4][4], diagonal;  // of a pivot
  float dot[2], part[2], extreme[3], largest;
  double scan, pair[2], other;
  float sum;
};

struct HopperTraits {
  using L = HopperLayout;
  using Shared = HopperShared;
  using Registers = HopperRegisters;
};

}  // namespace kalmanet::cuda
