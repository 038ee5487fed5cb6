// Matrices of 16-bit elements in shared memory, and products of them by mma.sync: factors are read
// by ldmatrix, by rows or transposed, from one copy of each matrix.
//
// A matrix lies as blocks of 8 x 8, each 128 bytes in a row: what ldmatrix reads of one block, a
// warp's sums of one 8 x 8 and eight rows' pieces of 16 bytes each meet every bank once, whatever
// the matrix's width; and all a lane's addresses differ by constants.
#pragma once

#include <cstring>

#include "cuda/any_rows.hpp"
#include "cuda/group.hpp"

#ifdef __CUDACC__
#define KALMANET_UNROLL_TWO _Pragma("unroll 2")
#else
#define KALMANET_UNROLL_TWO
#endif

namespace kalmanet::cuda {

// One and two words, aligned: of memcpy's, where the compiler cannot prove it, it makes bytes.
KALMANET_KERNEL void store_word(void* p, uint32_t word) {
#ifdef __CUDACC__
  *static_cast<uint32_t*>(p) = word;
#else
  std::memcpy(p, &word, 4);
#endif
}
KALMANET_KERNEL void store_pair(void* p, float a, float b) {
#ifdef __CUDACC__
  *static_cast<float2*>(p) = make_float2(a, b);
#else
  const float both[2] = {a, b};
  std::memcpy(p, both, 8);
#endif
}
KALMANET_KERNEL void load_pair(const void* p, float& a, float& b) {
#ifdef __CUDACC__
  const float2 both = *static_cast<const float2*>(p);
  a = both.x, b = both.y;
#else
  std::memcpy(&a, p, 4);
  std::memcpy(&b, static_cast<const char*>(p) + 4, 4);
#endif
}

template <int kColumns>
struct Blocks {
  static constexpr int kAcross = kColumns / 8;
  // Of the block that begins at (row, column).
  static constexpr KALMANET_BOTH int block(int row, int column) {
    return (row / 8 * kAcross + column / 8) * 64;
  }
  static constexpr KALMANET_BOTH int at(int row, int column) {
    return block(row, column) + row % 8 * 8 + column % 8;
  }
  // Four blocks' rows, lane l's being row l % 8 of block l / 8: blocks 0 and 1 below one another
  // (kDown) or side by side, 2 and 3 beside or below them.
  template <bool kDown>
  static constexpr KALMANET_BOTH int row_of(int lane) {
    const int near = lane / 8 % 2, far = lane / 16;
    return ((kDown ? near : far) * kAcross + (kDown ? far : near)) * 64 + lane % 8 * 8;
  }
};

// Four blocks from `first` on, as a warp's fragments; transposed each.
template <int kColumns, bool kDown, bool kTransposed>
KALMANET_KERNEL void load_blocks(const uint16_t* first, int lane, uint32_t (&out)[4]) {
  using Of = Blocks<kColumns>;
#ifdef __CUDACC__
  const auto at =
      static_cast<uint32_t>(__cvta_generic_to_shared(first + Of::template row_of<kDown>(lane)));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
  }
#else
  for (int i = 0; i < 4; ++i) {
    uint16_t half[2];
    for (int j = 0; j < 2; ++j) {
      const int row = kTransposed ? lane % 4 * 2 + j : lane / 4;
      const int column = kTransposed ? lane / 4 : lane % 4 * 2 + j;
      half[j] = first[Of::template row_of<kDown>(i * 8 + row) + column];
    }
    out[i] = half[0] | static_cast<uint32_t>(half[1]) << 16;
  }
#endif
}

// A matrix's high and low bfloat16 parts; no low ones where it is exact, as bfloat16 tensors are.
// (float16 ones have: then the matrix is exactly their sum.)
struct Parts {
  uint16_t* high;
  uint16_t* low;
};

KALMANET_KERNEL uint32_t low_bfloat16_parts(float a, float b, uint32_t high) {
  return pack_bfloat16(a - low_bfloat16(high), b - high_bfloat16(high));
}

// Two neighbours of a row, the first in an even column.
template <int kColumns>
KALMANET_KERNEL void load_two(const uint16_t* tile, int row, int column, float (&out)[2]) {
  uint32_t both;
  memcpy(&both, tile + Blocks<kColumns>::at(row, column), 4);
  out[0] = low_bfloat16(both), out[1] = high_bfloat16(both);
}
template <int kColumns>
KALMANET_KERNEL void load_two(const Parts& parts, int row, int column, float (&out)[2]) {
  float low[2];
  load_two<kColumns>(parts.high, row, column, out);
  load_two<kColumns>(parts.low, row, column, low);
  out[0] += low[0], out[1] += low[1];
}
// The same of parts that may have no low ones, where the group is an AnyRows, or have none.
template <int kColumns, class Group>
KALMANET_KERNEL void load_two_exact(const Parts& parts, int row, int column, float (&out)[2]) {
  if (kAnyRows<Group> && parts.low != nullptr) {
    load_two<kColumns>(parts, row, column, out);
  } else {
    load_two<kColumns>(parts.high, row, column, out);
  }
}
template <int kColumns>
KALMANET_KERNEL void store_two(const Parts& parts, int row, int column, float a, float b) {
  const int at = Blocks<kColumns>::at(row, column);
  const uint32_t high = pack_bfloat16(a, b), low = low_bfloat16_parts(a, b, high);
  store_word(parts.high + at, high);
  store_word(parts.low + at, low);
}
// Eight neighbours, the first in a column that is a multiple of 8.
template <int kColumns>
KALMANET_KERNEL void store_eight(const Parts& parts, int row, int column, const float (&v)[8]) {
  uint32_t high[4], low[4];
  KALMANET_UNROLL
  for (int i = 0; i < 4; ++i) {
    high[i] = pack_bfloat16(v[2 * i], v[2 * i + 1]);
    low[i] = low_bfloat16_parts(v[2 * i], v[2 * i + 1], high[i]);
  }
  const int at = Blocks<kColumns>::at(row, column);
  store16(parts.high + at, high);
  store16(parts.low + at, low);
}

// Eight neighbours as eight float16 (`raw`) are exactly the sum of two times as many bfloat16.
KALMANET_KERNEL void split_eight(const uint32_t (&raw)[4], uint32_t (&high)[4],
                                 uint32_t (&low)[4]) {
  KALMANET_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float a = low_float16(raw[i]), b = high_float16(raw[i]);
    high[i] = pack_bfloat16(a, b);
    low[i] = low_bfloat16_parts(a, b, high[i]);
  }
}

// Products of a block of eight warps with 64 tokens x 128 dims, tokens as rows: warp w has tokens
// 16 (w % 4) .. of what is tokens x anything, and of its columns 64 (w / 4) .. or (pairs of tokens)
// all 64; of what is dims x dims rows 32 (w % 4) .. and columns 64 (w / 4) .. . Registers have
// a[2][2][4] and b[2][2][2].
template <class Group, class R>
struct TileProducts {
  Group& group;
  int dims = 128;  // that are more than zeros (any_rows.hpp)

  static KALMANET_KERNEL int token_row(int thread) { return thread / 32 % 4 * 16; }
  static KALMANET_KERNEL int column_half(int thread) { return thread / 128 * 64; }
  // Token of element i and column of element i of tile n.
  static KALMANET_KERNEL int token_of(int thread, int i) {
    return token_row(thread) + thread % 32 / 4 + i / 2 * 8;
  }
  static KALMANET_KERNEL int pair_of(int thread, int n, int i) {
    return n * 8 + thread % 4 * 2 + i % 2;
  }
  static KALMANET_KERNEL int column_of(int thread, int n, int i) {
    return column_half(thread) + pair_of(thread, n, i);
  }
  static KALMANET_KERNEL int state_row(int thread, int m, int i) {
    return thread / 32 % 4 * 32 + m * 16 + thread % 32 / 4 + i / 2 * 8;
  }

  // Whether there are low parts, where there may be some: a tensor of any rows says so itself.
  static KALMANET_KERNEL bool has_low(const Parts& parts) {
    return !kAnyRows<Group> || parts.low != nullptr;
  }

  // c(registers, m, n) += a b for one step of 16: a is in the registers, load(registers, thread,
  // pair, part) brings two tiles of b. low_a, low_b: whether there are such parts after all.
  template <int kM, bool kLowA, bool kLowB, class Load, class C>
  KALMANET_KERNEL void add_step(bool low_a, bool low_b, Load&& load, C&& c) {
    KALMANET_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      group.each([&](int thread, R& r) {
        KALMANET_UNROLL
        for (int part = 0; part < (kLowB ? 2 : 1); ++part) {
          if (part == 1 && !low_b) continue;
          uint32_t v[4];
          load(thread, pair, part, v);
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.b[part][i / 2][i % 2] = v[i];
        }
      });
      // (The small products first; neighbours in this order write to different sums.)
      KALMANET_UNROLL
      for (int product = 0; product < 3; ++product) {
        if ((product == 0 && !kLowA) || (product == 1 && !kLowB)) continue;
        if ((product == 0 && !low_a) || (product == 1 && !low_b)) continue;
        KALMANET_UNROLL
        for (int m = 0; m < kM; ++m) {
          KALMANET_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int n = 2 * pair + j, a_part = product == 0 ? 1 : 0,
                      b_part = product == 1 ? 1 : 0;
            group.multiply_add([&c, m, n](R& r) -> float (&)[4] { return c(r, m, n); },
                               [a_part, m](R& r) -> uint32_t (&)[4] { return r.a[a_part][m]; },
                               [b_part, j](R& r) -> uint32_t (&)[2] { return r.b[b_part][j]; });
          }
        }
      }
    }
  }

  // c[n] += a b^T or (kRows) a b, for a of tokens x 128; b's rows, or columns, are the columns of
  // c: 64 of them, the warp's half (kHalf) or the first.
  template <bool kRows, bool kHalf, bool kLowA, bool kLowB, class C>
  KALMANET_KERNEL void multiply(Parts a, Parts b, C&& c) {
    KALMANET_UNROLL_TWO
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(dims, k * 16)) break;
      group.each([&](int thread, R& r) {
        const int at = Blocks<128>::block(token_row(thread), k * 16);
        load_blocks<128, true, false>(a.high + at, thread % 32, r.a[0][0]);
        if (kLowA && has_low(a)) load_blocks<128, true, false>(a.low + at, thread % 32, r.a[1][0]);
      });
      add_step<1, kLowA, kLowB>(
          has_low(a), has_low(b),
          [&](int thread, int pair, int part, uint32_t (&v)[4]) {
            const int column = (kHalf ? column_half(thread) : 0) + pair * 16;
            const uint16_t* const from = part == 0 ? b.high : b.low;
            if constexpr (kRows) {
              load_blocks<128, true, true>(from + Blocks<128>::block(k * 16, column), thread % 32,
                                           v);
            } else {
              load_blocks<128, false, false>(from + Blocks<128>::block(column, k * 16), thread % 32,
                                             v);
            }
          },
          [&c](R& r, int, int n) -> float (&)[4] { return c(r)[n]; });
    }
  }

  // c[n] += weights b for weights of tokens x 64 tokens in the layout of sums (of(registers)[n]),
  // split, and b of 64 tokens x 128.
  template <bool kLowB, class Of, class C>
  KALMANET_KERNEL void apply(Of&& of, Parts b, C&& c) {
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      group.each([&](int, R& r) { split_weights(of(r), k, r.a); });
      add_step<1, true, kLowB>(
          true, has_low(b),
          [&](int thread, int pair, int part, uint32_t (&v)[4]) {
            const int column = column_half(thread) + pair * 16;
            load_blocks<128, true, true>(
                (part == 0 ? b.high : b.low) + Blocks<128>::block(k * 16, column), thread % 32, v);
          },
          [&c](R& r, int, int n) -> float (&)[4] { return c(r)[n]; });
    }
  }

  // c[m][n] += a^T b for a and b of 64 tokens x 128.
  template <bool kLowA, bool kLowB, class C>
  KALMANET_KERNEL void add_outer(Parts a, Parts b, C&& c) {
    KALMANET_UNROLL_TWO
    for (int k = 0; k < 4; ++k) {
      group.each([&](int thread, R& r) {
        KALMANET_UNROLL
        for (int m = 0; m < 2; ++m) {
          const int at = Blocks<128>::block(k * 16, thread / 32 % 4 * 32 + m * 16);
          load_blocks<128, false, true>(a.high + at, thread % 32, r.a[0][m]);
          if (kLowA && has_low(a)) {
            load_blocks<128, false, true>(a.low + at, thread % 32, r.a[1][m]);
          }
        }
      });
      add_step<2, kLowA, kLowB>(
          has_low(a), has_low(b),
          [&](int thread, int pair, int part, uint32_t (&v)[4]) {
            const int column = column_half(thread) + pair * 16;
            load_blocks<128, true, true>(
                (part == 0 ? b.high : b.low) + Blocks<128>::block(k * 16, column), thread % 32, v);
          },
          [&c](R& r, int m, int n) -> float (&)[4] { return c(r)[m][n]; });
    }
  }

  template <class Of>
  KALMANET_KERNEL void clear(Of&& of) {
    group.each([&](int, R& r) {
      KALMANET_UNROLL
      for (int n = 0; n < 8; ++n) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) of(r)[n][i] = 0.0f;
      }
    });
  }

  // to <- in each row of an array of tokens x 64 tokens (from) the sums of what is after an element
  // (kAfter) or before it, the element itself included: a product with ones on and beside the
  // diagonal. Every element counts with a relative error of 2^-17.
  template <bool kAfter, class From, class To>
  KALMANET_KERNEL void sum_along(From&& from, To&& to) {
    clear(to);
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      group.each([&](int, R& r) { split_weights(from(r), k, r.a); });
      KALMANET_UNROLL
      for (int n = 0; n < 8; ++n) {
        if (kAfter ? n * 8 > k * 16 + 15 : n * 8 + 7 < k * 16) continue;
        const bool all = kAfter ? k * 16 >= n * 8 + 7 : k * 16 + 15 <= n * 8;
        group.each([&](int thread, R& r) {
          const int column = n * 8 + thread % 32 / 4;
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int row = k * 16 + i * 8 + thread % 4 * 2;
            const bool first = kAfter ? row >= column : row <= column;
            const bool second = kAfter ? row + 1 >= column : row + 1 <= column;
            r.b[0][0][i] = all ? 0x3f803f80u : (first ? 0x3f80u : 0u) | (second ? 0x3f800000u : 0u);
          }
        });
        KALMANET_UNROLL
        for (int part = 1; part >= 0; --part) {
          group.multiply_add([&to, n](R& r) -> float (&)[4] { return to(r)[n]; },
                             [part](R& r) -> uint32_t (&)[4] { return r.a[part][0]; },
                             [](R& r) -> uint32_t (&)[2] { return r.b[0][0]; });
        }
      }
    }
  }

  // Sums of tokens x tokens, columns 16 k .. , as a left factor.
  static KALMANET_KERNEL void split_weights(const float (&sums)[8][4], int k,
                                            uint32_t (&a)[2][2][4]) {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&v)[4] = sums[2 * k + i / 2];
      const float first = v[i % 2 * 2], second = v[i % 2 * 2 + 1];
      a[0][0][i] = pack_bfloat16(first, second);
      a[1][0][i] = low_bfloat16_parts(first, second, a[0][0][i]);
    }
  }
};

}  // namespace kalmanet::cuda
