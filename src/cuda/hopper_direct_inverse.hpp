// The direct solver on Hopper: the inverse of a 128 x 128 matrix that lies in a block's registers.
#pragma once

#include "cuda/hopper_direct_state.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperInverse : HopperState<Group> {
  using Base = HopperState<Group>;
  using Base::group, Base::shared;
  using Registers = HopperRegisters;

  // h <- -h^{-1} by the sweep operator, block by block (direct_inverse.hpp).
  KALMANET_KERNEL void invert() {
    const auto h = [](Registers& r) -> float* { return r.h; };
    KALMANET_LOOP  // one copy of the code
        for (int b = 0; b < num_pivots<Group>(this->job); ++b) {
      take_columns(b);
      put_panel(b % 2);
      invert_pivot(b);
      publish(group);
      group.barrier();
      load_pivot(b);
      begin_products(group);
      KALMANET_UNROLL
      for (int part = 2; part >= 0; --part) {  // high low, low high, high high
        multiply_wide<128, false>(
            group, h, [part](Registers& r) { return r.left[part == 1 ? 1 : 0]; },
            [&](int) { return Cores{shared.panel[b % 2][part == 2 ? 1 : 0], 2}; });
      }
      commit_products(group);
      wait_products<0>(group);
      settle<64>(group, h);
      put_columns(b);
    }
    group.barrier();
  }

  // next <- columns 16 b .. of h, tiles 2 b and 2 b + 1.
  KALMANET_KERNEL void take_columns(int b) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int block = 0; block < 8; ++block) {
        if (block != b) continue;
        only_here();
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) r.next[e / 4][e % 4] = r.h[8 * block + e];
      }
    });
  }
  // They <- B D^{-1} (the owner's: -D^{-1}), as it was multiplied: 22 bits of it.
  KALMANET_KERNEL void put_columns(int b) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float high[2] = {low_float16(r.left[0][j]), high_float16(r.left[0][j])};
        const float low[2] = {low_float16(r.left[1][j]), high_float16(r.left[1][j])};
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) r.next[j / 2][j % 2 * 2 + c] = -(high[c] + low[c]);
      }
      KALMANET_UNROLL
      for (int block = 0; block < 8; ++block) {
        if (block != b) continue;
        only_here();
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) r.h[8 * block + e] = r.next[e / 4][e % 4];
      }
    });
  }

  // 16 x 16 numbers as left factor, high and low.
  KALMANET_KERNEL static void split_block(const float (&v)[2][4], float sign,
                                          uint32_t (&left)[2][4]) {
    KALMANET_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float (&tile)[4] = v[j / 2];
      left[0][j] = split_float16(sign * tile[j % 2 * 2], sign * tile[j % 2 * 2 + 1], left[1][j]);
    }
  }

  // next, split, into panel `buffer`.
  KALMANET_KERNEL void put_panel(int buffer) {
    group.each([&](int thread, Registers& r) {
      uint32_t split[2][4];
      split_block(r.next, 1.0f, split);
      KALMANET_UNROLL
      for (int part = 0; part < 2; ++part) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          Core* const to = shared.panel[buffer][part] + thread / 128 * 16;
          Base::word_of(to, 2, thread, j) = split[part][j];
        }
      }
    });
  }

  // The owner of pivot b: its inverse into shared.pivot[b % 2].
  KALMANET_KERNEL void invert_pivot(int b) {
    group.with_warp(b, [&] {
      this->take_pivot([](Registers& r, int tile) -> float (&)[4] { return r.next[tile]; });
      this->sweep_pivot();
      this->put_pivot(shared.pivot[b % 2][0], shared.pivot[b % 2][1], -1.0f);
    });
  }

  // left <- what multiplies the panel: -B D^{-1} (the pivot's owner: D^{-1}). The owner's rows of h
  // <- 0: they become D^{-1} times the panel.
  KALMANET_KERNEL void load_pivot(int b) {
    this->load_right_transposed(0, [&](int) { return &shared.pivot[b % 2][0]; });
    this->load_right_transposed(1, [&](int) { return &shared.pivot[b % 2][1]; });
    KALMANET_UNROLL
    for (int part = 0; part < 2; ++part) {
      load_fragment<false>(
          group, [part](Registers& r) { return r.left[part]; },
          [&](int thread) {
            const int lane = thread % 32;
            const Core* const at =
                shared.panel[b % 2][part] + (thread / 32 * 2 + lane / 8 % 2) * 2 + lane / 16;
            return at->word + lane % 8 * 4;
          });
    }
    group.each([](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 8; ++e) r.g[e / 4][e % 4] = 0;
    });
    KALMANET_UNROLL
    for (int part = 2; part >= 0; --part) {
      this->add([](Registers& r, int j) -> float (&)[4] { return r.g[j]; },
                [part](Registers& r) -> uint32_t (&)[4] { return r.left[part == 1 ? 1 : 0]; },
                part == 2 ? 1 : 0);
    }
    group.each([&](int thread, Registers& r) {
      const bool owner = thread / 32 == b;
      split_block(r.g, -1.0f, r.left);
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) {
        // (Word j of a left factor is word j % 2, j / 2 of its transpose as a right one; D^{-1} is
        // symmetric.)
        r.left[0][j] = owner ? r.b[0][j % 2][j / 2] : r.left[0][j];
        r.left[1][j] = owner ? r.b[1][j % 2][j / 2] : r.left[1][j];
      }
    });
    group.with_warp(b, [&] {
      only_here();
      // A zero from memory: of one that it knows, ptxas makes "this product adds to nothing", which
      // it then says for the warpgroup where it holds for a warp (13.0; an illegal instruction, or
      // wrong sums).
      const float zero = shared.zero;
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int e = 0; e < 64; ++e) r.h[e] *= zero;
      });
    });
  }
  // What invert() left, three quadrants of it, into shared.inverse.
  KALMANET_KERNEL void put_inverse() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int column = 0; column < 2; ++column) {
        const int g = thread / 128;
        if (column > g) continue;
        Core* const to = shared.inverse[0][g + column];
        KALMANET_UNROLL
        for (int j = 0; j < 16; ++j) {
          const float* const v = &r.h[32 * column + 2 * j];
          uint32_t low;
          Base::word_of(to, 8, thread, j) =
              split_scaled(-kInverseScale * v[0], -kInverseScale * v[1], low);
          Base::word_of(to + 3 * HopperLayout::kQuadrant, 8, thread, j) = low;
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda
