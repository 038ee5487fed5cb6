// The backward's direct solver: a chunk's shifts and mu, and the factors that go with them.
#pragma once

#include "cuda/backward_direct_tokens.hpp"
#include "cuda/chunk_body.hpp"

namespace kalmanet::cuda::direct32 {

// Truncation relative to x's own components, which U does not magnify: below this, bfloat16's
// rounding of o (2^-9) hides it.
inline constexpr double kFinestTolerance = 0x1p-12, kFinestFloat16Tolerance = 0x1p-13;

// Products for a relative error `tolerance` where shifts lie within a factor `ratio` of mu.
KALMANET_KERNEL int direct_products(float ratio, float tolerance) {
  const float root = sqrtf(ratio);
  const float r = (root - 1.0f) / (root + 1.0f);
  if (!(r > 0.0f)) return 1;
  const float steps = ceilf(logf(0.5f * tolerance) / logf(r));
  return steps < 1.0f ? 1 : (steps < 1e6f ? static_cast<int>(steps) : 1000000);
}

// The order in which n nodes are taken, [n][k], so that neither the first factors' product nor the
// last ones' is ever large: 0 .. 31 with their bits reversed, those below n.
struct NodeOrder {
  uint8_t at[DirectLayout::kMostSteps + 1][DirectLayout::kMostSteps];
  constexpr NodeOrder() : at() {
    for (int n = 1; n <= DirectLayout::kMostSteps; ++n) {
      int k = 0;
      for (int c = 0; c < 32; ++c) {
        const int node = (c & 1) << 4 | (c & 2) << 2 | (c & 4) | (c & 8) >> 2 | (c & 16) >> 4;
        if (node < n) at[n][k++] = static_cast<uint8_t>(node);
      }
    }
  }
};
KALMANET_CONSTANT NodeOrder kNodeOrder;

template <class Group>
struct DirectFactor : DirectState<Group> {
  using Base = DirectState<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n, Base::k_power, Base::v_power, Base::q_power;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  // Tokens that are computed elsewhere (token_body.hpp, first tokens).
  KALMANET_KERNEL bool exact(int t) const {
    return piece.first && job.h0.data == nullptr && t0 + t < piece.begin + kExactTokens;
  }

  // The first warp: f_t, the shifts, mu and all that follows a token. scale: what measure_keys
  // multiplied H_0 by.
  KALMANET_KERNEL void plan_chunk(float scale) {
    group.with_warp(0, [&] {
      const double start_norm2 = this->squares_of_state(false);
      const float k2 = 1.0f / (k_power * k_power);
      group.each([&](int t, Registers& r) {
        const float u = shared.weight[t] * k2;
        float gram = 0, product = 0;
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) gram += shared.gram[i][t];
        KALMANET_UNROLL
        for (int w = 0; w < 8; ++w) product += shared.dots[0][w][t];
        const float own = u * shared.norm2[t];
        r.scan[0] = static_cast<double>(2.0f * u * (product / scale + gram * k2) - own * own);
      });
      this->scan(0);
      group.each([&](int t, Registers& r) {
        // f_t e^{-G_t}
        const float root = sqrtf(static_cast<float>(start_norm2 + r.scan[0]));
        const bool zero = t >= n || root * shared.start[0][t] <= static_cast<float>(kVanishedNorm);
        const float shift = zero ? 0.0f : shared.ridge[t] * root;
        if (!(shift >= 0.0f)) shared.ill = 1;
        r.dot[1] = shift;
        const bool counts = shift > 0.0f && !exact(t);
        r.extreme[0] = counts ? shift : -INFINITY;
        r.extreme[1] = counts ? -shift : -INFINITY;
        r.dot[0] = zero ? 0.0f : root;
      });
      group.max_warp([](Registers& r) -> float& { return r.extreme[0]; });
      group.max_warp([](Registers& r) -> float& { return r.extreme[1]; });
      group.max_warp([](Registers& r) -> float& { return r.dot[0]; });
      group.each([&](int t, Registers& r) {
        const float high = r.extreme[0], low = -r.extreme[1];
        const bool none = !(high > 0.0f);
        const float mu = none ? 1.0f : sqrtf(high) * sqrtf(low);
        const double finest = is_float16<Group>(job.q) ? kFinestFloat16Tolerance : kFinestTolerance;
        const float tolerance = static_cast<float>(job.tolerance > finest ? job.tolerance : finest);
        const int steps = none ? 0 : direct_products(sqrtf(high / low), tolerance);
        const float shift = r.dot[1];
        const float x_scale = shift == 0.0f ? 0.0f : 1.0f / (mu * shared.start[0][t]);
        shared.delta[t] = shift == 0.0f ? 0.0f : shift / mu - 1.0f;
        shared.solution_scale[t] = x_scale;
        shared.key_scale[t] = sqrtf(shared.weight[t] / mu) / k_power;
        const float alpha = shared.alpha[t];
        const float most = fmaxf(fabsf(1.0f - alpha), fabsf(alpha) * x_scale);
        int exponent = 0;
        if (most > 0.0f && most < INFINITY) frexpf(most, &exponent);
        exponent = exponent < -100 ? -100 : (exponent > 100 ? 100 : exponent);
        shared.query_scale[t] = ldexpf(1.0f, -exponent);
        shared.output_scale[t] = ldexpf(static_cast<float>(job.scale) / q_power, exponent);
        if (t != 0) return;
        shared.mu = mu;
        shared.steps = steps;
        if (steps > L::kMostSteps) shared.ill = 1;
        if (!none && !(r.dot[0] <= kLargestEntry * mu)) shared.ill = 1;
      });
    });
  }

  // P, Y, R and the gains Z.
  KALMANET_KERNEL void factor() {
    const float inverse_mu = 1.0f / shared.mu;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const bool diagonal = this->state_row(thread, i) == this->state_column(thread, tile, i);
          r.h[tile][i] = r.h[tile][i] * inverse_mu +
                         (diagonal ? diagonal_one<Group>(job, this->state_row(thread, i)) : 0.0f);
        }
      }
      for (int k = thread / 32; k < shared.steps; k += 8) {
        const int t = thread % 32;
        const float centre = 1.0f + 0.5f * shared.delta[t], half = 0.5f * fabsf(shared.delta[t]);
        const int node = kNodeOrder.at[shared.steps][k];
        const float angle =
            3.14159265f * (static_cast<float>(node) + 0.5f) / static_cast<float>(shared.steps);
        shared.gain[k][t] = divide(1.0f, centre + half * cosine(angle));
      }
    });
    this->invert(num_pivots<Group>(job));
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {
        Left low;
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&v)[4] = r.h[2 * k + i / 2];
          r.p[k][i] = split_float16(-kInverseScale * v[i % 2 * 2],
                                    -kInverseScale * v[i % 2 * 2 + 1], low.part[i]);
        }
        shared.low[(thread / 32 * 8 + k) * 32 + thread % 32] = low;
      }
    });
    this->template multiply_inverse<true>(shared.keys);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.y[tile][i] *=
              shared.key_scale[this->token_of(thread, tile, i)] * (1.0f / kInverseScale);
        }
      }
    });
    put_gains();
    group.barrier();
    this->template multiply_tokens<false, true>(shared.keys, nullptr, shared.gains[0],
                                                shared.gains[1]);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = this->tile_row(thread, i);
        r.g[0][i] *= shared.key_scale[row];
        if (row == this->tile_column(thread, i)) r.g[0][i] += 1.0f;
      }
      store4(shared.tile[thread], r.g[0]);
    });
    group.barrier();
    group.with_warp(0, [&] {
      park();
      this->invert_factor();
      unpark();
    });
    group.barrier();
    this->clear_y();
    this->template add_middle<true>(TakeZ());
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.y[tile][i] *= kGainScale;
      }
    });
    put_gains();
  }

  // What the first warp holds of P and Y, aside: the factor's elimination needs the registers.
  KALMANET_KERNEL void park() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) store16(shared.right[k * 32 + thread].part, r.p[k]);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i)
        store16(shared.right[(8 + i) * 32 + thread].part, r.z[i / 2][i % 2]);
    });
  }
  KALMANET_KERNEL void unpark() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) load16(shared.right[k * 32 + thread].part, r.p[k]);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i)
        load16(shared.right[(8 + i) * 32 + thread].part, r.z[i / 2][i % 2]);
    });
  }

  // y, which is Y or Z, as left factor in registers and transposed in shared memory.
  KALMANET_KERNEL void put_gains() {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int k = 0; k < 2; ++k) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&v)[4] = r.y[2 * k + i / 2];
          r.z[0][k][i] = split_float16(v[i % 2 * 2], v[i % 2 * 2 + 1], r.z[1][k][i]);
        }
      }
    });
    this->put_right(shared.gains[0], shared.gains[1],
                    [](Registers& r) -> float (&)[4][4] { return r.y; });
  }
  struct TakeZ {
    KALMANET_KERNEL void operator()(Registers& r, int, int k) const {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.a[0][i] = r.z[0][k][i], r.a[1][i] = r.z[1][k][i];
    }
  };
};

}  // namespace kalmanet::cuda::direct32
