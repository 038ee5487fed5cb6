// The direct solver on Hopper: the inverse of a 128 x 128 matrix that lies in a warpgroup's
// registers.
#pragma once

#include "cuda/hopper_direct_state.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperInverse : HopperState<Group> {
  using Base = HopperState<Group>;
  using Base::group, Base::shared;
  using Registers = HopperRegisters;

  // h <- -h^{-1} by the sweep operator, block by block (direct_inverse.hpp). The columns of the
  // next pivot are swept first and apart, so that it is inverted while the matrix units sweep the
  // rest; h's own copy of them is used for nothing but the blocks that are swept later.
  KALMANET_KERNEL void invert() {
    take_columns(0);
    put_panel(0);
    invert_pivot(0, 0);
    publish(group);
    group.barrier();
    KALMANET_LOOP  // eight copies would not fit the instruction cache
        for (int b = 0; b < 8; ++b) {
      load_pivot(b);
      if (b < 7) {
        take_columns(b + 1);
        sweep_next(b);
      }
      begin_products(group);
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        const auto h = [m](Registers& r) -> float* { return r.h[m]; };
        KALMANET_UNROLL
        for (int part = 2; part >= 0; --part) {  // high low, low high, high high
          const Core* const panel = shared.panel[b % 2][part == 2 ? 1 : 0];
          multiply_wide<128, false>(
              group, h, [m, part](Registers& r) { return r.left[m][part == 1 ? 1 : 0]; },
              {panel, 2});
        }
      }
      commit_products(group);
      if (b < 7) {
        put_panel((b + 1) % 2);
        invert_pivot(b + 1, (b + 1) % 2);
      }
      wait_products<0>(group);
      settle<64>(group, [](Registers& r) -> float* { return r.h[0]; });
      settle<64>(group, [](Registers& r) -> float* { return r.h[1]; });
      put_columns(b);
      publish(group);
      group.barrier();
    }
  }

  // next <- columns 16 b .. of h, tiles 2 b and 2 b + 1.
  KALMANET_KERNEL void take_columns(int b) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int block = 0; block < 8; ++block) {
        if (block != b) continue;
        KALMANET_UNROLL
        for (int m = 0; m < 2; ++m) {
          KALMANET_UNROLL
          for (int e = 0; e < 8; ++e) r.next[m][e / 4][e % 4] = r.h[m][8 * block + e];
        }
      }
    });
  }
  // They <- B D^{-1} (the owner's: -D^{-1}), as it was multiplied: 22 bits of it.
  KALMANET_KERNEL void put_columns(int b) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        float v[8];
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t high = r.left[m][0][j], low = r.left[m][1][j];
          v[2 * j] = -(low_float16(high) + low_float16(low));
          v[2 * j + 1] = -(high_float16(high) + high_float16(low));
        }
        KALMANET_UNROLL
        for (int block = 0; block < 8; ++block) {
          KALMANET_UNROLL
          for (int e = 0; e < 8; ++e) {
            r.h[m][8 * block + e] = block == b ? v[e] : r.h[m][8 * block + e];
          }
        }
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
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        uint32_t split[2][4];
        split_block(r.next[m], 1.0f, split);
        KALMANET_UNROLL
        for (int part = 0; part < 2; ++part) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            Base::word_of(shared.panel[buffer][part] + 16 * m, 2, thread, j) = split[part][j];
          }
        }
      }
    });
  }

  // The owner of pivot b: its inverse into shared.pivot[buffer].
  KALMANET_KERNEL void invert_pivot(int b, int buffer) {
    group.with_warp(b % 4, [&] {
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) {
          r.g[e / 4][e % 4] = b < 4 ? r.next[0][e / 4][e % 4] : r.next[1][e / 4][e % 4];
        }
      });
      this->take_pivot([](Registers& r, int tile) -> float (&)[4] { return r.g[tile]; });
      this->sweep_pivot();
      this->put_pivot(shared.pivot[buffer][0], shared.pivot[buffer][1], -1.0f);
    });
  }

  // left <- what multiplies the panel: -B D^{-1} (the pivot's owner: D^{-1}). The owner's rows of h
  // <- 0: they become D^{-1} times the panel.
  KALMANET_KERNEL void load_pivot(int b) {
    this->load_right_transposed(0, [&](int) { return &shared.pivot[b % 2][0]; });
    this->load_right_transposed(1, [&](int) { return &shared.pivot[b % 2][1]; });
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      KALMANET_UNROLL
      for (int part = 0; part < 2; ++part) {
        load_fragment<false>(
            group, [m, part](Registers& r) { return r.left[m][part]; },
            [&](int thread) {
              const int lane = thread % 32;
              const Core* const at = shared.panel[b % 2][part] + 16 * m +
                                     (thread / 32 * 2 + lane / 8 % 2) * 2 + lane / 16;
              return at->word + lane % 8 * 4;
            });
      }
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) r.g[e / 4][e % 4] = 0;
      });
      KALMANET_UNROLL
      for (int part = 2; part >= 0; --part) {
        this->add(
            [](Registers& r, int j) -> float (&)[4] { return r.g[j]; },
            [m, part](Registers& r) -> uint32_t (&)[4] { return r.left[m][part == 1 ? 1 : 0]; },
            part == 2 ? 1 : 0);
      }
      group.each([&](int thread, Registers& r) {
        const bool owner = thread / 32 + 4 * m == b;
        split_block(r.g, -1.0f, r.left[m]);
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          // (Word j of a left factor is word j % 2, j / 2 of its transpose as a right one; D^{-1}
          // is symmetric.)
          r.left[m][0][j] = owner ? r.b[0][j % 2][j / 2] : r.left[m][0][j];
          r.left[m][1][j] = owner ? r.b[1][j % 2][j / 2] : r.left[m][1][j];
        }
      });
    }
    group.with_warp(b % 4, [&] {
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int m = 0; m < 2; ++m) {
          if (b / 4 != m) continue;
          KALMANET_UNROLL
          for (int e = 0; e < 64; ++e) r.h[m][e] = 0.0f;
        }
      });
    });
  }

  // next <- next + left panel, its columns 16 (b + 1) .. .
  KALMANET_KERNEL void sweep_next(int b) {
    const auto panel_rows = [&](int part, int thread) {
      // Columns of the product are rows of the panel: two cores of 8, each with two cores along k.
      const int lane = thread % 32;
      const Core* const at =
          shared.panel[b % 2][part] + (2 * (b + 1) + lane / 16) * 2 + lane / 8 % 2;
      return at->word + lane % 8 * 4;
    };
    KALMANET_UNROLL
    for (int part = 0; part < 2; ++part) {
      load_fragment<false>(
          group, [part](Registers& r) { return &r.b[part][0][0]; },
          [&](int thread) { return panel_rows(part, thread); });
    }
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      KALMANET_UNROLL
      for (int part = 2; part >= 0; --part) {
        this->add(
            [m](Registers& r, int j) -> float (&)[4] { return r.next[m][j]; },
            [m, part](Registers& r) -> uint32_t (&)[4] { return r.left[m][part == 1 ? 1 : 0]; },
            part == 2 ? 1 : 0);
      }
    }
  }

  // What invert() left, three quadrants of it, into shared.inverse.
  KALMANET_KERNEL void put_inverse() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int quadrant = 0; quadrant < 3; ++quadrant) {
        const int m = quadrant > 0 ? 1 : 0, column = quadrant == 2 ? 1 : 0;
        KALMANET_UNROLL
        for (int j = 0; j < 16; ++j) {
          const float* const v = &r.h[m][32 * column + 2 * j];
          uint32_t low;
          Base::word_of(shared.inverse[0][quadrant], 8, thread, j) =
              split_scaled(-kInverseScale * v[0], -kInverseScale * v[1], low);
          Base::word_of(shared.inverse[1][quadrant], 8, thread, j) = low;
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda
