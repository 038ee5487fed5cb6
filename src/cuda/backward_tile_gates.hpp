// The gradients of the gates from what the backward's last matrix-unit kernel
// (backward_tile_gradients.hpp) measured of a chunk.
//
// A gate's gradient is the sum of all actions that cross it (src/cpu/gka_gate_gradient.hpp), of what
// tokens before it and the start put into a state with what it and later tokens and the carry take
// out. No differences: exact also where a decay leaves almost nothing.
#pragma once

#include "cuda/backward_tiles.hpp"

namespace kalmanet::cuda {

template <class Group>
struct TileGates : BackwardTiles<Group> {
  using Base = BackwardTiles<Group>;
  using Base::group, Base::shared, Base::backward, Base::job, Base::piece, Base::head, Base::t0,
      Base::n;
  using L = TileLayout;
  using Registers = TileRegisters;

  // shared.crossing[which] <- of the actions of token t (rows) on token i (columns), of(registers),
  // those of t < c on i >= c, for every c: each row group's part. No barrier.
  template <class Of>
  KALMANET_KERNEL void put_crossing(int which, Of&& of) {
    this->template sum_along<true>(of);
    KALMANET_UNROLL
    for (int tile = 0; tile < 8; ++tile) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int column = Base::pair_of(thread, tile, c);
          r.column[c] = 0.0f;
          KALMANET_UNROLL
          for (int h = 0; h < 2; ++h) {
            if (Base::token_of(thread, 2 * h) < column) r.column[c] += of(r)[tile][2 * h + c];
          }
        }
      });
      group.sum_rows([](Registers& r) -> float& { return r.column[0]; });
      group.sum_rows([](Registers& r) -> float& { return r.column[1]; });
      group.each([&](int thread, Registers& r) {
        if (thread >= 128 || thread % 32 >= 4) return;
        float* const to = shared.crossing[which][thread / 32];
        to[Base::pair_of(thread, tile, 0)] = r.column[0];
        to[Base::pair_of(thread, tile, 1)] = r.column[1];
      });
    }
  }

  // After all measures and a barrier; one more inside.
  KALMANET_KERNEL void gradients_of_gates() {
    const float e_u = static_cast<float>(this->sum_of(0));
    const float s_h = static_cast<float>(-this->sum_of(1));
    const float norm2 = static_cast<float>(this->sum_of(2));
    group.each([&](int thread, Registers&) {
      const int which = thread / L::kTokens, i = thread % L::kTokens;
      if (which == 0) {
        float norm = norm2;  // <H_i, H_0> e^{-G_i}
        for (int j = 0; j < L::kTokens; ++j) {
          const float added = shared.inverse[0][j] * shared.beta[j] * shared.beta[j] *
                              this->dot(kTileKeyStart, j);
          norm += j <= i ? added : 0.0f;
        }
        const float start = shared.start[0][i];
        shared.acting[0][i] =
            -(this->dot(kTileAdjointStart, i) + shared.w[i] * start * (start * norm));
      } else if (which == 1) {
        shared.acting[1][i] = this->dot(kTileMixStart, i);
      }
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      const int which = thread / L::kTokens, t = thread % L::kTokens;
      if (which >= 2 || t >= n) return;
      float sum = 0.0f;
      for (int rows = 0; rows < 4; ++rows) sum += shared.crossing[which][rows][t];
      float before = shared.total[which] * (which == 0 ? 0.5f * s_h : e_u);
      const float share = which == 0 ? 0.5f : 1.0f;
      for (int i = 0; i < L::kTokens; ++i) {
        const float carried =
            share * shared.beta[i] * this->dot(which == 0 ? kTileKeyCarry : kTileValueCarry, i);
        if (i < t) before += carried;
        if (i >= t) sum += shared.acting[which][i];
      }
      store_scalar<float>(which == 0 ? backward.dgk : backward.dg, piece.row, t0 + t, head,
                          static_cast<double>(before + sum));
    });
  }
};

}  // namespace kalmanet::cuda
