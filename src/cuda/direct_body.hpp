// The body of the direct chunk kernel: a piece's outputs.
#pragma once

#include "cuda/chunk_body.hpp"
#include "cuda/direct_state.hpp"

namespace kalmanet::cuda {

// Products of factors split in float16 err by 2^-22 or so, which the amplification multiplies: up
// to this, by less than a quarter of what rounding o to bfloat16 does.
inline constexpr double kLargestDirectAmplification = 1000.0;
// Truncation relative to x's own components, which U does not magnify: below this, bfloat16's
// rounding of o (2^-9) hides it.
inline constexpr double kFinestTolerance = 0x1p-12;

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
struct DirectBody : DirectState<Group> {
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
        const float tolerance =
            static_cast<float>(job.tolerance > kFinestTolerance ? job.tolerance : kFinestTolerance);
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
          r.h[tile][i] = r.h[tile][i] * inverse_mu + (diagonal ? 1.0f : 0.0f);
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
    this->invert();
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

  // The queries into s.
  KALMANET_KERNEL void take_queries() {
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      group.each([&](int thread, Registers& r) {
        const Left left = shared.queries[(m * 8 + thread / 32) * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.t[i] = left.part[i];
      });
      this->transpose_all();
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          float (&v)[4] = r.s[2 * m + i % 2];
          v[i / 2 * 2] = low_float16(r.t[i]), v[i / 2 * 2 + 1] = high_float16(r.t[i]);
        }
      });
    }
  }

  KALMANET_KERNEL void solve() {
    take_queries();
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.x[tile][i] = 0;
      }
    });
    for (int k = 0; k < shared.steps; ++k) {
      const Left* const right = k == 0 ? shared.queries : shared.right;
      group.barrier();
      this->template multiply_tokens<true, false>(shared.gains[0], shared.gains[1], right, nullptr);
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (this->tile_row(thread, i) > this->tile_column(thread, i)) r.g[0][i] = 0;
          r.g[0][i] = -r.g[0][i];
        }
      });
      this->put_middle();
      this->template multiply_inverse<true>(right);
      group.barrier();
      this->template add_middle<true>(TakeZ());
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 4; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int t = this->token_of(thread, tile, i);
            const float gain = shared.gain[k][t], gp = gain * (1.0f / kInverseScale) * r.y[tile][i];
            r.x[tile][i] += gp;
            r.s[tile][i] -= gain * r.s[tile][i] + shared.delta[t] * gp;
          }
        }
      });
      if (k + 1 < shared.steps) {
        this->put_right(shared.right, nullptr, [](Registers& r) -> float (&)[4][4] { return r.s; });
      }
    }
  }

  // o of the chunk from x.
  KALMANET_KERNEL void read_out() {
    take_queries();
    this->dot_columns(0, [&](Registers& r, int thread, int tile, int i) {
      const float x = r.x[tile][i] * shared.solution_scale[this->token_of(thread, tile, i)];
      return x * x;
    });
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->token_of(thread, tile, i);
          const float q = r.s[tile][i];
          r.x[tile][i] = shared.query_scale[t] *
                         (q + shared.alpha[t] * (shared.solution_scale[t] * r.x[tile][i] - q));
        }
      }
    });
    this->put_right(shared.right, shared.gains[0],
                    [](Registers& r) -> float (&)[4][4] { return r.x; });
    group.barrier();
    group.new_part();
    this->fetch_state(true);
    this->template multiply_tokens<false, true>(shared.keys, nullptr, shared.right,
                                                shared.gains[0]);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = this->tile_row(thread, i), t = this->tile_column(thread, i);
        r.g[0][i] = j <= t ? r.g[0][i] * (shared.value_weight[j] * shared.start[1][t]) : 0.0f;
      }
    });
    this->put_middle();
    const double u2 = this->squares_of_state(true);
    const float u_power = u2 > 0.0 ? static_cast<float>(256.0 / sqrt(u2)) : 1.0f;
    this->clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      group.each([&](int thread, Registers& r) {
        this->template pack_state<true>(r.h[2 * k], r.h[2 * k + 1], u_power, r.a);
        this->load_right(shared.right, thread, k, r.b[0]);
        this->load_right(shared.gains[0], thread, k, r.b[1]);
      });
      this->add_tiles(1, 0);
      this->add_tiles(0, 1);
      this->add_tiles(0, 0);
    }
    const float unit = shared.largest_beta2 / k_power / v_power, per_unit = 1.0f / (u_power * unit);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.y[tile][i] *= shared.start[1][this->token_of(thread, tile, i)] * per_unit;
        }
      }
    });
    group.barrier();
    this->template add_middle<false>([&](Registers& r, int thread, int k) {
      const Left left = shared.values[(thread / 32 * 2 + k) * 32 + thread % 32];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.a[0][i] = left.part[i];
    });
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->token_of(thread, tile, i);
          r.y[tile][i] *= shared.output_scale[t] * unit;
        }
      }
    });
    this->dot_columns(
        1, [&](Registers& r, int, int tile, int i) { return r.y[tile][i] * r.y[tile][i]; });
    store_outputs();
    group.barrier();
    group.each([&](int t, Registers&) {
      if (t >= n || exact(t)) return;
      // |U_t| is at most |U_0| and what the chunk's values add; the former says enough where it is
      // not small, and where it is these are a sequence's first tokens.
      const double weight = shared.alpha[t] * job.scale / q_power;
      const double x2 = weight * weight * this->dot(0, t) * u2 / 128.0;
      const double limit = kLargestDirectAmplification * kLargestDirectAmplification;
      if (!(x2 <= limit * this->dot(1, t))) shared.ill = 1;
    });
  }

  KALMANET_KERNEL void store_outputs() {
    uint16_t* const base =
        static_cast<uint16_t*>(job.o.data) + offset_of(job.o, piece.row, t0, head);
    KALMANET_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      group.each([&](int, Registers& r) {
        r.t[0] = pack_bfloat16(r.y[tile][0], r.y[tile][1]);
        r.t[1] = pack_bfloat16(r.y[tile][2], r.y[tile][3]);
      });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
      group.each([&](int thread, Registers& r) {
        const int token = tile * 8 + thread % 32 / 4;
        const int dim = thread / 32 * 16 + thread % 4 * 2;
        if (token >= n || exact(token)) return;
        uint16_t* const to = base + token * job.o.stride[1] + dim;
        memcpy(to, &r.t[0], 4);
        memcpy(to + 8, &r.t[1], 4);
      });
    }
  }

  // Returns whether the token kernel must do the piece instead.
  KALMANET_KERNEL bool run() {
    group.each([&](int thread, Registers&) {
      if (thread == 0) shared.ill = 0;
    });
    this->load_state(true);
    this->load_state(false);
    group.barrier();
    for (t0 = piece.begin; t0 < piece.end; t0 += n) {
      head = opaque(head);
      piece.row = opaque(piece.row);
      group.new_part();
      this->fetch_tile(job.k, head / job.k_group, 0);
      this->fetch_tile(job.v, head / job.v_group, 1);
      this->fetch_tile(job.q, head / job.q_group, 2);
      this->load_scalars();
      this->stage_tile(0);
      this->stage_tile(1);
      this->stage_tile(2);
      group.barrier();
      group.new_part();
      n = shared.tokens;
      k_power = this->put_tile(0, 1, shared.keys, shared.columns);
      v_power = this->put_tile(1, 1, nullptr, shared.values);
      q_power = this->put_tile(2, 2, shared.queries, nullptr);
      this->fetch_state(false);
      if (!(k_power > 0.0f && v_power > 0.0f && q_power > 0.0f) || shared.ill != 0) return true;
      group.barrier();
      const float norm = static_cast<float>(sqrt(this->squares_of_state(false)));
      const float scale = norm > 0.0f ? 16.0f / norm : 1.0f;
      this->measure_keys(scale);
      group.barrier();
      group.new_part();
      plan_chunk(scale);
      group.barrier();
      if (shared.ill != 0) return true;
      group.new_part();
      if (shared.steps > 0) factor();
      group.new_part();
      solve();
      group.barrier();
      group.new_part();
      read_out();
      group.barrier();
      if (shared.ill != 0) return true;
      if (t0 + n >= piece.end && !piece.last) return false;
      group.new_part();
      KALMANET_LOOP  // one copy of the code
          for (int which = 1; which >= 0; --which) this->advance(which == 1);
      group.barrier();
    }
    this->store_state(false, state_view<float>(job.h_final, piece.sequence, head));
    this->store_state(true, state_view<float>(job.u_final, piece.sequence, head));
    return false;
  }
};

// The work of block (piece_index, head).
template <class Group>
KALMANET_KERNEL void run_direct(Group& group, DirectShared& shared, const GkaJob& job,
                                int64_t piece_index, int64_t head) {
  const Piece piece = piece_of(job, piece_index);
  const int64_t block = piece_index * job.H + head;
  float* const states =
      static_cast<float*>(job.chunk_scratch) + block * DirectState<Group>::kStateFloats;
#ifdef __CUDACC__
  __builtin_assume(__isGlobal(states));
#endif
  DirectBody<Group> body{{{{group, shared}}, job, piece, head, states}};
  const bool left_over = body.run();
  group.each([&](int thread, DirectRegisters&) {
    if (thread == 0) job.left_over[block] = left_over ? 1 : 0;
  });
}

}  // namespace kalmanet::cuda
