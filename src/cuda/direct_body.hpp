// The body of the direct chunk kernel: a piece's outputs.
#pragma once

#include "cuda/direct_solve.hpp"

namespace kalmanet::cuda {

// Products of factors split in float16 err by 2^-22 or so, which the amplification multiplies: up
// to this, by less than a quarter of what rounding o to bfloat16 does.
// (Beside float16, which rounds an eighth of that, up to a quarter.)
inline constexpr double kLargestDirectAmplification = 1000.0;
template <class Group>
KALMANET_KERNEL float direct_amplification(const GkaJob& job) {
  constexpr float kLimit = static_cast<float>(kLargestDirectAmplification);
  return is_float16<Group>(job.o) ? kLimit / 4.0f : kLimit;
}

template <class Group>
struct DirectBody : DirectSolve<Group> {
  using Base = DirectSolve<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  KALMANET_KERNEL Quad* values() { return shared.inverse[0]; }
  KALMANET_KERNEL Quad* outputs() { return shared.inverse[1]; }
  KALMANET_KERNEL Quad* middle(int part) { return shared.gains[0] + 16 * part; }

  // middle <- e^{G_t - G_j} m_t . k_j of the chunk's own pairs, in the units of r.largest.
  KALMANET_KERNEL void weigh_values() {
    this->template clear_y<4>();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      this->load_left(0, [&](int w) { return &shared.queries[w % 4 * 8 + k]; });
      this->load_left(1, [&](int w) { return &shared.gains[1][w % 4 * 8 + k]; });
      KALMANET_UNROLL
      for (int block = 0; block < 2; ++block) {
        this->load_right_transposed(
            0, [&](int w) { return &shared.keys[(w / 4 * 2 + block) * 8 + k]; });
        this->add_y(2 * block, 1, 0);
        this->add_y(2 * block, 0, 0);
      }
    }
    this->find_largest(true);
    group.each([&](int thread, Registers& r) {
      const float per_unit = divide(1.0f, r.largest);
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = thread / 32 % 4 * 16 + this->row_of(thread, i);
          const int j = thread / 128 * 32 + this->column_of(thread, tile, i);
          const float weight = shared.value_weight[j] * shared.start[1][t] *
                               (shared.unit[0][j] * shared.unit[1][j] * per_unit);
          r.y[tile][i] = j <= t ? r.y[tile][i] * weight : 0.0f;
        }
      }
      KALMANET_UNROLL
      for (int block = 0; block < 2; ++block) {
        const int at = thread / 32 % 4 * 4 + thread / 128 * 2 + block;
        KALMANET_UNROLL
        for (int m = 0; m < 4; ++m) {
          const float (&v)[4] = r.y[2 * block + m % 2];
          uint32_t low;
          middle(0)[at].word[m][thread % 32] = split_float16(v[m / 2 * 2], v[m / 2 * 2 + 1], low);
          middle(1)[at].word[m][thread % 32] = low;
        }
      }
    });
  }

  // outputs <- o of the chunk, bfloat16, from m and U.
  KALMANET_KERNEL void read_out() {
    const double u2 = this->squares_of_state(true);
    const float u_power = u2 > 0.0 ? static_cast<float>(256.0 / sqrt(u2)) : 1.0f;
    this->fetch_columns(true, 0);
    this->clear_y();
    KALMANET_LOOP
    for (int k = 0; k < 8; ++k) {
      group.each([&](int, Registers& r) {
        this->template pack_state<true>(r.f[0], r.f[1], u_power, r.a);
      });
      if (k < 7) this->fetch_columns(true, k + 1);
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        this->load_right_transposed(0, [&](int) { return &shared.queries[block * 8 + k]; });
        this->load_right_transposed(1, [&](int) { return &shared.gains[1][block * 8 + k]; });
        this->add_y(2 * block, 1, 0);
        this->add_y(2 * block, 0, 1);
        this->add_y(2 * block, 0, 0);
      }
    }
    const float per_unit = 1.0f / u_power;
    group.each([&](int thread, Registers& r) {
      const float scale = divide(per_unit, r.largest);
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.y[tile][i] *= shared.start[1][this->column_of(thread, tile, i)] * scale;
        }
      }
    });
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      this->load_left_transposed(0, [&](int w) { return values() + k * 8 + w; });
      KALMANET_UNROLL
      for (int block = k; block < 4; ++block) {
        KALMANET_UNROLL
        for (int part = 1; part >= 0; --part) {
          this->load_right_transposed(0, [&](int) { return middle(part) + block * 4 + k; });
          this->add_y(2 * block, 0, 0);
        }
      }
    }
    KALMANET_UNROLL
    for (int tile = 0; tile < 8; ++tile) {
      group.each([&](int thread, Registers& r) {
        float v[4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->column_of(thread, tile, i);
          v[i] = r.y[tile][i] * (shared.output_scale[t] * shared.unit[2][t] * r.largest);
        }
        r.t[0] = pack_numbers<Group>(job.o, v[0], v[1]);
        r.t[1] = pack_numbers<Group>(job.o, v[2], v[3]);
      });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
      group.each([&](int thread, Registers& r) {
        Quad& to = outputs()[tile / 2 * 8 + thread / 32];
        to.word[tile % 2 * 2][thread % 32] = r.t[0];
        to.word[tile % 2 * 2 + 1][thread % 32] = r.t[1];
      });
    }
  }

  // Eight tokens' outputs a warp; and whether U magnifies more than these products bear.
  KALMANET_KERNEL void store_outputs() {
    uint16_t* const base =
        static_cast<uint16_t*>(job.o.data) + offset_of(job.o, piece.row, t0, head);
    group.each([&](int thread, Registers& r) {
      const int token = thread / 32 * 8 + thread % 8;
      const bool ours = token < n && !this->exact(token);
      r.dot[0] = 0;
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = thread % 32 / 8 + i * 4;  // of 16 of 8 dims
        uint32_t v[4];
        load16(&outputs()[token / 16 * 8 + column / 2]
                    .word[token / 8 % 2 * 2 + column % 2][token % 8 * 4],
               v);
        if (ours && has_column<Group>(job.o, column * 8))
          store16(base + token * job.o.stride[1] + column * 8, v);
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float first = low_number<Group>(job.o, v[e]);
          const float second = high_number<Group>(job.o, v[e]);
          r.dot[0] += first * first;
          r.dot[0] += second * second;
        }
      }
    });
    group.template sum_apart<8>([](Registers& r) -> float& { return r.dot[0]; });
    const float u2 = static_cast<float>(this->squares_of_state(true));
    group.each([&](int thread, Registers& r) {
      const int token = thread / 32 * 8 + thread % 8;
      if (token >= n || this->exact(token)) return;
      // |U_t| is at most |U_0| and what the chunk's values add; the former says enough where it is
      // not small, and where it is these are a sequence's first tokens.
      const float weight =
          shared.alpha[token] * shared.unit[2][token] * static_cast<float>(job.scale);
      const float x2 = (shared.x2[0][token] + shared.x2[1][token]) * u2 /
                       static_cast<float>(key_dims<Group>(job));
      const float limit = direct_amplification<Group>(job);
      if (!(fabsf(weight) * sqrtf(x2) <= limit * sqrtf(r.dot[0]))) shared.ill = 1;
    });
  }

  // Returns whether the token kernel must do the piece instead.
  KALMANET_KERNEL bool run() {
    group.each([&](int thread, Registers&) {
      if (thread == 0) shared.ill = 0;
    });
    this->load_state(true);
    this->load_state(false);
    this->fetch_state(false);
    group.barrier();
    for (t0 = piece.begin; t0 < piece.end; t0 += n) {
      head = opaque(head);
      piece.row = opaque(piece.row);
      group.new_part();
      group.by_warp(0, 8,
                    [&](int warp) { this->fetch_rows(job.k, head / job.k_group, warp * 8, 0); });
      this->load_scalars();
      group.barrier();
      n = shared.tokens;
      group.by_warp(0, 8, [&](int warp) {
        this->put_rows(job.k, warp * 8, 0, 1, shared.keys, shared.unit[0]);
      });
      group.barrier();
      const float norm = static_cast<float>(sqrt(this->squares_of_state(false)));
      const float scale = norm > 0.0f ? 16.0f / norm : 1.0f;
      this->measure_keys(scale);
      group.barrier();
      group.new_part();
      this->plan_chunk(static_cast<float>(this->squares_of_state(false)), [&](int t) {
        const DirectMeasured& measured = shared.measured;
        float product = 0;
        KALMANET_UNROLL
        for (int w = 0; w < 8; ++w) product += measured.dots[w][t];
        return product / scale + (measured.gram[0][t] + measured.gram[1][t]);
      });
      group.barrier();
      if (shared.ill != 0) return true;
      group.new_part();
      if (shared.steps > 0) {
        this->factor();
      } else {
        this->take_queries();
      }
      group.barrier();
      group.new_part();
      this->solve();
      group.by_warp(0, 8,
                    [&](int warp) { this->fetch_rows(job.v, head / job.v_group, warp * 8, 0); });
      group.barrier();
      group.new_part();
      this->put_low_parts();
      group.by_warp(
          0, 8, [&](int warp) { this->put_rows(job.v, warp * 8, 0, 1, values(), shared.unit[1]); });
      group.barrier();
      weigh_values();
      group.barrier();
      group.new_part();
      read_out();
      group.barrier();
      store_outputs();
      if (t0 + n >= piece.end && !piece.last) {
        group.barrier();
        return shared.ill != 0;
      }
      group.barrier();  // (before the squares of U change)
      group.new_part();
      KALMANET_LOOP  // one copy of the code
          for (int which = 1; which >= 0; --which) this->advance(which == 1);
      this->fetch_state(false);
      group.barrier();
      if (shared.ill != 0) return true;
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
  if (is_short(job, piece_index, head)) return;
  const Piece piece = piece_of(job, piece_index);
  const int64_t block = piece_index * job.H + head;
  float* const states =
      static_cast<float*>(job.chunk_scratch) + block * DirectState<Group>::kStateFloats;
#ifdef __CUDACC__
  __builtin_assume(__isGlobal(states));
#endif
  DirectBody<Group> body{{{{{{{{{group, shared}}}, job, piece, head, states}}}}}};
  const bool left_over = body.run();
  group.each([&](int thread, DirectRegisters&) {
    if (thread == 0) job.left_over[block] = left_over ? kLeftOver : 0;
  });
}

}  // namespace kalmanet::cuda
