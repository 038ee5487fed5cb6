// What directly solving kernels plan for a chunk: shifts, mu, and the polynomial that takes in a
// token's own shift (direct_kernel.hpp).
#pragma once

#include "cuda/chunk_body.hpp"
#include "cuda/direct_rows.hpp"

namespace kalmanet::cuda {

// Truncation relative to x's own components, which U does not magnify: below this, bfloat16's
// rounding of o (2^-9) hides it.
inline constexpr double kFinestTolerance = 0x1p-12;
// The same of float16 (2^-12), beside what its iterate in float16 errs by.
inline constexpr double kFinestFloat16Tolerance = 0x1p-13;

// Products for a relative error `tolerance` where shifts lie within a factor `ratio` of mu.
KALMANET_KERNEL int direct_products(float ratio, float tolerance) {
  const float square_root = root(ratio);
  const float r = divide(square_root - 1.0f, square_root + 1.0f);
  if (!(r > 0.0f)) return 1;
  const float steps = ceilf(divide(logarithm(0.5f * tolerance), logarithm(r)));
  return steps < 1.0f ? 1 : (steps < 1e6f ? static_cast<int>(steps) : 1000000);
}

// The order in which n nodes are taken, [n][k], so that no product of the first (nu - nu_k) is ever
// large: 0 .. 31 with their bits reversed, those below n. The first, by which Horner multiplies
// last, is that nearest to nu = 0: there, where H is large and U does magnify, it wipes out what
// rounding had left (beside the other end first: half the error at a memory of 20, a third at 3).
struct NodeOrder {
  uint8_t at[DirectLayout::kMostSteps + 1][DirectLayout::kMostSteps];
  constexpr NodeOrder() : at() {
    for (int n = 1; n <= DirectLayout::kMostSteps; ++n) {
      int k = 0;
      for (int c = 0; c < 32; ++c) {
        const int node = (c & 1) << 4 | (c & 2) << 2 | (c & 4) | (c & 8) >> 2 | (c & 16) >> 4;
        if (node < n) at[n][k++] = static_cast<uint8_t>(n - 1 - node);
      }
    }
  }
};
KALMANET_CONSTANT NodeOrder kNodeOrder;

template <class Group, class Below>
struct DirectPlan : Below {
  using Base = Below;
  using Base::group, Base::shared, Base::job, Base::piece, Base::t0, Base::n;
  using Registers = typename Base::Registers;

  // Tokens that are computed elsewhere (token_body.hpp, first tokens).
  KALMANET_KERNEL bool exact(int t) const {
    return piece.first && job.h0.data == nullptr && t0 + t < piece.begin + kExactTokens;
  }

  // The first warp, two tokens a lane: f_t, the shifts, mu and all that follows a token.
  // product(t): k_t^T H_0 k_t + sum_j u_j (k_t . k_j)^2, in units of the token's keys.
  template <class Product>
  KALMANET_KERNEL void plan_chunk(float start_norm2, Product&& product) {
    group.with_warp(0, [&] {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = 2 * thread + i;
          const float u = shared.weight[t] * shared.unit[0][t] * shared.unit[0][t];
          const float own = u * shared.measured.norm2[t];
          r.part[i] = 2.0f * u * product(t) - own * own;
        }
      });
      scan_parts(group);
      group.each([&](int thread, Registers& r) {
        r.extreme[0] = r.extreme[1] = -INFINITY;
        r.extreme[2] = 0;
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {  // f_t e^{-G_t}
          const int t = 2 * thread + i;
          const float norm = root(start_norm2 + r.part[i]);
          const bool zero =
              t >= n || norm * shared.start[0][t] <= static_cast<float>(kVanishedNorm);
          const float shift = zero ? 0.0f : shared.ridge[t] * norm;
          if (!(shift >= 0.0f)) shared.ill = 1;
          r.dot[i] = shift;
          const bool counts = shift > 0.0f && !exact(t);
          if (counts) r.extreme[0] = fmaxf(r.extreme[0], shift);
          if (counts) r.extreme[1] = fmaxf(r.extreme[1], -shift);
          if (!zero) r.extreme[2] = fmaxf(r.extreme[2], norm);
        }
      });
      KALMANET_UNROLL
      for (int e = 0; e < 3; ++e) {
        group.max_warp([e](Registers& r) -> float& { return r.extreme[e]; });
      }
      group.each([&](int thread, Registers& r) {
        const float high = r.extreme[0], low = -r.extreme[1];
        const bool none = !(high > 0.0f);
        const float mu = none ? 1.0f : root(high) * root(low);
        const double finest = is_float16<Group>(job.o) ? kFinestFloat16Tolerance : kFinestTolerance;
        const float tolerance = static_cast<float>(job.tolerance > finest ? job.tolerance : finest);
        const int steps = none ? 0 : direct_products(root(divide(high, low)), tolerance);
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = 2 * thread + i;
          shared.shift[t] = r.dot[i];
          shared.key_scale[t] = root(divide(shared.weight[t], mu)) * shared.unit[0][t];
        }
        if (thread != 0) return;
        shared.mu = mu;
        shared.steps = steps;
        if (steps > Base::L::kMostSteps) shared.ill = 1;
        if (!none && !(r.extreme[2] <= kLargestEntry * mu)) shared.ill = 1;
      });
    });
  }

  // What else follows a token, the polynomial's coefficients and nodes: by two warps from
  // first_warp (even) on, a token a thread, while another's pivot is under way.
  KALMANET_KERNEL void plan_tokens(int first_warp) {
    group.by_warp(first_warp, first_warp + 2, [&](int) {
      group.each([&](int thread, Registers&) {
        const int t = thread % 64;
        const float shift = shared.shift[t], mu = shared.mu, alpha = shared.alpha[t];
        const float x_scale = shift == 0.0f ? 0.0f : divide(1.0f, mu * shared.start[0][t]);
        const float most = fmaxf(fabsf(1.0f - alpha), fabsf(alpha) * x_scale);
        int exponent = static_cast<int>(bits_of(most) >> 23) - 126;
        if (!(most > 0.0f && most < INFINITY)) exponent = 0;
        exponent = exponent < -100 ? -100 : (exponent > 100 ? 100 : exponent);
        shared.solution_scale[t] = x_scale;
        shared.query_scale[t] = power_of_two(-exponent);
        shared.output_scale[t] = static_cast<float>(job.scale) * power_of_two(exponent);
        // (Of a token computed elsewhere the shift may be far from mu.)
        const float half = shift == 0.0f || exact(t) ? 0.0f : 0.5f * (divide(shift, mu) - 1.0f);
        const float angle = divide(3.14159265f, static_cast<float>(shared.steps));
        float a = 1.0f;
        KALMANET_LOOP
        for (int k = 0; k < shared.steps; ++k) {
          const float at = static_cast<float>(kNodeOrder.at[shared.steps][k]) + 0.5f;
          const float node = 1.0f + cosine(angle * at);  // 2 nu_k
          a *= divide(k == 0 ? 1.0f : -half, 1.0f + half * node);
          shared.coefficient[k][t] = static_cast<uint16_t>(pack_float16(a, a));
          if (t == 0) shared.node[k] = -node;
        }
      });
    });
  }
};

}  // namespace kalmanet::cuda
