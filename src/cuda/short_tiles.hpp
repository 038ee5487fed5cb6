// The tiles of short memory's kernels (short_system.hpp): 64 tokens of one head and the 64 before
// them, products of all of them with their keys, and weights of keys. K = V = 128, bfloat16
// tensors.
#pragma once

#include <cstdint>

#include "cuda/short_plan.hpp"
#include "cuda/tile.hpp"
#include "cuda/token_solve.hpp"

namespace kalmanet::cuda {

struct ShortLayout {
  static constexpr int kTokens = ShortPlan::kTokens;
  static constexpr int kKeys = 2 * kTokens;  // the 64 tokens before, then the tokens' own
  static constexpr int kDim = 128;
  static constexpr int kThreads = 256;
  static constexpr int kTile = kTokens * kDim;
  static constexpr int kPitch = kKeys + 8;  // no bank twice when pairs of sums are stored
};

// kSides: right-hand sides; of each, products of every token with every key, then weights of keys.
template <int kSides>
struct ShortShared {
  using L = ShortLayout;
  alignas(128) uint16_t keys[2 * L::kTile];
  union {
    float gram[L::kKeys][L::kTokens];  // [j][d]: k_j . k_{j-d}
    uint16_t values[2 * L::kTile];
  };
  union {
    float dots[kSides][L::kTokens][L::kPitch];
    uint16_t rows[kSides][L::kTile];  // of the sides themselves
  };
  alignas(16) float vector[kSides][L::kThreads / 32][L::kTokens];  // a warp's own
  double gate[L::kKeys], since[L::kKeys];                          // G from the first key on
  float beta2[L::kKeys], alpha[L::kTokens], ridge[L::kTokens];
  int steps;
};

template <int kRows, int kSides>
struct ShortRegisters {
  static constexpr int kColumns = 32 * kRows;
  float row[kRows][kColumns];  // of Gram diag(e)
  float weight[kRows], side[kSides][kRows], y[kSides][kRows], previous[kSides][kRows];
  float c[kRows], previous_c[kRows];  // of x = c_q q + sum_j c_j k_j
  float factor[kRows], diagonal[kRows], product[kSides][kRows];
  float other, f, lambda, w, c_q, previous_q, sum, sum2, alpha, norm2[2];
  double gates;
  float s[8][4], p[8][4];  // sums of tokens x keys or dims
  uint32_t a[2][2][4], b[2][2][2], raw[4][4];
};

template <class Group, int kRows, int kSides>
struct ShortTiles : TileProducts<Group, ShortRegisters<kRows, kSides>> {
  using L = ShortLayout;
  using Registers = ShortRegisters<kRows, kSides>;
  using Base = TileProducts<Group, Registers>;
  using Base::group;
  static constexpr int kColumns = Registers::kColumns;

  ShortShared<kSides>& shared;
  const GkaJob& job;
  Piece piece;
  int64_t head, t0;  // the first of the tokens
  int window;        // keys a token
  int n = tokens_of(piece, t0);
  int64_t earliest = piece.first ? piece.begin : t0 - L::kTokens;  // the first token that is read

  static KALMANET_KERNEL int tokens_of(const Piece& piece, int64_t t0) {
    return static_cast<int>(piece.end - t0 < L::kTokens ? piece.end - t0 : L::kTokens);
  }

  struct First {
    KALMANET_KERNEL float (&operator()(Registers& r) const)[8][4] { return r.s; }
  };
  struct Second {
    KALMANET_KERNEL float (&operator()(Registers& r) const)[8][4] { return r.p; }
  };

  KALMANET_KERNEL Parts all_keys() const { return {shared.keys, nullptr}; }
  KALMANET_KERNEL Parts own_keys() const { return {shared.keys + L::kTile, nullptr}; }
  KALMANET_KERNEL Parts all_values() const { return {shared.values, nullptr}; }
  KALMANET_KERNEL Parts rows(int side) const { return {shared.rows[side], nullptr}; }

