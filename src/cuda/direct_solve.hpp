// The direct chunk kernel's solve: x = N p(N) q of 16 tokens a warp, and m = q + alpha (x - q).
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

  // By the first four warps. m's high parts into queries; its low parts stay in registers.
  KALMANET_KERNEL void solve() {
    group.by_warp(0, 4, [&](int warp) {
      const int steps = shared.steps;
      if (steps > 0) {
        KALMANET_UNROLL
        for (int k = 0; k < 8; ++k) {
          group.template load_quad<false, true>([k](Registers& r) { return r.w[k]; },
                                                [&](int) { return &shared.queries[warp * 8 + k]; });
        }
        take_coefficients(steps - 1, warp);
        group.each([](int, Registers& r) {
          KALMANET_UNROLL
          for (int i = 0; i < 32; ++i) {
            r.w[i / 4][i % 4] = multiply_halves(r.w[i / 4][i % 4], r.coefficient[i % 2]);
          }
        });
        KALMANET_LOOP
        for (int k = steps - 2; k >= 0; --k) step(k, warp);
        multiply_tokens<true>(warp);
        pack_tokens<true>(warp);
      }
      group.each([](int, Registers& r) { r.dot[0] = r.dot[1] = 0; });
      finish<0>(warp);
      finish<1>(warp);
      group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[0]; });
      group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[1]; });
      group.each([&](int thread, Registers& r) {
        if (thread % 4 != 0) return;
        shared.x2[warp * 16 + this->row_of(thread, 0)] = r.dot[0];
        shared.x2[warp * 16 + this->row_of(thread, 2)] = r.dot[1];
      });
    });
  }

  // Of polynomial term k, of the lane's two rows.
  KALMANET_KERNEL void take_coefficients(int k, int warp) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t a = shared.coefficient[k][warp * 16 + this->row_of(thread, 2 * i)];
        r.coefficient[i] = a | a << 16;
      }
    });
  }

  // y += w X^T for X's blocks `first` .. of 16 tokens (rows) each.
  template <int kFirst>
  KALMANET_KERNEL void add_tokens(const Quad* gains) {
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      KALMANET_UNROLL
      for (int block = kFirst; block < kFirst + 2; ++block) {
        this->load_right_transposed(0, [&](int) { return gains + block * 8 + k; });
        this->add([block](Registers& r, int j) -> float (&)[4] { return r.y[2 * block + j]; },
                  [k](Registers& r) -> uint32_t (&)[4] { return r.w[k]; }, 0);
      }
    }
  }
  // y <- S = w Z, a row a token; what is later than the warp's last token is left out in halves.
  template <bool kSplit>
  KALMANET_KERNEL void multiply_tokens(int warp) {
    this->clear_y();
    if (kSplit) {
      add_tokens<0>(shared.gains[1]);
      if (warp >= 2) add_tokens<2>(shared.gains[1]);
      this->scale_y(1.0f / kLowScale);
    }
    add_tokens<0>(shared.gains[0]);
    if (warp >= 2) add_tokens<2>(shared.gains[0]);
  }
  // s <- -mask(S) as left factor.
  template <bool kSplit>
  KALMANET_KERNEL void pack_tokens(int warp) {
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
            const int t = warp * 16 + this->row_of(thread, e), j = this->column_of(thread, tile, e);
            v[c] = j <= t ? -r.y[tile][e] : 0.0f;
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
        this->load_right(0, [&](int) { return gains + k * 8 + 4 * kHalf + block; });
        this->add([block](Registers& r, int j) -> float (&)[4] { return r.y[2 * block + j]; },
                  [part, k](Registers& r) -> uint32_t (&)[4] { return r.s[part][k]; }, 0);
      }
    }
  }
  template <int kHalf>
  KALMANET_KERNEL void add_gains(int part, const Quad* gains, int warp) {
    add_two_gains<kHalf, 0>(part, gains);
    if (warp >= 2) add_two_gains<kHalf, 2>(part, gains);
  }

  // w <- (2 N - 2 nu_k) w + a_k q.
  KALMANET_KERNEL void step(int k, int warp) {
    multiply_tokens<false>(warp);
    pack_tokens<false>(warp);
    take_coefficients(k, warp);
    step_half<0>(k, warp);
    step_half<1>(k, warp);
    group.each([](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 16; ++i) r.w[i / 4][i % 4] = r.next[i / 4][i % 4];
    });
  }
  template <int kHalf>
  KALMANET_KERNEL void step_half(int k, int warp) {
    this->clear_y();
    add_inverse<kHalf>(shared.inverse[0]);
    add_gains<kHalf>(0, shared.gains[0], warp);
    KALMANET_UNROLL
    for (int block = 0; block < 4; ++block) {
      const int at = 4 * kHalf + block;
      this->load_left(0, [&](int) { return &shared.queries[warp * 8 + at]; });
      group.each([&](int, Registers& r) {
        const uint32_t node = pack_float16(shared.node[k], shared.node[k]);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&v)[4] = r.y[2 * block + i / 2];
          uint32_t sum = pack_float16(v[i % 2 * 2], v[i % 2 * 2 + 1]);
          sum = multiply_add_halves(r.w[at][i], node, sum);
          sum = multiply_add_halves(r.a[0][i], r.coefficient[i % 2], sum);
          (kHalf == 0 ? r.next[block] : r.w[at])[i] = sum;
        }
      });
    }
  }

  // x = N w, and m, of half the dims.
  template <int kHalf>
  KALMANET_KERNEL void finish(int warp) {
    this->clear_y();
    if (shared.steps > 0) {
      add_inverse<kHalf>(shared.inverse[1]);
      add_gains<kHalf>(1, shared.gains[0], warp);
      add_gains<kHalf>(0, shared.gains[1], warp);
      this->scale_y(1.0f / kLowScale);
      add_inverse<kHalf>(shared.inverse[0]);
      add_gains<kHalf>(0, shared.gains[0], warp);
    }
    KALMANET_UNROLL
    for (int block = 0; block < 4; ++block) {
      Quad& queries = shared.queries[warp * 8 + 4 * kHalf + block];
      this->load_left(0, [&](int) { return &queries; });
      group.barrier_warp();
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = warp * 16 + this->row_of(thread, i % 2 * 2);
          const float (&v)[4] = r.y[2 * block + i / 2];
          const float q[2] = {low_float16(r.a[0][i]), high_float16(r.a[0][i])};
          float m[2];
          KALMANET_UNROLL
          for (int c = 0; c < 2; ++c) {
            const float x = shared.solution_scale[t] * (1.0f / kInverseScale) * v[i % 2 * 2 + c];
            r.dot[i % 2] += x * x;
            m[c] = shared.query_scale[t] * (q[c] + shared.alpha[t] * (x - q[c]));
          }
          queries.word[i % 2 * 2 + i / 2][thread % 32] =
              split_float16(m[0], m[1], (kHalf == 0 ? r.next[block] : r.w[block])[i]);
        }
      });
    }
  }
  // m's low parts, once the gains are no longer needed.
  KALMANET_KERNEL void put_low_parts() {
    group.by_warp(0, 4, [&](int warp) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int at = 0; at < 8; ++at) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            shared.gains[1][warp * 8 + at].word[i % 2 * 2 + i / 2][thread % 32] =
                (at < 4 ? r.next[at % 4] : r.w[at % 4])[i];
          }
        }
      });
    });
  }
};

}  // namespace kalmanet::cuda
