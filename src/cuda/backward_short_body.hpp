// The backward's first kernel of short memory (short_system.hpp): x, z and what follows from them
// alone, of 64 tokens of one head, all by coefficients of their keys. With h_j = v_j . do_t, so
// that dm_t = scale K^T (e o h), and y' = (lambda + Gram diag(e))^{-1} h
//
//   x = c_q q + K^T c     z = alpha scale K^T (e o y')     dq = (1 - alpha) dm + z
//   z . x = alpha scale sum_j e_j y'_j y_j     dalpha = scale sum_j e_j h_j (y_j - k_j . q)
//
// with no small difference of large numbers. x and z go to the workspace, as
// backward_solve_body.hpp leaves them.
#pragma once

#include "cuda/backward_first_body.hpp"
#include "cuda/chunk_body.hpp"
#include "cuda/short_system.hpp"

namespace kalmanet::cuda {

struct BackwardShortShared : ShortShared<2> {
  float query_weights[L::kTokens][L::kPitch];  // of keys, for dq
  float c_q[L::kTokens], z_x[L::kTokens];
  float norm2[2][2][L::kTokens];  // |x|^2, |z|^2, of either half of the dims
  double before;                  // gates of the piece's tokens before the block's
};

template <class Group, int kRows>
struct BackwardShort : ShortSystem<Group, kRows, 2> {
  using Base = ShortSystem<Group, kRows, 2>;
  using Base::group, Base::job, Base::piece, Base::head, Base::t0, Base::n;
  using L = ShortLayout;
  using Registers = typename Base::Registers;
  using typename Base::First, typename Base::Second;

  BackwardShortShared& shared;
  const BackwardJob& backward;
  int64_t block;  // of the piece and head

  KALMANET_KERNEL int64_t place(int t) const { return place_of(backward, piece, t0 + t, head); }
  KALMANET_KERNEL bool exact(int t) const {  // computed elsewhere
    return piece.first && t0 + t < piece.begin + BackwardFirstLayout::kTokens;
  }

  // Products of queries with keys and of output gradients with values; keys with keys.
  KALMANET_KERNEL void measure() {
    this->load_both(job.k, head / job.k_group, shared.keys);
    this->load_both(job.v, head / job.v_group, shared.values);
    this->load_tile(job.q, head / job.q_group, t0, shared.rows[0]);
    this->load_tile(backward.d_o, head, t0, shared.rows[1]);
    group.with_warp(7, [&] {
      group.each([&](int thread, Registers& r) {
        r.gates = 0.0;
        for (int64_t t = piece.begin + thread % 32; t < t0; t += 32) {
          r.gates += static_cast<double>(scalar_at<float>(job.gk, piece.row, t, head, 0.0));
        }
      });
      group.template sum_lanes<32>([](Registers& r) -> double& { return r.gates; });
      group.each([&](int thread, Registers& r) {
        if (thread % 32 == 0) shared.before = r.gates;
      });
    });
    this->load_scalars();
    this->clear(First());
    this->template multiply<false, true, false, false>(this->rows(0), this->all_keys(), First());
    this->clear(Second());
    this->template multiply<false, true, false, false>(this->rows(1), this->all_values(), Second());
    group.barrier();
    this->put_dots(0, First());
    this->put_dots(1, Second());
    this->measure_keys();
    group.barrier();
  }

  // What follows from a token's coefficients, and these for the products that are left.
  KALMANET_KERNEL void finish(int round) {
    group.each([&](int thread, Registers& r) {
      r.alpha = shared.alpha[Base::token_in(round, thread)];
      r.sum = r.sum2 = 0.0f;
      KALMANET_UNROLL
      for (int h = 0; h < kRows; ++h) {
        const float weight = static_cast<float>(job.scale) * r.weight[h];
        // (The second system is solved for v_j . do itself.)
        const float dm = weight * r.side[1][h], z = r.alpha * weight * r.y[1][h];
        r.sum += z * r.y[0][h];
        r.sum2 += dm * (r.y[0][h] - r.side[0][h]);
        r.y[0][h] = r.c[h];
        r.y[1][h] = z;
        r.side[0][h] = (1.0f - r.alpha) * dm + z;
      }
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum2; });
    group.each([&](int thread, Registers& r) {
      const int t = Base::token_in(round, thread);
      if (thread % 32 != 0) return;
      shared.c_q[t] = r.c_q;
      shared.z_x[t] = r.sum;
      if (t >= n) return;
      store_scalar<float>(backward.dalpha, piece.row, t0 + t, head, r.sum2);
      store_scalar<float>(backward.d_ridge, piece.row, t0 + t, head, -r.sum * r.f);
      const bool through_f = r.f != 0.0f && backward.bp_lambda;
      backward.w[place(t)] = through_f ? static_cast<double>(r.sum) *
                                             static_cast<double>(shared.ridge[t]) /
                                             static_cast<double>(r.f)
                                       : 0.0;
      const double since =
          exp(shared.before + shared.since[L::kTokens + t] - shared.since[L::kTokens - 1]);
      backward.since[2 * place(t)] = backward.since[2 * place(t) + 1] = since;
    });
    this->put_weights(round, shared.dots[0], [](Registers& r, int h) { return r.y[0][h]; });
    this->put_weights(round, shared.dots[1], [](Registers& r, int h) { return r.y[1][h]; });
    this->put_weights(round, shared.query_weights,
                      [](Registers& r, int h) { return r.side[0][h]; });
  }