  // 64 tokens of a [B,T,heads,128] tensor from `first` on; zeros where there are none.
  KALMANET_KERNEL void load_tile(const Array& a, int64_t a_head, int64_t first, uint16_t* to) {
    group.each([&](int thread, Registers& r) {
      const int row = thread / 32 * 8 + thread % 8;
      const int64_t t = first + row;
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) r.raw[i][j] = 0;
        if (t < earliest || t >= piece.end) continue;
        load16(static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t, a_head) +
                   column_of_piece(thread, i),
               r.raw[i]);
      }
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        store16(to + Blocks<128>::at(row, column_of_piece(thread, i)), r.raw[i]);
      }
    });
  }
  static KALMANET_KERNEL int column_of_piece(int thread, int i) {
    return (thread / 8 % 4 + 4 * i) * 8;
  }
  KALMANET_KERNEL void load_both(const Array& a, int64_t a_head, uint16_t* to) {
    load_tile(a, a_head, t0 - L::kTokens, to);
    load_tile(a, a_head, t0, to + L::kTile);
  }

  // What is a token's own. Ends with a barrier.
  KALMANET_KERNEL void load_scalars() {
    group.each([&](int thread, Registers&) {
      if (thread >= L::kKeys) return;
      const int64_t t = t0 - L::kTokens + thread;
      const bool real = t >= earliest && t < piece.end;
      const float beta = real ? scalar_at<float>(job.beta, piece.row, t, head, 1.0) : 0.0f;
      const float gate = real ? scalar_at<float>(job.gk, piece.row, t, head, 0.0) : 0.0f;
      shared.beta2[thread] = beta * beta;
      // (What is below e^-1000 is nothing, and sums of it must not be infinite.)
      shared.gate[thread] = static_cast<double>(gate < -1000.0f ? -1000.0f : gate);
      if (thread < L::kTokens) return;
      const int own = thread - L::kTokens;
      shared.alpha[own] = real ? scalar_at<float>(job.alpha, piece.row, t, head, 1.0) : 1.0f;
      const float ridge =
          real ? scalar_at<float>(job.ridge, piece.row, t, head, job.ridge_ratio) : 1.0f;
      shared.ridge[own] = ridge > 0.0f ? ridge : NAN;
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread == L::kKeys && !job.direct) {
        float smallest = INFINITY;
        for (int t = 0; t < n; ++t) smallest = fminf(smallest, shared.ridge[t]);
        shared.steps = job.num_iter != 0
                           ? job.num_iter
                           : counted_steps(static_cast<double>(smallest), job.tolerance);
      }
      if (thread >= L::kKeys) return;
      double since = 0.0;
      for (int j = 0; j <= thread; ++j) since += shared.gate[j];
      shared.since[thread] = since;
    });
    group.barrier();
  }

  // What each key has to do with those before it. Begins after a barrier (values are done with).
  KALMANET_KERNEL void measure_keys() {
    KALMANET_LOOP
    for (int half = 1; half >= 0; --half) {  // the tokens' own keys, then those before them
      this->clear(First());
      this->template multiply<false, true, false, false>({shared.keys + half * L::kTile, nullptr},
                                                         all_keys(), First());
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int j = half * L::kTokens + Base::token_of(thread, i);
            const int back = j - Base::column_of(thread, tile, i);
            if (back >= 0 && back < L::kTokens) shared.gram[j][back] = r.s[tile][i];
          }
        }
      });
    }
  }
  // Sums of tokens x keys into shared.dots.
  template <class Of>
  KALMANET_KERNEL void put_dots(int side, Of&& of) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        KALMANET_UNROLL
        for (int h = 0; h < 2; ++h) {
          store_pair(
              &shared.dots[side][Base::token_of(thread, 2 * h)][Base::column_of(thread, tile, 0)],
              of(r)[tile][2 * h], of(r)[tile][2 * h + 1]);
        }
      }
    });
  }
  // Keys' weights of a half of the keys, as sums of tokens x tokens.
  template <class Of>
  KALMANET_KERNEL void take_weights(const float (&from)[L::kTokens][L::kPitch], int half, Of&& of) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        KALMANET_UNROLL
        for (int h = 0; h < 2; ++h) {
          load_pair(&from[Base::token_of(thread, 2 * h)]
                         [half * L::kTokens + Base::pair_of(thread, tile, 0)],
                    of(r)[tile][2 * h], of(r)[tile][2 * h + 1]);
        }
      }
    });
  }

  // Where a warp's token is: eight of them at a time.
  KALMANET_KERNEL static int token_in(int round, int thread) { return round * 8 + thread / 32; }

  // The weights of a token's keys, of(registers)[row], into its row of an array of tokens x keys.
  template <class Of>
  KALMANET_KERNEL void put_weights(int round, float (&to)[L::kTokens][L::kPitch], Of&& of) {
    group.each([&](int thread, Registers&) {
      const float zeros[4] = {};
      store4(&to[token_in(round, thread)][thread % 32 * 4], zeros);
    });
    group.barrier_warp();
    group.each([&](int thread, Registers& r) {
      const int t = token_in(round, thread);
      KALMANET_UNROLL
      for (int h = 0; h < kRows; ++h) {
        const int i = thread % 32 + 32 * h;
        if (i < window) to[t][L::kTokens + t - i] = of(r, h);
      }
    });
  }
};

// f(piece, its index, head, first token, window) for every so-manieth 64 tokens of all pieces, of
// `parts` each, and heads that are short and whose windows take kRows rows a lane. Heads take
// turns, so that a short one's work goes to all blocks.
template <int kRows, class F>
KALMANET_KERNEL void each_short_block(const GkaJob& job, int64_t block, int64_t blocks,
                                      int64_t parts, F&& f) {
  KALMANET_LOOP
  for (int64_t item = block; item < job.num_pieces * job.H * parts; item += blocks) {
    const int64_t head = item % job.H, part = item / job.H % parts;
    const int64_t piece_index = item / job.H / parts;
    if (!is_short(job, piece_index, head)) continue;
    const Piece piece = piece_of(job, piece_index);
    const int64_t t0 = piece.begin + part * ShortPlan::kTokens;
    if (t0 >= piece.end) continue;
    const int window = job.short_plans[piece_index * job.H + head].window[part];
    if (kRows == (window > 32 ? 2 : 1)) f(piece, piece_index, head, t0, window);
  }
}

}  // namespace kalmanet::cuda
