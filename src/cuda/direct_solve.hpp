// The direct chunk kernel's solve: x = N p(N) q of 16 tokens a pair of warps, and m = q + alpha (x
// - q).
#pragma once

#include "cuda/direct_factor.hpp"

namespace kalmanet::cuda {

template <class Group>
struct DirectSolve : DirectFactor<Group> {
  using Base = DirectFactor<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  // Where the half of the dims of 16 tokens' iterate that warp w made lies, 4 quads; and m's high
  // parts.
  KALMANET_KERNEL Quad* part_of(int warp) { return shared.queries + warp % 4 * 8 + warp / 4 * 4; }

  // m's high parts into queries; its low parts stay in registers. Q is in queries.
  KALMANET_KERNEL void solve() {
    const int steps = shared.steps;
    load_iterate();
    group.each([](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 16; ++i) {
        r.q[i / 4][i % 4] = thread < 128 ? r.w[i / 4][i % 4] : r.w[i / 4 + 4][i % 4];
      }
    });
    if (steps > 0) {
      take_coefficients(steps - 1);
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 32; ++i) {
          r.w[i / 4][i % 4] = multiply_halves(r.w[i / 4][i % 4], r.coefficient[i % 2]);
        }
      });
      KALMANET_LOOP
      for (int k = steps - 2; k >= 0; --k) step(k);
      multiply_tokens<true>();
      pack_tokens<true>();
    }
    group.by_warp(0, 4, [&](int warp) { finish<0>(warp); });
    group.by_warp(4, 8, [&](int warp) { finish<1>(warp); });
    group.barrier_pairs();  // (the partner may still load the last iterate)
    put_solution();
  }
  KALMANET_KERNEL void load_iterate() {
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      group.template load_quad<false, true>(
          [k](Registers& r) { return r.w[k]; },
          [&](int thread) { return &shared.queries[thread / 32 % 4 * 8 + k]; });
    }
  }

  // Of polynomial term k, of the lane's two rows.
  KALMANET_KERNEL void take_coefficients(int k) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t a =
            shared.coefficient[k][thread / 32 % 4 * 16 + this->row_of(thread, 2 * i)];
        r.coefficient[i] = a | a << 16;
      }
    });
  }

  // y += w X for X's blocks kFirst .. of 16 tokens (columns) each.
  template <int kFirst>
  KALMANET_KERNEL void add_tokens(const Quad* gains) {
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      KALMANET_UNROLL
      for (int block = kFirst; block < kFirst + 2; ++block) {
        this->load_right(0, [&](int) { return gains + k * 4 + block; });
        this->add([block](Registers& r, int j) -> float (&)[4] { return r.y[2 * block + j]; },
                  [k](Registers& r) -> uint32_t (&)[4] { return r.w[k]; }, 0);
      }
    }
  }
  // y <- S = w Z, a row a token; what is later than the warp's last token is left out in halves.
  template <bool kSplit>
  KALMANET_KERNEL void multiply_tokens() {
    this->clear_y();
    group.by_warp(0, 8, [&](int warp) {
      if (kSplit) {
        add_tokens<0>(shared.gains[1]);
        if (warp % 4 >= 2) add_tokens<2>(shared.gains[1]);
        this->scale_y(1.0f / kLowScale);
      }
      add_tokens<0>(shared.gains[0]);
      if (warp % 4 >= 2) add_tokens<2>(shared.gains[0]);
    });
  }
  // s <- -mask(S) as left factor.
  template <bool kSplit>
  KALMANET_KERNEL void pack_tokens() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int tile = 2 * block + i / 2;
          float v[2];
          KALMANET_UNROLL
          for (int c = 0; c < 2; ++c) {
            const int e = i % 2 * 2 + c;
            const int t = thread / 32 % 4 * 16 + this->row_of(thread, e);
            v[c] = this->column_of(thread, tile, e) <= t ? -r.y[tile][e] : 0.0f;
          }
          if (kSplit) {
            r.s[0][block][i] = split_scaled(v[0], v[1], r.s[1][block][i]);
          } else {
            r.s[0][block][i] = pack_float16(v[0], v[1]);
          }
        }
      }
    });
  }

  // y += w P and s Z^T, dims 64 kHalf .. ; s[part], or none.
  template <int kHalf>
  KALMANET_KERNEL void add_inverse(const Quad* inverse) {
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        this->load_inverse(0, inverse, k, 4 * kHalf + block);
        this->add([block](Registers& r, int j) -> float (&)[4] { return r.y[2 * block + j]; },
                  [k](Registers& r) -> uint32_t (&)[4] { return r.w[k]; }, 0);
      }
    }
  }
  template <int kHalf, int kFirst>
  KALMANET_KERNEL void add_two_gains(int part, const Quad* gains) {
    KALMANET_UNROLL
    for (int k = kFirst; k < kFirst + 2; ++k) {
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        this->load_right_transposed(0, [&](int) { return gains + (4 * kHalf + block) * 4 + k; });
        this->add([block](Registers& r, int j) -> float (&)[4] { return r.y[2 * block + j]; },
                  [part, k](Registers& r) -> uint32_t (&)[4] { return r.s[part][k]; }, 0);
      }
    }
  }
  template <int kHalf>
  KALMANET_KERNEL void add_gains(int part, const Quad* gains, int warp) {
    add_two_gains<kHalf, 0>(part, gains);
    if (warp % 4 >= 2) add_two_gains<kHalf, 2>(part, gains);
  }

  // w <- (2 N - 2 nu_k) w + a_k q.
  KALMANET_KERNEL void step(int k) {
    multiply_tokens<false>();
    pack_tokens<false>();
    take_coefficients(k);
    group.by_warp(0, 4, [&](int warp) { step_half<0>(k, warp); });
    group.by_warp(4, 8, [&](int warp) { step_half<1>(k, warp); });
    group.barrier_pairs();  // (the partner may still load the last iterate)
    group.each([&](int thread, Registers& r) {
      Quad* const to = part_of(thread / 32);
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          to[block].word[i % 2 * 2 + i / 2][thread % 32] = r.next[block][i];
        }
      }
    });
    group.barrier_pairs();
    load_iterate();
  }
  template <int kHalf>
  KALMANET_KERNEL void step_half(int k, int warp) {
    this->clear_y();
    add_inverse<kHalf>(shared.inverse[0]);
    add_gains<kHalf>(0, shared.gains[0], warp);
    group.each([&](int, Registers& r) {
      const uint32_t node = pack_float16(shared.node[k], shared.node[k]);
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&v)[4] = r.y[2 * block + i / 2];
          uint32_t sum = pack_float16(v[i % 2 * 2], v[i % 2 * 2 + 1]);
          sum = multiply_add_halves(r.w[4 * kHalf + block][i], node, sum);
          r.next[block][i] = multiply_add_halves(r.q[block][i], r.coefficient[i % 2], sum);
        }
      }
    });
  }

  // y <- 2 N w of half the dims.
  template <int kHalf>
  KALMANET_KERNEL void finish(int warp) {
    this->clear_y();
    if (shared.steps == 0) return;
    add_inverse<kHalf>(shared.inverse[1]);
    add_gains<kHalf>(1, shared.gains[0], warp);
    add_gains<kHalf>(0, shared.gains[1], warp);
    this->scale_y(1.0f / kLowScale);
    add_inverse<kHalf>(shared.inverse[0]);
    add_gains<kHalf>(0, shared.gains[0], warp);
  }
  // m from x = y / 2; |x|^2 of the warp's dims.
  KALMANET_KERNEL void put_solution() {
    group.each([&](int thread, Registers& r) {
      r.dot[0] = r.dot[1] = 0;
      Quad* const to = part_of(thread / 32);
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int t = thread / 32 % 4 * 16 + this->row_of(thread, half * 2);
        const float x_scale = shared.solution_scale[t] * (1.0f / kInverseScale);
        const float alpha = shared.alpha[t], scale = shared.query_scale[t];
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) {
          const int block = e / 2, i = half + e % 2 * 2;
          const float (&v)[4] = r.y[2 * block + i / 2];
          const float q[2] = {low_float16(r.q[block][i]), high_float16(r.q[block][i])};
          float m[2];
          KALMANET_UNROLL
          for (int c = 0; c < 2; ++c) {
            const float x = x_scale * v[half * 2 + c];
            r.dot[half] += x * x;
            m[c] = scale * (q[c] + alpha * (x - q[c]));
          }
          to[block].word[half * 2 + e % 2][thread % 32] =
              split_float16(m[0], m[1], r.next[block][i]);
        }
      }
    });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[0]; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[1]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 4 != 0) return;
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        shared.x2[thread / 128][thread / 32 % 4 * 16 + this->row_of(thread, 2 * half)] =
            r.dot[half];
      }
    });
  }
  // m's low parts, once the gains are no longer needed.
  KALMANET_KERNEL void put_low_parts() {
    group.each([&](int thread, Registers& r) {
      Quad* const to = part_of(thread / 32) - shared.queries + shared.gains[1];
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          to[block].word[i % 2 * 2 + i / 2][thread % 32] = r.next[block][i];
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda
