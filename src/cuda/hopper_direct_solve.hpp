// The direct solver on Hopper: x = N p(N) q of a warpgroup's 64 tokens, and m = q + alpha (x - q).
// Nothing leaves a warp's registers.
#pragma once

#include "cuda/hopper_direct_factor.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperSolve : HopperFactor<Group> {
  using Base = HopperFactor<Group>;
  using Base::group, Base::shared, Base::sums, Base::token_sums;
  using Registers = HopperRegisters;

  static KALMANET_KERNEL uint32_t* iterate(Registers& r) { return r.w; }

  // m's parts into w and low; |x|^2 into x2. Q is in q.
  KALMANET_KERNEL void solve() {
    const int steps = shared.steps;
    if (steps > 0) {
      group.each([&](int thread, Registers& r) {
        uint32_t a[2];
        take_coefficients(thread, steps - 1, a);
        KALMANET_UNROLL
        for (int j = 0; j < 32; ++j) r.w[j] = multiply_halves(r.q[j], a[j % 2]);
      });
      KALMANET_LOOP
      for (int k = steps - 2; k >= 0; --k) step(k);
      finish();
    } else {
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int e = 0; e < 64; ++e) r.y[e] = 0;
      });
    }
    put_solution();
  }

  // Of polynomial term k, of the lane's two rows, twice each.
  KALMANET_KERNEL void take_coefficients(int thread, int k, uint32_t (&to)[2]) {
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = shared.coefficient[k][sum_row(thread, i)];
      to[i] = a | a << 16;
    }
  }

  // f <- -mask(s) as left factor.
  template <bool kSplit>
  KALMANET_KERNEL void pack_tokens() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        float v[2];
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          v[c] = sum_column(thread, j) + c <= sum_row(thread, j) ? -r.s[2 * j + c] : 0.0f;
        }
        if (kSplit) {
          r.f[0][j] = split_scaled(v[0], v[1], r.f[1][j]);
        } else {
          r.f[0][j] = pack_float16(v[0], v[1]);
        }
      }
    });
  }

  // w <- (2 N - 2 nu_k) w + a_k q. P's products are under way while what Z needs is packed.
  KALMANET_KERNEL void step(int k) {
    begin_products(group);
    this->multiply_transposed(shared.gains[0], iterate, false);
    commit_products(group);
    this->multiply_inverse(0, iterate, false);
    commit_products(group);
    wait_products<1>(group);
    settle<32>(group, token_sums);
    pack_tokens<false>();
    begin_products(group);
    this->multiply_by_gains(0, [](Registers& r) -> uint32_t* { return r.f[0]; }, true);
    this->finish_sums();
    group.each([&](int thread, Registers& r) {
      uint32_t a[2];
      take_coefficients(thread, k, a);
      const uint32_t node = pack_float16(shared.node[k], shared.node[k]);
      KALMANET_UNROLL
      for (int j = 0; j < 32; ++j) {
        uint32_t sum = pack_float16(r.y[2 * j], r.y[2 * j + 1]);
        sum = multiply_add_halves(r.w[j], node, sum);
        r.w[j] = multiply_add_halves(r.q[j], a[j % 2], sum);
      }
    });
  }

  // y <- 2 N w, all factors split.
  KALMANET_KERNEL void finish() {
    const auto high = [](Registers& r) -> uint32_t* { return r.f[0]; };
    const auto low = [](Registers& r) -> uint32_t* { return r.f[1]; };
    begin_products(group);
    this->multiply_transposed(shared.gains[1], iterate, false);
    this->finish_token_sums();
    group.each([](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) r.s[e] *= 1.0f / kLowScale;
    });
    begin_products(group);
    this->multiply_transposed(shared.gains[0], iterate, true);
    commit_products(group);
    this->multiply_inverse(1, iterate, false);
    commit_products(group);
    wait_products<1>(group);
    settle<32>(group, token_sums);
    pack_tokens<true>();
    begin_products(group);
    this->multiply_by_gains(0, low, true);
    this->multiply_by_gains(1, high, true);
    this->finish_sums();
    this->scale_sums(1.0f / kLowScale);
    begin_products(group);
    this->multiply_inverse(0, iterate, true);
    this->multiply_by_gains(0, high, true);
    this->finish_sums();
  }

  // m from x = y / 2; |x|^2.
  KALMANET_KERNEL void put_solution() {
    group.each([&](int thread, Registers& r) {
      float x_scale[2], alpha[2], scale[2];
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int t = sum_row(thread, half);
        x_scale[half] = shared.solution_scale[t] * (1.0f / kInverseScale);
        alpha[half] = shared.alpha[t], scale[half] = shared.query_scale[t];
        r.x2[half] = 0;
      }
      KALMANET_UNROLL
      for (int j = 0; j < 32; ++j) {
        const float q[2] = {low_float16(r.q[j]), high_float16(r.q[j])};
        float m[2];
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          const float x = x_scale[j % 2] * r.y[2 * j + c];
          r.x2[j % 2] += x * x;
          m[c] = scale[j % 2] * (q[c] + alpha[j % 2] * (x - q[c]));
        }
        r.w[j] = split_float16(m[0], m[1], r.low[j]);
      }
    });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.x2[0]; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.x2[1]; });
  }
};

}  // namespace kalmanet::cuda
