// The direct chunk kernel's solve: x = N p(N) q of 16 tokens a pair of warps, and m = q + alpha (x -
// q).
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
      this->clear_y();
      group.by_every_warp([&](int warp) {
        add_tokens<true>(shared.gains[1], warp);
        this->scale_y(1.0f / kLowScale);
        add_tokens<true>(shared.gains[0], warp);
      });
      pack_exact_tokens();
    }
    group.by_halves([&](int warp) { finish<0>(warp); }, [&](int warp) { finish<1>(warp); });
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

  // load(i, part) and add(i, part) for i < kCount, two loads ahead of the products of two: left to
  // itself, the compiler asks for a quad just before it waits for it. (No load sinks below a
  // barrier.)
  template <int kCount, class Load, class Add>
  KALMANET_KERNEL void pipeline(Load&& load, Add&& add) {
    KALMANET_UNROLL
    for (int i = 0; i < kCount + 2; i += 2) {
      if (i < kCount) {
        load(i, i % 4);
        load(i + 1, i % 4 + 1);
        group.barrier_warp();
      }
      if (i >= 2) {
        add(i - 2, (i - 2) % 4);
        add(i - 1, (i - 1) % 4);
      }
    }
  }

  // Tiles 2 block and the next += a b[part]: sums in float32 (y), or in float16 (e).
  template <bool kExact, class A>
  KALMANET_KERNEL void add_block(int block, A&& a, int part) {
    if constexpr (kExact) {
      this->add([block](Registers& r, int j) -> float (&)[4] { return r.y[2 * block + j]; }, a,
                part);
    } else {
      KALMANET_UNROLL
      for (int j = 0; j < 2; ++j) {
        group.multiply_add_to_float16(
            [block, j](Registers& r) -> uint32_t (&)[2] { return r.e[2 * block + j]; }, a,
            [part, j](Registers& r) -> uint32_t (&)[2] { return r.b[part][j]; });
      }
    }
  }
  // The sums += w X for X's blocks kFirst .. of 16 tokens (columns) each.
  template <bool kExact, int kFirst>
  KALMANET_KERNEL void add_two_tokens(const Quad* gains) {
    pipeline<16>(
        [&](int i, int part) {
          this->load_right(part, [&](int) { return gains + i / 2 * 4 + kFirst + i % 2; });
        },
        [&](int i, int part) {
          add_block<kExact>(
              kFirst + i % 2, [i](Registers& r) -> uint32_t (&)[4] { return r.w[i / 2]; }, part);
        });
  }
  // The sums += S = w Z, a row a token; what is later than the warp's last token is left out in
  // halves.
  template <bool kExact>
  KALMANET_KERNEL void add_tokens(const Quad* gains, int warp) {
    add_two_tokens<kExact, 0>(gains);
    if (warp % 4 >= 2) add_two_tokens<kExact, 2>(gains);
  }
  // s <- -mask(S) as left factor.
  KALMANET_KERNEL void pack_exact_tokens() {
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
          r.s[0][block][i] = split_scaled(v[0], v[1], r.s[1][block][i]);
        }
      }
    });
  }
  KALMANET_KERNEL void pack_tokens() {
    group.each([&](int thread, Registers& r) {
      // A lane's token less the first of the two columns in a word, in row half 0 of tile 0.
      const int ahead = thread / 32 % 4 * 16 + thread % 32 / 4 - thread % 4 * 2;
      KALMANET_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int tile = i / 2, by = ahead + 8 * (i % 2 - tile);
        const uint32_t kept = by > 0 ? 0xffffffffu : (by == 0 ? 0xffffu : 0u);
        r.s[0][tile / 2][tile % 2 * 2 + i % 2] = (r.e[tile][i % 2] ^ 0x80008000u) & kept;
      }
    });
  }

  // The sums += w P and s[part] Z^T, dims 64 kHalf .. .
  template <bool kExact, int kHalf>
  KALMANET_KERNEL void add_inverse(const Quad* inverse) {
    pipeline<32>(
        [&](int i, int part) { this->load_inverse(part, inverse, i / 4, 4 * kHalf + i % 4); },
        [&](int i, int part) {
          add_block<kExact>(
              i % 4, [i](Registers& r) -> uint32_t (&)[4] { return r.w[i / 4]; }, part);
        });
  }
  template <bool kExact, int kHalf, int kFirst>
  KALMANET_KERNEL void add_two_gains(int part, const Quad* gains) {
    pipeline<8>(
        [&](int i, int to) {
          this->load_right_transposed(
              to, [&](int) { return gains + (4 * kHalf + i % 4) * 4 + kFirst + i / 4; });
        },
        [&](int i, int from) {
          add_block<kExact>(
              i % 4,
              [part, i](Registers& r) -> uint32_t (&)[4] { return r.s[part][kFirst + i / 4]; },
              from);
        });
  }
  template <bool kExact, int kHalf>
  KALMANET_KERNEL void add_gains(int part, const Quad* gains, int warp) {
    add_two_gains<kExact, kHalf, 0>(part, gains);
    if (warp % 4 >= 2) add_two_gains<kExact, kHalf, 2>(part, gains);
  }

  // w <- (2 N - 2 nu_k) w + a_k q, sums in float16: they lie as the next left factor does.
  KALMANET_KERNEL void step(int k) {
    this->clear_y();
    group.by_every_warp([&](int warp) { add_tokens<true>(shared.gains[0], warp); });
    group.each([](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 16; ++i) {
        r.e[i / 2][i % 2] = pack_float16(r.y[i / 2][i % 2 * 2], r.y[i / 2][i % 2 * 2 + 1]);
      }
    });
    pack_tokens();
    take_coefficients(k);
    group.by_halves([&](int warp) { step_half<0>(k, warp); },
                    [&](int warp) { step_half<1>(k, warp); });
    group.barrier_pairs();  // (the partner may still load the last iterate)
    group.each([&](int thread, Registers& r) {
      Quad* const to = part_of(thread / 32);
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        KALMANET_UNROLL
        for (int m = 0; m < 4; ++m) {
          to[block].word[m][thread % 32] = r.e[2 * block + m % 2][m / 2];
        }
      }
    });
    group.barrier_pairs();
    load_iterate();
  }
  template <int kHalf>
  KALMANET_KERNEL void step_half(int k, int warp) {
    this->clear_y();
    add_inverse<true, kHalf>(shared.inverse[0]);
    add_gains<true, kHalf>(0, shared.gains[0], warp);
    group.each([&](int, Registers& r) {
      const uint32_t node = pack_float16(shared.node[k], shared.node[k]);
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&v)[4] = r.y[2 * block + i / 2];
          uint32_t sum = pack_float16(v[i % 2 * 2], v[i % 2 * 2 + 1]);
          sum = multiply_add_halves(r.w[4 * kHalf + block][i], node, sum);
          r.e[2 * block + i / 2][i % 2] =
              multiply_add_halves(r.q[block][i], r.coefficient[i % 2], sum);
        }
      }
    });
  }

  // y <- 2 N w of half the dims.
  template <int kHalf>
  KALMANET_KERNEL void finish(int warp) {
    this->clear_y();
    if (shared.steps == 0) return;
    add_inverse<true, kHalf>(shared.inverse[1]);
    add_gains<true, kHalf>(1, shared.gains[0], warp);
    add_gains<true, kHalf>(0, shared.gains[1], warp);
    this->scale_y(1.0f / kLowScale);
    add_inverse<true, kHalf>(shared.inverse[0]);
    add_gains<true, kHalf>(0, shared.gains[0], warp);
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
              split_float16(m[0], m[1], r.low[block][i]);
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
          to[block].word[i % 2 * 2 + i / 2][thread % 32] = r.low[block][i];
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda
