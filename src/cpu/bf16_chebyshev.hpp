// Chebyshev's iteration for all tokens of a chunk with its products in bfloat16: what
// Arithmetic::bfloat16 asks for. The same steps as chebyshev.hpp; of
//
//   H_t y = e^{G_t} H_0 y + sum_{j <= t} M_tj k_j (k_j . y)
//
// the factors H_0, k_j, y and M_tj (k_j . y) are rounded to bfloat16 before they are multiplied.
// Products are exact and summed in float32 (8 + 8 bits fit 24), and x, the residual and every
// number of a token stay float32, so the rounding error enters each step afresh and no sum loses
// digits.
//
// H_0 and the keys are rounded once a chunk, y once a step, when it is made and still in registers.
// Numbers are kept in pairs of rows, 2p and 2p + 1, because that is what the processors' bfloat16
// instruction multiplies and adds: acc + a[2p+1] y[2p+1] + a[2p] y[2p], in this order, each product
// added with one rounding. How a pair lies in memory is the business of `Products`: the instruction
// (isa/bf16_avx512.hpp), or float32 arithmetic that gives its bits on every other processor
// (EmulatedBf16).
#pragma once

#include <cstdint>

#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {

// Products of bfloat16 numbers by float32 instructions. A pair is two rows of float32 numbers that
// are bfloat16 ones. The bits are those of the instruction, but for numbers below 2^-126, which it
// takes for zero, and where the baseline's multiply-add rounds twice.
template <class Vec>
struct EmulatedBf16 {
  using Reg = typename Vec::Reg;
  using Word = float;
  static constexpr int64_t kRowsOfPair = 2;

  static KALMANET_INLINE Reg rounded(Reg a) {
    alignas(64) uint16_t bits[Vec::kWidth];
    Vec::Half::store_bf16(bits, a);
    return Vec::Half::load_bf16(bits);
  }
  // Rows 2p and 2p + 1 of a register's lanes, to a pair whose rows are `ld` words apart.
  static KALMANET_INLINE void store_pair(Word* to, int64_t ld, Reg even, Reg odd) {
    Vec::store(to, rounded(even));
    Vec::store(to + ld, rounded(odd));
  }
  // acc[r][t] += sum over `pairs` of A(2p+1, r) Y[2p+1][t], then A(2p, r) Y[2p][t].
  template <int kRows, int kVecs>
  static KALMANET_INLINE void accumulate(Reg (&acc)[kRows][kVecs], const Word* a, int64_t ld,
                                         int64_t pairs, const Word* y) {
    for (int64_t p = 0; p < pairs; ++p) {
      for (int64_t c = 2 * p + 1; c >= 2 * p; --c) {
        Reg yc[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) yc[v] = Vec::load(y + c * kLanes + v * Vec::kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Reg b = Vec::set1(a[c * ld + r]);
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::fma(b, yc[v], acc[r][v]);
        }
      }
    }
  }
};

// A chunk's operator in pairs, and the two vectors of pairs that the iteration goes between: inside
// bf16_floats(K) words, all of which a pair of two words needs.
template <class Products>
struct Bf16Operator {
  using Word = typename Products::Word;
  static constexpr int64_t kHalf = 2 / Products::kRowsOfPair;  // pairs of one word take half

  KALMANET_INLINE Bf16Operator(int64_t Kp, float* words) {
    auto* next = reinterpret_cast<Word*>(words);
    const auto take = [&next](int64_t n) {
      Word* p = next;
      next += n / kHalf;
      return p;
    };
    h = take(Kp * Kp);
    k_lanes = take(Kp * kLanes);
    k_rows = take(Kp * kLanes);
    y = take(Kp * kLanes);
    next_y = take(Kp * kLanes);
  }

  Word* h;           // [Kp/2 pairs][Kp]
  Word* k_lanes;     // [Kp/2 pairs][kLanes]
  Word* k_rows;      // [kLanes/2 pairs][Kp]
  Word *y, *next_y;  // [Kp/2 pairs][kLanes]
};

// `rows` (even) rows of `ld` numbers as pairs.
template <class Vec, class Products>
void to_pairs(const float* from, int64_t rows, int64_t ld, typename Products::Word* to) {
  for (int64_t c = 0; c < rows; c += 2) {
    auto* pair = to + c / 2 * Products::kRowsOfPair * ld;
    for (int64_t n = 0; n < ld; n += Vec::kWidth) {
      Products::store_pair(pair + n, ld, Vec::load(from + c * ld + n),
                           Vec::load(from + (c + 1) * ld + n));
    }
  }
}

