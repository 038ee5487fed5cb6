// The forward's kernel of short memory (short_system.hpp): the outputs of 64 tokens of one head,
//
//   o_t = scale sum_j e_j v_j (alpha y_j + (1 - alpha) k_j . q_t) ,
//
// and after a sequence's last ones its states.
#pragma once

#include "cuda/short_system.hpp"

namespace kalmanet::cuda {

template <class Group, int kRows>
struct ShortBody : ShortSystem<Group, kRows, 1> {
  using Base = ShortSystem<Group, kRows, 1>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::t0, Base::n;
  using L = ShortLayout;
  using Registers = typename Base::Registers;
  using typename Base::First, typename Base::Second;

  // What a token's values count in its output, in the place of its products.
  KALMANET_KERNEL void weigh_values(int round) {
    group.each([&](int thread, Registers& r) {
      r.sum = shared.alpha[Base::token_in(round, thread)];
      r.sum2 = static_cast<float>(job.scale);
    });
    this->put_weights(round, shared.dots[0], [](Registers& r, int h) {
      return r.sum2 * r.weight[h] * (r.side[0][h] + r.sum * (r.y[0][h] - r.side[0][h]));
    });
  }

  KALMANET_KERNEL void read_out() {
    this->clear(First());
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {
      this->take_weights(shared.dots[0], half, Second());
      this->template apply<false>(Second(), {shared.values + half * L::kTile, nullptr}, First());
    }
    uint16_t* const base =
        static_cast<uint16_t*>(job.o.data) + offset_of(job.o, piece.row, t0, head);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int t = Base::token_of(thread, 2 * h);
        if (t >= n) continue;
        uint16_t* const to = base + t * job.o.stride[1] + Base::column_of(thread, 0, 0);
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          store_word(to + tile * 8, pack_bfloat16(r.s[tile][2 * h], r.s[tile][2 * h + 1]));
        }
      }
    });
  }

  // H or U after the block's last token: 8 x 8 elements a thread, whose rows and columns are 16
  // apart.
  KALMANET_KERNEL void store_state(bool u, const StateView<float>& to) {
    if (to.data == nullptr) return;
    const uint16_t* const right = u ? shared.values : shared.keys;
    group.each([&](int thread, Registers&) {
      const int last = L::kTokens + n - 1;
      float sum[8][8] = {};
      KALMANET_LOOP
      for (int j = 0; j <= last; ++j) {
        const float fade = static_cast<float>(shared.since[last] - shared.since[j]);
        const float weight = shared.beta2[j] * expf(fade);
        float a[8], b[8];
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) {
          a[i] = weight * low_bfloat16(shared.keys[Blocks<128>::at(j, thread / 16 + 16 * i)]);
          b[i] = low_bfloat16(right[Blocks<128>::at(j, thread % 16 + 16 * i)]);
        }
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) {
          KALMANET_UNROLL
          for (int e = 0; e < 8; ++e) sum[i][e] += a[i] * b[e];
        }
      }
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) {
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) {
          to.data[to.at(thread / 16 + 16 * i, thread % 16 + 16 * e)] = sum[i][e];
        }
      }
    });
  }

  KALMANET_KERNEL void run() {
    this->load_both(job.k, head / job.k_group, shared.keys);
    this->load_tile(job.q, head / job.q_group, t0, shared.rows[0]);
    this->load_scalars();
    this->measure_keys();
    this->clear(Second());
    this->template multiply<false, true, false, false>(this->rows(0), this->all_keys(), Second());
    group.barrier();
    this->put_dots(0, Second());
    group.barrier();
    KALMANET_LOOP
    for (int round = 0; round < L::kTokens / 8; ++round) {
      if (round * 8 >= n) break;
      this->load_system(round);
      this->solve();
      weigh_values(round);
    }
    group.barrier();
    this->load_both(job.v, head / job.v_group, shared.values);
    group.barrier();
    read_out();
    if (!piece.last || t0 + n < piece.end) return;
    store_state(false, state_view<float>(job.h_final, piece.sequence, head));
    store_state(true, state_view<float>(job.u_final, piece.sequence, head));
  }
};

// The work of block `block` of `blocks`: every so-manieth 64 tokens whose windows take kRows rows a
// lane.
template <int kRows, class Group>
KALMANET_KERNEL void run_short(Group& group, ShortShared<1>& shared, const GkaJob& job,
                               int64_t block, int64_t blocks) {
  each_short_block<kRows>(
      job, block, blocks, ShortPlan::kBlocks,
      [&](const Piece& piece, int64_t, int64_t head, int64_t t0, int window) {
        ShortBody<Group, kRows> body{{{{group}, shared, job, piece, head, t0, window}}};
        body.run();
        group.barrier();
      });
}

}  // namespace kalmanet::cuda
