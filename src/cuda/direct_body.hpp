// The body of the direct chunk kernel: a piece's outputs.
#pragma once

#include "cuda/direct_solve.hpp"

namespace kalmanet::cuda {

// Products of factors split in float16 err by 2^-22 or so, which the amplification multiplies: up
// to this, by less than a quarter of what rounding o to bfloat16 does.
inline constexpr double kLargestDirectAmplification = 1000.0;

template <class Group>
struct DirectBody : DirectSolve<Group> {
  using Base = DirectSolve<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  KALMANET_KERNEL Quad* values() { return shared.inverse[0]; }
  KALMANET_KERNEL Quad* middle(int part) { return shared.gains[0] + 16 * part; }
  KALMANET_KERNEL float (*output_dots())[L::kTokens] {
    return reinterpret_cast<float (*)[L::kTokens]>(shared.coefficient);
  }

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
          middle(0)[at].word[m][thread % 32] =
              split_float16(v[m / 2 * 2], v[m / 2 * 2 + 1], low);
          middle(1)[at].word[m][thread % 32] = low;
        }
      }
    });
  }

  // o of the chunk from m and from U^T, which is in h.
  KALMANET_KERNEL void read_out() {
    const double u2 = this->squares_of_state(true);
    const float u_power = u2 > 0.0 ? static_cast<float>(256.0 / sqrt(u2)) : 1.0f;
    this->clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      group.each([&](int, Registers& r) {
        this->template pack_state<true>(r.h[2 * k], r.h[2 * k + 1], u_power, r.a);
      });
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
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->column_of(thread, tile, i);
          r.y[tile][i] *= shared.output_scale[t] * shared.unit[2][t] * r.largest;
        }
      }
    });
    KALMANET_UNROLL
    for (int tile = 0; tile < 8; ++tile) {
      this->dot_columns(output_dots(), tile, [tile](int, Registers& r, int i) {
        return r.y[tile][i] * r.y[tile][i];
      });
    }
    store_outputs();
  }

  // Whether U magnifies more than these products bear: a barrier after read_out().
  KALMANET_KERNEL void check_outputs(double u2) {
    group.each([&](int t, Registers&) {
      if (t >= n || this->exact(t)) return;
      double o2 = 0.0;
      for (int w = 0; w < 8; ++w) o2 += static_cast<double>(output_dots()[w][t]);
      // |U_t| is at most |U_0| and what the chunk's values add; the former says enough where it is
      // not small, and where it is these are a sequence's first tokens.
      const double weight = static_cast<double>(shared.alpha[t] * shared.unit[2][t]) * job.scale;
      const double x2 = weight * weight * static_cast<double>(shared.x2[t]) * u2 / 128.0;
      const double limit = kLargestDirectAmplification * kLargestDirectAmplification;
      if (!(x2 <= limit * o2)) shared.ill = 1;
    });
  }

  KALMANET_KERNEL void store_outputs() {
    uint16_t* const base =
        static_cast<uint16_t*>(job.o.data) + offset_of(job.o, piece.row, t0, head);
    KALMANET_UNROLL
    for (int tile = 0; tile < 8; ++tile) {
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

  // The next chunk's rows towards L2: by the last four warps, half a row a thread.
  KALMANET_KERNEL void prefetch_rows(const Array& a, int64_t a_head) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0 + n, a_head);
    const int64_t left = piece.end - t0 - n;
    group.each([&](int thread, Registers&) {
      const int token = thread % 128 / 2;
      if (token < left) prefetch(base + token * a.stride[1] + thread % 2 * 64);
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
      group.by_warp(0, 8, [&](int warp) {
        this->fetch_rows(job.k, head / job.k_group, warp * 8, 0);
      });
      this->load_scalars();
      group.barrier();
      n = shared.tokens;
      group.by_warp(0, 8, [&](int warp) {
        this->put_rows(warp * 8, 0, 1, shared.keys, shared.unit[0]);
      });
      group.barrier();
      if (shared.ill != 0) return true;
      const float norm = static_cast<float>(sqrt(this->squares_of_state(false)));
      const float scale = norm > 0.0f ? 16.0f / norm : 1.0f;
      this->measure_keys(scale);
      group.barrier();
      group.new_part();
      this->plan_chunk(scale);
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
      group.by_warp(4, 8, [&](int warp) {
        this->fetch_rows_of_half(job.v, head / job.v_group, warp);
        prefetch_rows(job.k, head / job.k_group);
        prefetch_rows(job.q, head / job.q_group);
        prefetch_rows(job.v, head / job.v_group);
      });
      group.barrier();
      group.new_part();
      this->put_low_parts();
      group.by_warp(4, 8, [&](int warp) { this->put_rows_of_half(warp, 1, values(), 1); });
      this->fetch_state(true);
      group.barrier();
      weigh_values();
      group.barrier();
      group.new_part();
      const double u2 = this->squares_of_state(true);
      read_out();
      group.barrier();
      check_outputs(u2);
      group.barrier();
      if (shared.ill != 0) return true;
      if (t0 + n >= piece.end && !piece.last) return false;
      group.new_part();
      this->advance(true);
      group.new_part();
      this->fetch_state(false);
      this->advance(false);
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
  DirectBody<Group> body{{{{{{{group, shared}}}, job, piece, head, states}}}};
  const bool left_over = body.run();
  group.each([&](int thread, DirectRegisters&) {
    if (thread == 0) job.left_over[block] = left_over ? 1 : 0;
  });
}

}  // namespace kalmanet::cuda
