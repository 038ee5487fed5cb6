// The body of the direct chunk kernel: a piece's outputs.
#pragma once

#include "cuda/direct_factor.hpp"

namespace kalmanet::cuda {

// Products of factors split in float16 err by 2^-22 or so, which the amplification multiplies: up
// to this, by less than a quarter of what rounding o to bfloat16 does.
inline constexpr double kLargestDirectAmplification = 1000.0;

template <class Group>
struct DirectBody : DirectFactor<Group> {
  using Base = DirectFactor<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n, Base::k_power, Base::v_power, Base::q_power;
  using L = DirectLayout;
  using Registers = DirectRegisters;

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
      this->template add_middle<true>(typename Base::TakeZ());
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
      if (t >= n || this->exact(t)) return;
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
        if (token >= n || this->exact(token)) return;
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
      this->plan_chunk(scale);
      group.barrier();
      if (shared.ill != 0) return true;
      group.new_part();
      if (shared.steps > 0) this->factor();
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
  DirectBody<Group> body{{{{{group, shared}}, job, piece, head, states}}};
  const bool left_over = body.run();
  group.each([&](int thread, DirectRegisters&) {
    if (thread == 0) job.left_over[block] = left_over ? 1 : 0;
  });
}

}  // namespace kalmanet::cuda
