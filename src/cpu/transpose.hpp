// From rows (token by token) to lanes (one token a lane) and back: 16 x 16 blocks are transposed in
// registers, so that a layout costs about as much as reading and writing it once.
//
// A matrix of W x W (W the vector type's width) is transposed by log2 W rounds of interleaving its
// upper half of rows with its lower half: a round moves the top bit of the row number to the bottom
// of the column number, as a perfect shuffle of the whole matrix does.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/rows.hpp"

namespace kalmanet::cpu {

template <class Vec>
KALMANET_INLINE void transpose(typename Vec::Reg (&r)[Vec::kWidth]) {
  constexpr int W = Vec::kWidth;
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    typename Vec::Reg next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = Vec::interleave_low(r[i], r[i + W / 2]);
      next[2 * i + 1] = Vec::interleave_high(r[i], r[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = next[i];
  }
}

// A kLanes x kLanes block: load(row, column) gives the register of elements (row, column ..
// column + W), store(column, row, register) takes that of the transpose.
template <class Vec, class Load, class Store>
KALMANET_INLINE void transpose_block(Load&& load, Store&& store) {
  constexpr int W = Vec::kWidth;
  for (int row = 0; row < kLanes; row += W) {
    for (int column = 0; column < kLanes; column += W) {
      typename Vec::Reg r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = load(row + i, column);
      transpose<Vec>(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(column + i, row, r[i]);
    }
  }
}

// lanes[c][t] = rows[t][c] for kLanes tokens, c < cols (a multiple of kLanes).
template <class Vec>
void rows_to_lanes(const typename Vec::Elem* rows, int64_t cols, typename Vec::Elem* lanes) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    transpose_block<Vec>(
        [&](int t, int at) { return Vec::load(rows + t * cols + c + at); },
        [&](int at, int t, typename Vec::Reg a) { Vec::store(lanes + (c + at) * kLanes + t, a); });
  }
}

// rows[t][c] = lanes[c][t] likewise.
template <class Vec>
void lanes_to_rows(const typename Vec::Elem* lanes, int64_t cols, typename Vec::Elem* rows) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    transpose_block<Vec>(
        [&](int at, int t) { return Vec::load(lanes + (c + at) * kLanes + t); },
        [&](int t, int at, typename Vec::Reg a) { Vec::store(rows + t * cols + c + at, a); });
  }
}

// The first `n` of a register's elements from p, the rest zeros; n <= 0: none.
template <class Vec>
KALMANET_INLINE typename Vec::Reg load_up_to(const typename Vec::Elem* p, int64_t n) {
  return n >= Vec::kWidth ? Vec::load(p) : n > 0 ? Vec::load_n(p, n) : Vec::zero();
}
template <class Vec>
KALMANET_INLINE void store_up_to(typename Vec::Elem* p, typename Vec::Reg a, int64_t n) {
  if (n >= Vec::kWidth) {
    Vec::store(p, a);
  } else if (n > 0) {
    Vec::store_n(p, a, n);
  }
}

// Where tokens [t0, t0 + n) of a head lie as adjacent numbers of the storage type: in the caller's
// memory where they do, else copied into `room` [kLanes][kMaxHeadDim].
template <class Vec>
struct AdjacentRows {
  using S = typename Vec::Elem;
  const S* row[kLanes];
  alignas(64) S room[kLanes * kMaxHeadDim];

  void load(const Rows& src, int64_t t0, int64_t n, int64_t width) {
    for (int64_t t = 0; t < n; ++t) {
      S* const own = room + t * kMaxHeadDim;
      const RowOf<S> p = read_row<Vec>(src, t0 + t, width, own);
      row[t] = p.data;
      if (p.stride == 1) continue;
      for (int64_t c = 0; c < width; ++c) own[c] = p.data[c * p.stride];
      row[t] = own;
    }
  }
};

// Lanes from tokens [t0, t0 + n) of a head: lanes[c][t] = src(t0 + t, c), zeros elsewhere.
template <class Vec>
void load_lanes(const Rows& src, int64_t t0, int64_t n, int64_t width, typename Vec::Elem* lanes) {
  AdjacentRows<Vec> from;
  from.load(src, t0, n, width);
  for (int64_t c = 0; c < width; c += kLanes) {
    transpose_block<Vec>(
        [&](int t, int at) {
          return t < n ? load_up_to<Vec>(from.row[t] + c + at, width - c - at) : Vec::zero();
        },
        [&](int at, int t, typename Vec::Reg a) { Vec::store(lanes + (c + at) * kLanes + t, a); });
  }
}

// Rows of keys or values, times beta: rows[t][c], zeros from token n and from column `width` on.
template <class Vec>
void load_rows(const Rows& src, const Column& beta, int64_t t0, int64_t n, int64_t width,
               typename Vec::Elem* rows) {
  using S = typename Vec::Elem;
  AdjacentRows<Vec> from;
  from.load(src, t0, n, width);
  const int64_t cols = padded(width);
  for (int64_t t = 0; t < n; ++t) {
    const auto b = Vec::set1(value_at<S>(beta, t0 + t, 1));
    for (int64_t c = 0; c < cols; c += Vec::kWidth) {
      const auto a = load_up_to<Vec>(from.row[t] + c, width - c);
      Vec::store(rows + t * cols + c, Vec::mul(b, a));
    }
  }
  for (int64_t i = n * cols; i < kLanes * cols; ++i) rows[i] = 0;
}

// dst(t0 + t, c) = gain[t] * lanes[c][t] (added if dst.accumulate); no gain: 1.
template <class Vec>
void store_lanes(const typename Vec::Elem* lanes, const typename Vec::Elem* gain,
                 const OutRows& dst, int64_t t0, int64_t n, int64_t width) {
  using S = typename Vec::Elem;
  using Reg = typename Vec::Reg;
  const bool in_place = holds<S>(dst) && dst.stride == 1;
  alignas(64) S room[kLanes * kMaxHeadDim];
  for (int64_t c = 0; c < width; c += kLanes) {
    transpose_block<Vec>([&](int at, int t) { return Vec::load(lanes + (c + at) * kLanes + t); },
                         [&](int t, int at, Reg a) {
                           if (t >= n) return;
                           if (gain != nullptr) a = Vec::mul(Vec::set1(gain[t]), a);
                           if (!in_place) {
                             Vec::store(room + t * kMaxHeadDim + c + at, a);
                             return;
                           }
                           S* const to = row_of<S>(dst, t0 + t) + c + at;
                           const int64_t count = width - c - at;
                           if (dst.accumulate) a = Vec::add(load_up_to<Vec>(to, count), a);
                           store_up_to<Vec>(to, a, count);
                         });
  }
  if (in_place) return;
  for (int64_t t = 0; t < n; ++t) {
    const S* const from = room + t * kMaxHeadDim;
    if (!holds<S>(dst)) {
      write_row<Vec>(dst, t0 + t, width, from);
      continue;
    }
    S* const to = row_of<S>(dst, t0 + t);
    for (int64_t c = 0; c < width; ++c) {
      to[c * dst.stride] = dst.accumulate ? to[c * dst.stride] + from[c] : from[c];
    }
  }
}

}  // namespace kalmanet::cpu
