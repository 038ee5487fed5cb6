// The body of the direct kernel on Hopper: a piece's outputs.
#pragma once

#include "cuda/direct_body.hpp"
#include "cuda/hopper_direct_solve.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperBody : HopperSolve<Group> {
  using Base = HopperSolve<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::t0, Base::n,
      Base::sums, Base::token_sums;
  using L = HopperLayout;
  using Registers = HopperRegisters;

  // f <- e^{G_t - G_j} m_t . k_j of the chunk's own pairs as left factor, in the units of
  // r.largest.
  KALMANET_KERNEL void weigh_values() {
    begin_products(group);
    this->multiply_transposed(shared.gains[1], shared.keys, false);
    this->multiply_transposed(shared.gains[0], shared.keys, true);
    this->finish_token_sums();
    this->find_largest(true);
    group.each([&](int thread, Registers& r) {
      const float per_unit = divide(1.0f, r.largest);
      float start[2];
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        start[half] = shared.start[1][Base::token_of(thread, half)] * per_unit;
      }
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {  // of 8 values, two the lane's
        const int j = sum_column(thread, 2 * k);
        float weight[2];
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          weight[c] = shared.value_weight[j + c] * shared.unit[0][j + c] * shared.unit[1][j + c];
        }
        KALMANET_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int t = Base::token_of(thread, half), at = 2 * k + half;
          float v[2];
          KALMANET_UNROLL
          for (int c = 0; c < 2; ++c) {
            v[c] = j + c <= t ? r.s[2 * at + c] * (weight[c] * start[half]) : 0.0f;
          }
          r.f[0][at] = split_float16(v[0], v[1], r.f[1][at]);
        }
      }
    });
  }

  // Rows 64 m .. of U, times `power`, float16 in two parts: the warpgroup's half of the columns.
  KALMANET_KERNEL void put_values_state(int m, float power) {
    group.each([&](int thread, Registers&) {
      const int other = m * 128 + thread % 128, first = thread / 128 * 8;
      const float* const from = this->state_at(true, other);  // who has these rows in scratch
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        float v[4];
        this->load_stored(from, true, other, first + tile, v);
        KALMANET_UNROLL
        for (int half = 0; half < 2; ++half) {
          uint32_t low;
          Base::half_word(shared.reading.state_half[0], thread, 2 * tile + half) =
              split_float16(v[2 * half] * power, v[2 * half + 1] * power, low);
          Base::half_word(shared.reading.state_half[1], thread, 2 * tile + half) = low;
        }
      }
    });
  }

  // y <- o of the chunk in the units of r.largest and query_scale, from m, U and V. The first half
  // of U is there.
  KALMANET_KERNEL void read_out(float power) {
    KALMANET_LOOP
    for (int m = 0; m < (this->is_half() ? 1 : 2); ++m) {
      if (m == 1) {
        group.barrier();
        put_values_state(1, power);
        publish(group);
        group.barrier();
      } else {
        group.each([](int, Registers& r) {
          KALMANET_UNROLL
          for (int e = 0; e < 32; ++e) r.y[e] = 0;
        });
      }
      begin_products(group);
      KALMANET_UNROLL
      for (int part = 2; part >= 0; --part) {  // high low, low high, high high
        multiply_shared<4, true>(
            group, sums, [&](int) { return Cores{shared.gains[part == 1 ? 1 : 0] + 8 * m, 16}; },
            [&](int thread) {
              return Cores{shared.reading.state_half[part == 2 ? 1 : 0] + thread / 128 * 8, 16};
            });
      }
      this->finish_sums();
    }
    group.each([&](int thread, Registers& r) {
      const float unit = divide(1.0f, power * r.largest);
      float by[2];
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        by[half] = shared.start[1][Base::token_of(thread, half)] * unit;
      }
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) r.y[e] *= by[e / 2 % 2];
    });
    begin_products(group);
    KALMANET_UNROLL
    for (int part = 1; part >= 0; --part) {
      KALMANET_UNROLL
      for (int k = 0; k < 4; ++k) {
        multiply_wide<64, true>(
            group, sums, [part, k](Registers& r) { return r.f[part] + 4 * k; },
            [&](int thread) {
              return Cores{shared.reading.values + 2 * k * 16 + thread / 128 * 8, 16};
            });
      }
    }
    this->finish_sums();
  }

  // How many of the chunk's first tokens are computed elsewhere.
  KALMANET_KERNEL int exact_tokens() const {
    if (!piece.first || job.h0.data != nullptr) return 0;
    const int64_t count = piece.begin + kExactTokens - t0;
    return count > 0 ? static_cast<int>(count) : 0;
  }

  // y, rounded, to where o is, through the gains' place for whole rows; |o|^2.
  KALMANET_KERNEL void store_outputs() {
    group.each([&](int thread, Registers& r) {
      float by[2];
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int t = Base::token_of(thread, half);
        by[half] = shared.output_scale[t] * shared.unit[2][t] * r.largest;
        r.dot[half] = 0;
      }
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        const uint32_t o =
            pack_numbers<Group>(job.o, r.y[2 * j] * by[j % 2], r.y[2 * j + 1] * by[j % 2]);
        const float first = low_number<Group>(job.o, o), second = high_number<Group>(job.o, o);
        r.dot[j % 2] += first * first;
        r.dot[j % 2] += second * second;
        Base::half_word(shared.gains[0], thread, j) = o;
      }
    });
    this->share_dots(
        [&](int thread, int t, float dot) { shared.measured.product[thread / 128][t] = dot; });
    group.barrier_warp();
    uint16_t* const base =
        static_cast<uint16_t*>(job.o.data) + offset_of(job.o, piece.row, t0, head);
    const int first = exact_tokens(), last = n;
    group.each([&](int thread, Registers&) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = thread % 128 / 32 * 16 + i / 2 * 8 + thread % 8;
        const int column = thread / 128 * 8 + i % 2 * 4 + thread % 32 / 8;  // of 16 of 8 dims
        uint32_t v[4];
        load16(&shared.gains[0][token / 8 * 16 + column].word[token % 8 * 4], v);
        if (token >= first && token < last && has_column<Group>(job.o, column * 8)) {
          store16(base + token * job.o.stride[1] + column * 8, v);
        }
      }
    });
  }
  // Whether U magnifies more than these products bear.
  KALMANET_KERNEL void check_amplification(float u2) {
    const int first = exact_tokens(), last = n;
    group.by_warp(0, 2, [&](int) {
      group.each([&](int t, Registers&) {
        if (t < first || t >= last) return;
        // |U_t| is at most |U_0| and what the chunk's values add; the former says enough where it
        // is not small, and where it is these are a sequence's first tokens.
        const float weight = shared.alpha[t] * shared.unit[2][t] * static_cast<float>(job.scale);
        const float x2 = (shared.x2[0][t] + shared.x2[1][t]) * u2 *
                         (1.0f / static_cast<float>(key_dims<Group>(job)));
        const float limit = direct_amplification<Group>(job);
        const float o2 = shared.measured.product[0][t] + shared.measured.product[1][t];
        if (!(fabsf(weight) * root(x2) <= limit * root(o2))) {
          shared.ill = 1;
        }
      });
    });
  }

  // Tokens [t0, t0 + n), whose H is in h. Returns whether the token kernel must do the piece
  // instead.
  KALMANET_KERNEL bool chunk() {
    this->fetch_rows(job.k, head / job.k_group, 0);
    this->load_scalars();
    this->put_rows(job.k, 0, 1, shared.keys, shared.unit[0]);
    const float norm = root(this->squares_of_state(false));
    const float scale = norm > 0.0f ? divide(16.0f, norm) : 1.0f;
    this->put_state(scale);
    publish(group);
    group.barrier();
    group.new_part();
    this->measure_keys(scale);
    group.barrier();
    this->plan_chunk(this->squares_of_state(false), [&](int t) {
      const HopperMeasured& measured = shared.measured;
      return measured.product[0][t] + measured.product[1][t] + measured.gram[t];
    });
    group.barrier();
    if (shared.ill != 0) return true;
    group.new_part();
    this->plan_tokens(6);
    if (shared.steps > 0) {
      this->factor();
      group.new_part();
      this->solve();
      group.barrier();  // (P, Z and the iterate are done with)
    } else {
      this->fetch_rows(job.q, head / job.q_group, 0);
      group.barrier();  // (a query that is not finite makes the chunk ill: all have looked by now)
      this->load_queries();
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int e = 0; e < 32; ++e) r.y[e] = 0;
      });
      group.barrier();
    }
    group.new_part();
    this->prefetch_chunk(t0 + n);
    this->fetch_rows(job.k, head / job.k_group, 0);
    this->fetch_rows(job.v, head / job.v_group, 4);
    this->put_solution();
    this->put_rows(job.k, 0, 1, shared.keys, shared.unit[0]);
    const float u2 = this->squares_of_state(true);
    const float power = u2 > 0.0f ? divide(256.0f, root(u2)) : 1.0f;
    put_values_state(0, power);
    this->put_rows(job.v, 4, 1, shared.reading.values, shared.unit[1]);
    publish(group);
    group.barrier();
    group.new_part();
    weigh_values();
    read_out(power);
    group.barrier();  // (o takes the place of m)
    group.new_part();
    store_outputs();
    group.barrier();
    check_amplification(u2);
    return false;
  }
  // Whether the states after this chunk are needed.
  KALMANET_KERNEL bool advances() const { return t0 + n < piece.end || piece.last; }

  KALMANET_KERNEL bool run() {
    KALMANET_LOOP  // one copy of the code
        for (int which = 1; which >= 0; --which) this->load_state(which == 1);
    this->fetch_state(false);
    group.barrier();
    KALMANET_LOOP
    while (t0 < piece.end) {
      group.new_part();
      if (chunk()) return true;
      group.barrier();                        // (before the squares of U change)
      const bool done = t0 + n >= piece.end;  // (before the first thread goes on to the next chunk)
      if (!advances()) return shared.ill != 0;
      group.new_part();
      KALMANET_LOOP  // one copy of the code
          for (int which = 1; which >= 0; --which) this->advance(which == 1);
      group.barrier();
      if (shared.ill != 0) return true;
      if (done) break;
      group.each([&](int thread, Registers&) {
        if (thread == 0) shared.t0 += n;
      });
      group.barrier();
    }
    this->store_state(false, state_view<float>(job.h_final, piece.sequence, head));
    this->store_state(true, state_view<float>(job.u_final, piece.sequence, head));
    return false;
  }
};

// The work of block (piece_index, head).
template <class Group>
KALMANET_KERNEL void run_hopper_direct(Group& group, HopperShared& shared, const GkaJob& job,
                                       int64_t piece_index, int64_t head) {
  if (is_short(job, piece_index, head)) return;
  const int64_t block = piece_index * job.H + head;
  group.each([&](int thread, HopperRegisters&) {
    if (thread != 0) return;
    shared.piece = piece_of(job, piece_index);
    shared.head = head;
    shared.t0 = shared.piece.begin;
    shared.states =
        static_cast<float*>(job.chunk_scratch) + block * DirectState<Group>::kStateFloats;
    shared.zero = 0.0f;
    shared.ill = 0;
  });
  group.barrier();
  HopperBody<Group> body{{{{{{{{{group, shared}}, job}}}}}}};
  const bool left_over = body.run();
  group.each([&](int thread, HopperRegisters&) {
    if (thread == 0) job.left_over[block] = left_over ? kLeftOver : 0;
  });
}

}  // namespace kalmanet::cuda
