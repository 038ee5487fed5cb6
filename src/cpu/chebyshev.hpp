// The Chebyshev iteration for all tokens of a chunk together (docs/math.md):
//
//   step = 2 / (2 lambda + f)     rho2 = (f / (2 lambda + f) / 2)^2
//   x_prev = 0, x = step q, w = 2;   r times:  w = 1 / (1 - rho2 w)
//     x, x_prev = x + (w - 1) (x - x_prev) - step w ((H_t + lambda_t) x - q), x
//
// (the published form with w x - (w - 1) x_prev written as x + (w - 1) (x - x_prev): the difference
// is small once x converges, so less is lost to rounding). H_t x is never formed from H_t:
//   H_t y = e^{G_t} H_0 y + sum_{j <= t} M_tj k_j (k_j . y)
//
// Everything is generic over the vector type, and so over the precision of x: that of the chunk's
// storage, or float64 (a vector type's Wide) with the same float32 inputs.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

// epilogue(at, lane, register of H_t y_t) for every register of lanes [Kp][t].
template <class Vec, class S, class Epilogue>
KALMANET_INLINE void apply_h(const Chunk<S>& c, const S* h, bool h_is_zero,
                             const typename Vec::Elem* y, Epilogue&& epilogue) {
  using T = Tile<Vec>;
  alignas(64) typename Vec::Elem s[kLanes * kLanes];  // [j][t]: M_tj (k_j . y_t)
  gained_product<Vec>(c.k_lanes, c.K, y, c.h_decay->lanes, s);
  for (int64_t n = 0; n < c.Kp; n += T::kRows) {
    T tile;
    tile.clear();
    if (!h_is_zero) {
      tile.accumulate(h + n, c.Kp, c.K, y);
      tile.scale_lanes(c.h_decay->since_start);
    }
    tile.accumulate(c.k_rows + n, c.Kp, c.n, s);
    tile.each([&](int64_t offset, int lane, typename Vec::Reg acc) {
      epilogue(n * kLanes + offset, lane, acc);
    });
  }
}

// Solves (H_t + lambda_t I) x_t = b_t for every token of the chunk. b, x, other: [Kp][t], b in
// the chunk's storage or in x's precision; returns which of x and other holds the solution.
template <class Vec, class S, class B>
typename Vec::Elem* chebyshev(const Chunk<S>& c, const std::type_identity_t<S>* h, bool h_is_zero,
                              const B* b, int num_iter, typename Vec::Elem* x,
                              typename Vec::Elem* other) {
  using Reg = typename Vec::Reg;
  using Elem = typename Vec::Elem;
  alignas(64) Elem momentum[kLanes], gain[kLanes], lambda[kLanes];
  double w[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) {
    w[t] = 2.0;
    gain[t] = static_cast<Elem>(c.step[t]);
    lambda[t] = static_cast<Elem>(c.lambda[t]);
  }
  for (int64_t i = 0; i < c.Kp; ++i) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
      const int64_t at = i * kLanes + lane;
      Vec::store(x + at, Vec::mul(Vec::load(gain + lane), load_as<Vec>(b + at)));
      Vec::store(other + at, Vec::zero());
    }
  }
  for (int iteration = 0; iteration < num_iter; ++iteration) {
    for (int64_t t = 0; t < kLanes; ++t) {
      w[t] = 1.0 / (1.0 - c.rho2[t] * w[t]);
      momentum[t] = static_cast<Elem>(w[t] - 1.0);
      gain[t] = static_cast<Elem>(c.step[t] * w[t]);
    }
    apply_h<Vec>(c, h, h_is_zero, x, [&](int64_t at, int lane, Reg hx) {
      const Reg xt = Vec::load(x + at);
      const Reg residual =
          Vec::sub(Vec::fma(Vec::load(lambda + lane), xt, hx), load_as<Vec>(b + at));
      const Reg change = Vec::sub(xt, Vec::load(other + at));
      const Reg moved = Vec::fma(Vec::load(momentum + lane), change, xt);
      Vec::store(other + at, Vec::fnma(Vec::load(gain + lane), residual, moved));
    });
    Elem* next = other;
    other = x;
    x = next;
  }
  return x;
}

// chebyshev_num_iter; 2^20 where the steps are beyond counting.
template <class Vec>
int counted_chebyshev_steps(double ridge, double tolerance) {
  return ridge > 1e-10 ? chebyshev_num_iter(ridge, tolerance) : 1 << 20;
}

// |(H_t + lambda_t I) x_t - b_t| / |b_t| a token; 0 where b_t or f_t is 0.
template <class Vec, class S>
void relative_residual(const Chunk<S>& c, const S* h, bool h_is_zero, const S* b, const S* x,
                       double* out) {
  using Wide = typename Vec::Wide;
  using Reg = typename Wide::Reg;
  // In float64: the residual of a good solution is the small difference of large numbers.
  double r2[kLanes] = {}, b2[kLanes];
  alignas(64) double r[Wide::kWidth], lambda[kLanes];
  alignas(64) double wide_x[kMaxHeadDim * kLanes];
  for (int64_t i = 0; i < c.Kp * kLanes; ++i) wide_x[i] = x[i];
  for (int64_t t = 0; t < kLanes; ++t) lambda[t] = c.lambda[t];
  apply_h<Wide>(c, h, h_is_zero, wide_x, [&](int64_t at, int lane, Reg hx) {
    Wide::store(r, Wide::sub(Wide::fma(Wide::load(lambda + lane), Wide::load(wide_x + at), hx),
                             load_as<Wide>(b + at)));
    for (int i = 0; i < Wide::kWidth; ++i) r2[lane + i] += r[i] * r[i];
  });
  lanes_dot<Vec>(b, b, c.K, b2);
  for (int64_t t = 0; t < kLanes; ++t) {
    out[t] = c.norm[t] == 0.0 || b2[t] == 0.0 ? 0.0 : std::sqrt(r2[t] / b2[t]);
  }
}

}  // namespace kalmanet::cpu