  // s += sums of keys with weights. Exact: also what two bfloat16 leave of a weight, for x is small
  // where keys are, beside what it is made of.
  template <bool kExact>
  KALMANET_KERNEL void apply_keys(const float (&weights)[L::kTokens][L::kPitch]) {
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Parts keys = {shared.keys + half * L::kTile, nullptr};
      this->take_weights(weights, half, Second());
      this->template apply<false>(Second(), keys, First());
      if (!kExact) continue;
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; i += 2) {
            float &a = r.p[tile][i], &b = r.p[tile][i + 1];
            const uint32_t high = pack_bfloat16(a, b), low = low_bfloat16_parts(a, b, high);
            a = (a - low_bfloat16(high)) - low_bfloat16(low);
            b = (b - high_bfloat16(high)) - high_bfloat16(low);
          }
        }
      });
      this->template apply<false>(Second(), keys, First());
    }
  }
  // s into rows of the workspace.
  KALMANET_KERNEL void store_rows(void* rows) {
    each_pair([&](Registers&, int, int t, int column, float& a, float& b) {
      store_pair(static_cast<float*>(rows) + place(t) * L::kDim + column, a, b);
    });
  }
  // f(registers, h, token, column, two neighbours of s) for the tokens that there are.
  template <class F>
  KALMANET_KERNEL void each_pair(F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int t = Base::token_of(thread, 2 * h);
        if (t >= n) continue;
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          f(r, h, t, Base::column_of(thread, tile, 0), r.s[tile][2 * h], r.s[tile][2 * h + 1]);
        }
      }
    });
  }
  KALMANET_KERNEL void put_norms(int which) {
    group.each([](int, Registers& r) { r.norm2[0] = r.norm2[1] = 0.0f; });
    each_pair(
        [](Registers& r, int h, int, int, float& a, float& b) { r.norm2[h] += a * a + b * b; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.norm2[0]; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.norm2[1]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 4 != 0) return;
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        shared.norm2[which][thread / 128][Base::token_of(thread, 2 * h)] = r.norm2[h];
      }
    });
  }

  KALMANET_KERNEL void store_solutions() {
    this->clear(First());
    apply_keys<true>(shared.dots[0]);
    const uint16_t* const q = static_cast<const uint16_t*>(job.q.data) +
                              offset_of(job.q, piece.row, t0, head / job.q_group);
    each_pair([&](Registers&, int, int t, int column, float& a, float& b) {
      uint32_t both;
      memcpy(&both, q + t * job.q.stride[1] + column, 4);
      a += shared.c_q[t] * low_bfloat16(both);
      b += shared.c_q[t] * high_bfloat16(both);
    });
    put_norms(0);
    store_rows(backward.x);
    this->clear(First());
    apply_keys<false>(shared.dots[1]);
    put_norms(1);
    store_rows(backward.z);
  }
  KALMANET_KERNEL void store_query_gradients() {
    if (backward.dq.data == nullptr) return;
    this->clear(First());
    apply_keys<false>(shared.query_weights);
    if (backward.dq_parts != nullptr) return store_rows(backward.dq_parts);
    uint16_t* const base =
        static_cast<uint16_t*>(backward.dq.data) + offset_of(backward.dq, piece.row, t0, head);
    each_pair([&](Registers&, int, int t, int column, float& a, float& b) {
      store_word(base + t * backward.dq.stride[1] + column, pack_bfloat16(a, b));
    });
  }

  // As in backward_chunk_body.hpp: the gradients' kernels on matrix units read x and z along the
  // keys with an error that is relative to |x| and |z|. By the first warp.
  KALMANET_KERNEL void check_amplification() {
    group.with_warp(0, [&] {
      group.each([&](int lane, Registers& r) {
        r.sum = r.sum2 = 0.0f;
        for (int t = lane; t < n; t += 32) {
          if (exact(t)) continue;
          const float x2 = shared.norm2[0][0][t] + shared.norm2[0][1][t];
          const float z2 = shared.norm2[1][0][t] + shared.norm2[1][1][t];
          r.sum += x2 * z2;
          r.sum2 += shared.z_x[t] * shared.z_x[t];
        }
      });
      group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
      group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum2; });
      group.each([&](int lane, Registers& r) {
        constexpr auto kLimit =
            static_cast<float>(kLargestChunkAmplification * kLargestChunkAmplification * L::kDim);
        if (lane == 0 && !(r.sum <= kLimit * r.sum2)) job.left_over[block] = kSolved;
      });
    });
  }

  KALMANET_KERNEL void run() {
    measure();
    KALMANET_LOOP
    for (int round = 0; round * 8 < n; ++round) {
      this->load_system(round);
      this->solve();
      finish(round);
    }
    group.barrier();
    store_solutions();
    store_query_gradients();
    group.barrier();
    check_amplification();
  }
};

// The work of block `block` of `blocks`, as run_short's.
template <int kRows, class Group>
KALMANET_KERNEL void run_backward_short(Group& group, BackwardShortShared& shared,
                                        const BackwardJob& backward, int64_t block,
                                        int64_t blocks) {
  const GkaJob& job = backward.in;
  each_short_block<kRows>(
      job, block, blocks, kBackwardTokens / ShortPlan::kTokens,
      [&](const Piece& piece, int64_t piece_index, int64_t head, int64_t t0, int window) {
        BackwardShort<Group, kRows> body{{{{group}, shared, job, piece, head, t0, window}},
                                         shared,
                                         backward,
                                         piece_index * job.H + head};
        body.run();
        group.barrier();
      });
}

}  // namespace kalmanet::cuda
