// The backward's first kernel by the direct solver on matrix units: x, z and what follows from them
// alone, of one head of one piece. K = V = 128, bfloat16 tensors. A chunk's factors
// (backward_direct_kernel.hpp) serve both right-hand sides:
//
//   x_t = (H_t + lambda_t I)^{-1} q_t     z_t, the same of alpha_t dm_t , dm_t = scale U_t do_t
//
// q is exact, dm is not: its first products are taken of high and low parts, for an error of a
// right-hand side comes out as large in all directions that no key has touched, where z is small.
#pragma once

#include "cuda/backward_direct_state.hpp"
#include "cuda/tile.hpp"

namespace kalmanet::cuda::direct32 {

// Products of z's that are taken of high and low parts: a residual is smaller by the iteration's
// rate each time.
inline constexpr int kSplitProducts = 2;

template <class Group>
struct BackwardDirect : BackwardDirectState<Group> {
  using Base = BackwardDirectState<Group>;
  using Base::group, Base::shared, Base::backward, Base::before, Base::job, Base::piece, Base::head,
      Base::t0, Base::n, Base::k_power, Base::v_power, Base::q_power, Base::store_rows,
      Base::load_rows;
  using L = DirectLayout;
  using Registers = BackwardDirectRegisters;

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

  // alpha_t dm_t into s, scaled to a length of at most 1, and as right factor.
  KALMANET_KERNEL void take_sides() {
    load_rows(backward.z, [](Registers& r) -> float (&)[4][4] { return r.s; });
    this->dot_columns(
        0, [](DirectRegisters& r, int, int tile, int i) { return r.s[tile][i] * r.s[tile][i]; });
    group.barrier();
    group.each([&](int t, Registers&) {
      if (t >= L::kTokens) return;
      const double length = fabs(static_cast<double>(shared.alpha[t])) * sqrt(Base::dot(0, t));
      int exponent = 0;
      if (length > 0.0 && length < INFINITY) frexp(length, &exponent);
      exponent = exponent < -100 ? -100 : (exponent > 100 ? 100 : exponent);
      shared.side_scale[t] = ldexpf(1.0f, -exponent);
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->token_of(thread, tile, i);
          r.s[tile][i] *= shared.alpha[t] * shared.side_scale[t];
        }
      }
    });
    put_side(true);
  }
  // s as right factor; its low parts where the keys' rows were, which nobody reads any more.
  KALMANET_KERNEL void put_side(bool split) {
    this->put_right(shared.right, split ? shared.keys : nullptr,
                    [](DirectRegisters& r) -> float (&)[4][4] { return r.s; });
  }

  // g[0] += Z^T low, the high parts of Z alone.
  KALMANET_KERNEL void add_tokens(const Left* low) {
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(this->dims, k * 16)) break;
      group.each([&](int thread, Registers& r) {
        const int m = thread / 128, n_tile = thread / 32 % 4, lane = thread % 32;
        const Left left = shared.gains[0][(m * 8 + k) * 32 + lane];
        const Left other = low[(n_tile / 2 * 8 + k) * 32 + lane];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.a[0][i] = left.part[i];
        r.b[0][0][0] = n_tile % 2 == 0 ? other.part[0] : other.part[1];
        r.b[0][0][1] = n_tile % 2 == 0 ? other.part[2] : other.part[3];
      });
      const auto g = [](Registers& r) -> float (&)[4] { return r.g[0]; };
      group.multiply_add_float16(
          g, g, [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; },
          [](Registers& r) -> uint32_t (&)[2] { return r.b[0][0]; });
    }
  }
  // y += P low, the high parts of P alone.
  KALMANET_KERNEL void add_inverse(const Left* low) {
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(this->dims, k * 16)) break;
      group.each([&](int thread, Registers& r) {
        this->load_right(low, thread, k, r.b[0]);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.a[0][i] = r.p[k][i];
      });
      this->add_tiles(0, 0);
    }
  }

  // x <- the solution of what s is: the queries, or the other sides.
  KALMANET_KERNEL void solve(bool adjoint) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.x[tile][i] = 0;
      }
    });
    KALMANET_LOOP
    for (int k = 0; k < shared.steps; ++k) {
      const Left* const right = k == 0 && !adjoint ? shared.queries : shared.right;
      const bool split = adjoint && k < kSplitProducts;
      group.barrier();
      this->template multiply_tokens<true, false>(shared.gains[0], shared.gains[1], right, nullptr);
      if (split) add_tokens(shared.keys);
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (this->tile_row(thread, i) > this->tile_column(thread, i)) r.g[0][i] = 0;
          r.g[0][i] = -r.g[0][i];
        }
      });
      this->put_middle();
      this->template multiply_inverse<true>(right);
      if (split) add_inverse(shared.keys);
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
      if (k + 1 < shared.steps) put_side(adjoint && k + 1 < kSplitProducts);
    }
  }

  // x into the workspace.
  KALMANET_KERNEL void keep_x() {
    const float per_power = 1.0f / q_power;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.x[tile][i] *= shared.solution_scale[this->token_of(thread, tile, i)] * per_power;
        }
      }
    });
    store_rows(backward.x, [](Registers& r, int tile, int i) { return r.x[tile][i]; });
  }

  // With z in x, to its scale: dq, dalpha, d_ridge, and what the gradients' kernels are told.
  KALMANET_KERNEL void finish() {
    const float per_power = 1.0f / q_power;
    take_queries();
    load_rows(backward.x, [](Registers& r) -> float (&)[4][4] { return r.other; });
    load_rows(backward.z, [](Registers& r) -> float (&)[4][4] { return r.y; });
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->token_of(thread, tile, i);
          r.x[tile][i] *= shared.solution_scale[t] / shared.side_scale[t];
        }
      }
    });
    store_rows(backward.z, [](Registers& r, int tile, int i) { return r.x[tile][i]; });
    group.barrier();  // dots was read
    dot(0, [](Registers& r, int tile, int i) { return r.x[tile][i] * r.other[tile][i]; });
    dot(1, [per_power](Registers& r, int tile, int i) {
      return r.y[tile][i] * (r.other[tile][i] - per_power * r.s[tile][i]);
    });
    group.barrier();
    group.each([&](int t, Registers&) {
      if (t >= L::kTokens) return;
      const double z_x = Base::dot(0, t), a = shared.ridge[t];
      shared.z_x[t] = static_cast<float>(z_x);
      if (t >= n) return;
      const bool zero = shared.solution_scale[t] == 0.0f;
      const double lambda =
          zero ? 0.0
               : static_cast<double>(shared.mu * (1.0f + shared.delta[t])) * shared.start[0][t];
      const int64_t at = place_of(backward, piece, t0 + t, head);
      backward.since[2 * at] = before[0] * shared.start[0][t];
      backward.since[2 * at + 1] = before[1] * shared.start[1][t];
      if (this->exact(t)) return;
      store_scalar<float>(backward.dalpha, piece.row, t0 + t, head, Base::dot(1, t));
      store_scalar<float>(backward.d_ridge, piece.row, t0 + t, head, -z_x * lambda / a);
      backward.w[at] = !zero && backward.bp_lambda ? z_x * a * a / lambda : 0.0;
    });
    group.barrier();
    dot(0, [](Registers& r, int tile, int i) { return r.x[tile][i] * r.x[tile][i]; });
    dot(1, [](Registers& r, int tile, int i) { return r.other[tile][i] * r.other[tile][i]; });
    store_query_gradients();
    group.barrier();
    check_amplification();
  }
  template <class F>
  KALMANET_KERNEL void dot(int which, F&& term) {
    this->dot_columns(which, [&term](DirectRegisters& r, int, int tile, int i) {
      return term(static_cast<Registers&>(r), tile, i);
    });
  }

  // As in backward_chunk_body.hpp: by the first warp, a lane a token.
  KALMANET_KERNEL void check_amplification() {
    group.with_warp(0, [&] {
      group.each([&](int t, Registers& r) {
        const bool counts = t < n && !this->exact(t);
        r.scan[0] = counts ? Base::dot(0, t) * Base::dot(1, t) : 0.0;
        r.scan[1] = counts ? static_cast<double>(shared.z_x[t]) * shared.z_x[t] : 0.0;
      });
      group.template sum_lanes<32>([](Registers& r) -> double& { return r.scan[0]; });
      group.template sum_lanes<32>([](Registers& r) -> double& { return r.scan[1]; });
      group.each([&](int t, Registers& r) {
        constexpr double kLimit = kLargestChunkAmplification * kLargestChunkAmplification;
        if (t == 0 && !(r.scan[0] <= kLimit * key_dims<Group>(job) * r.scan[1])) shared.ill = 1;
      });
    });
  }

  // dq = (1 - alpha) dm + z.
  KALMANET_KERNEL void store_query_gradients() {
    if (backward.dq.data == nullptr) return;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float alpha = shared.alpha[this->token_of(thread, tile, i)];
          r.y[tile][i] = (1.0f - alpha) * r.y[tile][i] + r.x[tile][i];
        }
      }
    });
    if (backward.dq_parts != nullptr) {
      store_rows(backward.dq_parts, [](Registers& r, int tile, int i) { return r.y[tile][i]; });
      return;
    }
    uint16_t* const base =
        static_cast<uint16_t*>(backward.dq.data) + offset_of(backward.dq, piece.row, t0, head);
    KALMANET_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      group.each([&](int, Registers& r) {
        r.t[0] = pack_numbers<Group>(backward.dq, r.y[tile][0], r.y[tile][1]);
        r.t[1] = pack_numbers<Group>(backward.dq, r.y[tile][2], r.y[tile][3]);
      });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
      group.each([&](int thread, Registers& r) {
        const int token = tile * 8 + thread % 32 / 4;
        const int dim = thread / 32 * 16 + thread % 4 * 2;
        if (token >= n || this->exact(token)) return;
        uint16_t* const to = base + token * backward.dq.stride[1] + dim;
        if (has_column<Group>(backward.dq, dim)) store_word(to, r.t[0]);
        if (has_column<Group>(backward.dq, dim + 8)) store_word(to + 8, r.t[1]);
      });
    }
  }

  // Returns whether the token kernel must do the piece instead.
  KALMANET_KERNEL bool run() {
    group.each([&](int thread, Registers&) {
      if (thread == 0) shared.ill = 0;
    });
    this->dims = most_dims<Group>(job);
    this->load_u();
    this->load_state(false);
    group.barrier();
    for (t0 = piece.begin; t0 < piece.end; t0 += n) {
      head = opaque(head);
      piece.row = opaque(piece.row);
      group.new_part();
      this->fetch_tile(job.k, head / job.k_group, 0);
      this->fetch_tile(job.v, head / job.v_group, 1);
      this->fetch_tile(job.q, head / job.q_group, 2);
      group.each(
          [&](int thread, Registers& r) { this->take_rows(backward.d_o, head, thread, r.raw_do); });
      this->load_scalars();
      this->stage_tile(0);
      this->stage_tile(1);
      this->stage_tile(2);
      group.barrier();
      group.new_part();
      n = shared.tokens;
      k_power = this->put_tile(0, 1, shared.keys, shared.columns);
      v_power = this->put_tile(1, 1, shared.right, shared.values);
      q_power = this->put_tile(2, 2, shared.queries, nullptr);
      const float do_power = this->put_output_gradients();
      if (!(k_power > 0.0f && v_power > 0.0f && q_power > 0.0f && do_power > 0.0f) ||
          shared.ill != 0) {
        return true;
      }
      this->gradient_of_mix(do_power);
      group.new_part();
      this->fetch_state(false);
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
      KALMANET_LOOP  // one copy of the code
          for (int side = 0; side < 2; ++side) {
        if (side == 0) {
          take_queries();
        } else {
          take_sides();
        }
        solve(side == 1);
        if (side == 0) keep_x();
        group.barrier();
        group.new_part();
      }
      finish();
      group.barrier();
      if (shared.ill != 0) return true;
      if (t0 + n >= piece.end) return false;
      group.new_part();
      before[0] *= static_cast<double>(shared.start[0][n - 1]);
      before[1] *= static_cast<double>(shared.start[1][n - 1]);
      KALMANET_LOOP
      for (int which = 0; which < 2; ++which) this->advance_state(which == 1);
      group.barrier();
    }
    return false;
  }
};

// The work of block (piece_index, head).
template <class Group>
KALMANET_KERNEL void run_backward_direct(Group& group, BackwardDirectShared& shared,
                                         const BackwardJob& backward, int64_t piece_index,
                                         int64_t head) {
  if (is_short(backward.in, piece_index, head)) return;
  const GkaJob& job = backward.in;
  const Piece piece = piece_of(job, piece_index);
  const int64_t block = piece_index * job.H + head;
  float* const states =
      static_cast<float*>(job.chunk_scratch) + block * DirectState<Group>::kStateFloats;
#ifdef __CUDACC__
  __builtin_assume(__isGlobal(states));
#endif
  BackwardDirect<Group> body{{{{{{group, shared}}, job, piece, head, states}}, shared, backward}};
  const bool left_over = body.run();
  group.each([&](int thread, BackwardDirectRegisters&) {
    if (thread == 0) job.left_over[block] = left_over ? kLeftOver : 0;
  });
}

}  // namespace kalmanet::cuda::direct32
