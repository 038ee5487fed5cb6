// Gradients of the log decays without cancellation.
//
// dgk_t = e^{gk_t} <D_t, H_{t-1}> is the sum of all interactions that cross the decay at t: of what
// tokens j < t (and the chunk's starting state) put into the state with what tokens i >= t (and the
// gradient carried from later chunks) take out of it. With A_ij the interaction of source j and
// sink i, each already carrying its decay e^{G_i - G_j} <= 1,
//
//   dgk_t = sum_{i >= t, carry} sum_{j < t, start} A_ij
//
// which is exact in relative terms even where a strong decay makes it tiny; running sums of
// k.dk - x.dx (the usual way) lose it in their rounding.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

// Row i: sink at token i, row kLanes: the carry. Column j: source at token j, column kLanes: the
// start. Entries with j > i are never read.
template <class Vec>
struct Interactions {
  double a[kLanes + 1][kLanes + 1];

  // Writes the gradient of each of the n tokens' log decay to out[t].
  void crossing_sums(int64_t n, double* out) const {
    // before[i] = sum of row i over the sources before token t, grown as t moves on.
    double before[kLanes + 1];
    for (int64_t i = 0; i <= kLanes; ++i) before[i] = a[i][kLanes];
    for (int64_t t = 0; t < n; ++t) {
      double sum = before[kLanes];
      for (int64_t i = t; i < n; ++i) sum += before[i];
      out[t] = sum;
      for (int64_t i = t + 1; i < n; ++i) before[i] += a[i][t];
      before[kLanes] += a[kLanes][t];
    }
  }
};

}  // namespace kalmanet::cpu
