// The inverse of a 128 x 128 matrix that lies in the block's registers.
#pragma once

#include "cuda/direct_pivot.hpp"

namespace kalmanet::cuda {

template <class Group>
struct DirectInverse : DirectPivot<Group> {
  using Base = DirectPivot<Group>;
  using Base::group, Base::shared;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  // h <- -h^{-1} by the sweep operator, block by block: sweeping pivot block D out of
  //   [D B^T; B C]  gives  [-D^{-1}  D^{-1} B^T; B D^{-1}  C - B D^{-1} B^T],
  // symmetric again; all eight swept leave the negative inverse. Each step turns the columns by one
  // block (h[n] is made of h[n + 2]), so that the pivot's are always the first two tiles and no
  // register is indexed at run time. The owner of the next pivot inverts it as soon as it has it.
  // pivots: the blocks that are swept; beyond them h is the negative of its inverse already.
  KALMANET_KERNEL void invert(int pivots) {
    group.with_warp(0, [&] { invert_pivot(0); });
    put_panel(0);
    group.barrier();
    KALMANET_LOOP  // eight copies would not fit the instruction cache
        for (int b = 0; b < pivots; ++b) {
      load_pivot(b);
      sweep_tiles(b, 0, 2);
      if (b + 1 < pivots) {
        group.with_warp(b + 1, [&] { invert_pivot((b + 1) % 2); });
        put_panel((b + 1) % 2);
      }
      sweep_tiles(b, 2, 14);
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.h[14 + j][i] = r.g[j][i];
        }
      });
      group.barrier();
    }
    if (!kAnyRows<Group>) return;
    KALMANET_LOOP
    for (int b = pivots; b < 8; ++b) {  // (turned as far as by all pivots)
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) r.g[i / 4][i % 4] = r.h[i / 4][i % 4];
        KALMANET_UNROLL
        for (int i = 0; i < 64; ++i) {
          r.h[i / 4][i % 4] = i < 56 ? r.h[i / 4 + 2][i % 4] : r.g[i / 4 - 14][i % 4];
        }
      });
    }
  }

  // Rows 16 w .. of panel `buffer`, as right factors [high or low][w][lane].
  KALMANET_KERNEL Left* panel(int buffer, int part) {
    return reinterpret_cast<Left*>(shared.gains[buffer]) + part * 256;
  }

  // The warp's 16 x 16 of the pivot's columns (tiles 0 and 1) in the order of a quad's words; parts
  // 1 and 2 change places for a left factor.
  KALMANET_KERNEL static void pack_block(const float (&v)[2][4], Left& high, Left& low) {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      high.part[i] = split_float16(v[i % 2][i / 2 * 2], v[i % 2][i / 2 * 2 + 1], low.part[i]);
    }
  }

  KALMANET_KERNEL void put_panel(int buffer) {
    group.each([&](int thread, Registers& r) {
      const float (&v)[2][4] = reinterpret_cast<const float (&)[2][4]>(r.h);
      Left high, low;
      pack_block(v, high, low);
      panel(buffer, 0)[thread] = high;
      panel(buffer, 1)[thread] = low;
    });
  }

  // g <- B D^{-1} (the pivot's owner: -D^{-1}); a <- what multiplies the panel: -g.
  KALMANET_KERNEL void load_pivot(int b) {
    this->load_right_transposed(0, [&](int) { return &shared.pivot[b % 2][0]; });
    this->load_right_transposed(1, [&](int) { return &shared.pivot[b % 2][1]; });
    group.each([&](int, Registers& r) {
      const float (&v)[2][4] = reinterpret_cast<const float (&)[2][4]>(r.h);
      Left high, low;
      pack_block(v, high, low);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = i == 1 ? 2 : (i == 2 ? 1 : i);
        r.a[0][i] = high.part[at];
        r.a[1][i] = low.part[at];
        r.g[0][i] = r.g[1][i] = 0;
      }
    });
    KALMANET_UNROLL
    for (int j = 0; j < 2; ++j) {
      const auto g = [j](Registers& r) -> float (&)[4] { return r.g[j]; };
      const auto high = [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; };
      const auto b0 = [j](Registers& r) -> uint32_t (&)[2] { return r.b[0][j]; };
      group.multiply_add_float16(g, g, [](Registers& r) -> uint32_t (&)[4] { return r.a[1]; }, b0);
      group.multiply_add_float16(g, g, high,
                                 [j](Registers& r) -> uint32_t (&)[2] { return r.b[1][j]; });
      group.multiply_add_float16(g, g, high, b0);
    }
    group.each([&](int thread, Registers& r) {
      if (thread / 32 == b) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint32_t high = r.b[0][i / 2][i % 2], low = r.b[1][i / 2][i % 2];
          r.g[i % 2][i / 2 * 2] = -(low_float16(high) + low_float16(low));
          r.g[i % 2][i / 2 * 2 + 1] = -(high_float16(high) + high_float16(low));
        }
        KALMANET_UNROLL
        for (int n = 2; n < 16; ++n) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.h[n][i] = 0;
        }
      }
      float negative[2][4];
      KALMANET_UNROLL
      for (int j = 0; j < 2; ++j) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) negative[j][i] = -r.g[j][i];
      }
      Left high, low;
      pack_block(negative, high, low);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = i == 1 ? 2 : (i == 2 ? 1 : i);
        r.a[0][i] = high.part[at];
        r.a[1][i] = low.part[at];
      }
    });
  }

  // h[n] <- h[n + 2] + a panel, tiles [from, to), an even number of them.
  KALMANET_KERNEL void sweep_tiles(int b, int from, int to) {
    KALMANET_UNROLL
    for (int n = 0; n < 14; n += 2) {
      if (n < from || n >= to) continue;
      group.each([&](int thread, Registers& r) {
        const int block = (b + 1 + n / 2) % 8;
        const Left high = panel(b % 2, 0)[block * 32 + thread % 32];
        const Left low = panel(b % 2, 1)[block * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.b[0][i / 2][i % 2] = high.part[i];
          r.b[1][i / 2][i % 2] = low.part[i];
        }
      });
      KALMANET_UNROLL
      for (int j = 0; j < 2; ++j) {
        const auto d = [n, j](Registers& r) -> float (&)[4] { return r.h[n + j]; };
        const auto c = [n, j](Registers& r) -> float (&)[4] { return r.h[n + j + 2]; };
        const auto a = [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; };
        const auto b0 = [j](Registers& r) -> uint32_t (&)[2] { return r.b[0][j]; };
        group.multiply_add_float16(
            d, c, [](Registers& r) -> uint32_t (&)[4] { return r.a[1]; }, b0);
        group.multiply_add_float16(d, d, a,
                                   [j](Registers& r) -> uint32_t (&)[2] { return r.b[1][j]; });
        group.multiply_add_float16(d, d, a, b0);
      }
    }
  }

  // One warp: the inverse of the 16 x 16 in its tiles 0 and 1 into shared.pivot[buffer].
  KALMANET_KERNEL void invert_pivot(int buffer) {
    this->take_pivot([](Registers& r, int tile) -> float (&)[4] { return r.h[tile]; });
    this->sweep_pivot();
    this->put_pivot(shared.pivot[buffer][0], shared.pivot[buffer][1], -1.0f);
  }

  // What invert() left, the lower half of it, into shared.inverse.
  KALMANET_KERNEL void put_inverse() {
    group.each([&](int thread, Registers& r) {
      const int row = thread / 32;
      KALMANET_UNROLL
      for (int column = 0; column < 8; ++column) {
        if (column > row) continue;
        Quad* const to = &shared.inverse[0][lower_block(row, column)];
        KALMANET_UNROLL
        for (int m = 0; m < 4; ++m) {
          const float (&v)[4] = r.h[2 * column + m % 2];
          uint32_t low;
          to->word[m][thread % 32] =
              split_scaled(-kInverseScale * v[m / 2 * 2], -kInverseScale * v[m / 2 * 2 + 1], low);
          to[L::kSymmetric].word[m][thread % 32] = low;
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda
