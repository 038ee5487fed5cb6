// The direct solver on Hopper: x = N p(N) q of 64 tokens, and m = q + alpha (x - q). The iterate
// lies in shared memory; each warpgroup makes half of the next one's dims.
#pragma once

#include "cuda/hopper_direct_factor.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperSolve : HopperFactor<Group> {
  using Base = HopperFactor<Group>;
  using Base::group, Base::shared, Base::sums, Base::token_sums;
  using Registers = HopperRegisters;

  // y <- 2 mu x in the units of q, which is in q; the iterate takes K's place.
  KALMANET_KERNEL void solve() {
    const int steps = shared.steps;
    group.each([&](int thread, Registers& r) {
      uint32_t a[2];
      take_coefficients(thread, steps - 1, a);
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        Base::half_word(shared.iterate, thread, j) = multiply_halves(r.q[j], a[j % 2]);
      }
    });
    publish(group);
    group.barrier();
    KALMANET_LOOP
    for (int k = steps - 2; k >= 0; --k) step(k);
    finish();
  }

  // Of polynomial term k, of the lane's two rows, twice each.
  KALMANET_KERNEL void take_coefficients(int thread, int k, uint32_t (&to)[2]) {
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = shared.coefficient[k][Base::token_of(thread, i)];
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
          v[c] = sum_column(thread, j) + c <= Base::token_of(thread, j) ? -r.s[2 * j + c] : 0.0f;
        }
        if (kSplit) {
          r.f[0][j] = split_scaled(v[0], v[1], r.f[1][j]);
        } else {
          r.f[0][j] = pack_float16(v[0], v[1]);
        }
      }
    });
  }

  // iterate <- (2 N - 2 nu_k) iterate + a_k q. P's products are under way while what Z needs is
  // packed.
  KALMANET_KERNEL void step(int k) {
    begin_products(group);
    this->multiply_transposed(shared.iterate, shared.gains[0], false);
    commit_products(group);
    this->multiply_inverse(shared.iterate, 0, false);
    commit_products(group);
    wait_products<1>(group);
    settle<32>(group, token_sums);
    pack_tokens<false>();
    begin_products(group);
    this->multiply_by_gains(0, 0, true);
    this->finish_sums();
    group.barrier();  // (the other warpgroup may still multiply the last iterate)
    group.each([&](int thread, Registers& r) {
      uint32_t a[2];
      take_coefficients(thread, k, a);
      const uint32_t node = pack_float16(shared.node[k], shared.node[k]);
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        uint32_t& w = Base::half_word(shared.iterate, thread, j);
        uint32_t sum = pack_float16(r.y[2 * j], r.y[2 * j + 1]);
        sum = multiply_add_halves(w, node, sum);
        w = multiply_add_halves(r.q[j], a[j % 2], sum);
      }
    });
    publish(group);
    group.barrier();
  }

  // y <- 2 N iterate, all factors split.
  KALMANET_KERNEL void finish() {
    begin_products(group);
    this->multiply_transposed(shared.iterate, shared.gains[1], false);
    this->finish_token_sums();
    this->scale_token_sums(1.0f / kLowScale);
    begin_products(group);
    this->multiply_transposed(shared.iterate, shared.gains[0], true);
    commit_products(group);
    this->multiply_inverse(shared.iterate, 1, false);
    commit_products(group);
    wait_products<1>(group);
    settle<32>(group, token_sums);
    pack_tokens<true>();
    begin_products(group);
    this->multiply_by_gains(1, 0, true);
    this->multiply_by_gains(0, 1, true);
    this->finish_sums();
    this->scale_sums(1.0f / kLowScale);
    begin_products(group);
    this->multiply_inverse(shared.iterate, 0, true);
    this->multiply_by_gains(0, 0, true);
    this->finish_sums();
  }

  // m from x = y / 2, high and low parts in the gains' place; |x|^2.
  KALMANET_KERNEL void put_solution() {
    group.each([&](int thread, Registers& r) {
      float x_scale[2], alpha[2], scale[2];
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int t = Base::token_of(thread, half);
        x_scale[half] = shared.solution_scale[t] * (1.0f / kInverseScale);
        alpha[half] = shared.alpha[t], scale[half] = shared.query_scale[t];
        r.dot[half] = 0;
      }
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        const float q[2] = {low_float16(r.q[j]), high_float16(r.q[j])};
        float m[2];
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          const float x = x_scale[j % 2] * r.y[2 * j + c];
          r.dot[j % 2] += x * x;
          m[c] = scale[j % 2] * (q[c] + alpha[j % 2] * (x - q[c]));
        }
        uint32_t low;
        Base::half_word(shared.gains[0], thread, j) = split_float16(m[0], m[1], low);
        Base::half_word(shared.gains[1], thread, j) = low;
      }
    });
    this->share_dots([&](int thread, int t, float dot) { shared.x2[thread / 128][t] = dot; });
  }
};

}  // namespace kalmanet::cuda