// Once a chunk, after its norms: the operator, rounded, into `words`.
template <class Vec, class Products>
void bf16_prepare(const Chunk<float>& c, const float* h, bool h_is_zero, float* words) {
  const Bf16Operator<Products> op(c.Kp, words);
  if (!h_is_zero) to_pairs<Vec, Products>(h, c.Kp, c.Kp, op.h);
  to_pairs<Vec, Products>(c.k_lanes, c.Kp, kLanes, op.k_lanes);
  to_pairs<Vec, Products>(c.k_rows, kLanes, c.Kp, op.k_rows);
}

// Solves (H_t + lambda_t I) x_t = b_t for every token of the prepared chunk, as chebyshev() does.
template <class Vec, class Products>
float* bf16_solve(const Chunk<float>& c, bool h_is_zero, float* words, const float* b, int num_iter,
                  float* x, float* other) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  constexpr int64_t kEach = Products::kRowsOfPair;
  constexpr int kVecs = T::kVecs;
  static_assert(T::kRows % 2 == 0);
  Bf16Operator<Products> op(c.Kp, words);
  const int64_t inner = (c.K + 1) / 2;  // rows from K on are zeros
  const int64_t keys = (c.n + 1) / 2;
  alignas(64) float momentum[kLanes], gain[kLanes], lambda[kLanes];
  alignas(64) typename Products::Word s[kLanes * kLanes];  // pairs of [j][t]: M_tj (k_j . y_t)
  double w[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) {
    w[t] = 2.0;
    gain[t] = static_cast<float>(c.step[t]);
    lambda[t] = static_cast<float>(c.lambda[t]);
  }
  for (int64_t i = 0; i < c.Kp; ++i) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
      const int64_t at = i * kLanes + lane;
      Vec::store(x + at, Vec::mul(Vec::load(gain + lane), Vec::load(b + at)));
      Vec::store(other + at, Vec::zero());
    }
  }
  to_pairs<Vec, Products>(x, c.Kp, kLanes, op.y);
  for (int iteration = 0; iteration < num_iter; ++iteration) {
    for (int64_t t = 0; t < kLanes; ++t) {
      w[t] = 1.0 / (1.0 - c.rho2[t] * w[t]);
      momentum[t] = static_cast<float>(w[t] - 1.0);
      gain[t] = static_cast<float>(c.step[t] * w[t]);
    }
    for (int64_t j = 0; j < kLanes; j += T::kRows) {
      T tile;
      tile.clear();
      Products::accumulate(tile.acc, op.k_lanes + j, kLanes, inner, op.y);
#pragma GCC unroll 8
      for (int r = 0; r < T::kRows; r += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const float* m = c.h_decay->lanes + (j + r) * kLanes + v * Vec::kWidth;
          Products::store_pair(s + (j + r) / 2 * kEach * kLanes + v * Vec::kWidth, kLanes,
                               Vec::mul(tile.acc[r][v], Vec::load(m)),
                               Vec::mul(tile.acc[r + 1][v], Vec::load(m + kLanes)));
        }
      }
    }
    for (int64_t n = 0; n < c.Kp; n += T::kRows) {
      T tile;
      tile.clear();
      if (!h_is_zero) {
        Products::accumulate(tile.acc, op.h + n, c.Kp, inner, op.y);
        tile.scale_lanes(c.h_decay->since_start);
      }
      Products::accumulate(tile.acc, op.k_rows + n, c.Kp, keys, s);
#pragma GCC unroll 8
      for (int r = 0; r < T::kRows; r += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const int lane = v * Vec::kWidth;
          const auto advance = [&](int row) __attribute__((always_inline)) {
            const int64_t at = (n + row) * kLanes + lane;
            const Reg xt = Vec::load(x + at);
            const Reg residual = Vec::sub(Vec::fma(Vec::load(lambda + lane), xt, tile.acc[row][v]),
                                          Vec::load(b + at));
            const Reg change = Vec::sub(xt, Vec::load(other + at));
            const Reg moved = Vec::fma(Vec::load(momentum + lane), change, xt);
            const Reg next = Vec::fnma(Vec::load(gain + lane), residual, moved);
            Vec::store(other + at, next);
            return next;
          };
          const Reg even = advance(r);
          const Reg odd = advance(r + 1);
          Products::store_pair(op.next_y + (n + r) / 2 * kEach * kLanes + lane, kLanes, even, odd);
        }
      }
    }
    float* next = other;
    other = x;
    x = next;
    auto* next_y = op.next_y;
    op.next_y = op.y;
    op.y = next_y;
  }
  return x;
}

template <class Vec, class Products>
constexpr Bf16Kernels bf16_kernels_of(bool instructions) {
  return {&bf16_prepare<Vec, Products>, &bf16_solve<Vec, Products>, instructions};
}

}  // namespace kalmanet::cpu
