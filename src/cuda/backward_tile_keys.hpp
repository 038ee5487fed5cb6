// The backward's last kernels on matrix units, first part: what goes through H of the gradients of
// keys, and those of its gates, of one head of one piece, in chunks of 64 tokens, last chunk first.
// The formulas are those of the twin for any shape (backward_gradient_kernel.hpp), with S = D +
// D^T.
//
// Tokens are rows throughout (tile.hpp): the sums of a product of tokens with tokens are, where
// they lie, a factor of the next. Kept in registers from chunk to chunk is -S, to which all that
// tokens add is positive; H before each chunk waits in scratch memory. The keys' gradients take z's
// place in the workspace, where backward_tile_values.hpp adds what goes through U: neither's code
// alone is more than an instruction cache holds.
#pragma once

#include "cuda/backward_tile_gates.hpp"

namespace kalmanet::cuda {

template <class Group>
struct TileKeys : TileGates<Group> {
  using Base = TileGates<Group>;
  using Base::group, Base::shared, Base::backward, Base::job, Base::piece, Base::head, Base::t0,
      Base::n, Base::keys, Base::x, Base::z, Base::m, Base::each_sum;
  using L = TileLayout;
  using Registers = TileRegisters;
  using typename Base::Dk, typename Base::Dv, typename Base::First, typename Base::Second,
      typename Base::Own, typename Base::Start;
  static constexpr bool kLows = Base::kLows;

  // H before every chunk, in scratch.
  KALMANET_KERNEL void advance(int chunks) {
    this->set_chunk(0);
    this->fetch(job.k, head / job.k_group, 0);
    KALMANET_LOOP
    for (int i = 0; i + 1 < chunks; ++i) {
      this->set_chunk(i);
      group.barrier();  // the chunk before was read
      this->put(0, keys());
      this->put_weighted_keys(this->now().to_end, m());
      this->scale_state(this->now().total[0]);
      group.barrier();
      this->set_chunk(i + 1);
      this->fetch(job.k, head / job.k_group, 0);  // under way meanwhile
      this->template add_outer<true, kLows>(m(), keys(), Own());
      this->store_state(this->chunk_state(i + 1));
    }
  }

  // What is there of other chunks from the beginning.
  KALMANET_KERNEL void start_chunk(int chunk) {
    if (this->cuts == nullptr) return;
    this->find_start(chunk, false);
    this->load_key_scalars(0, 0.0f);
  }

  // A chunk's tiles. Begins and ends with a barrier.
  KALMANET_KERNEL void load_chunk() {
    this->fetch_solutions(backward.x, [](Registers& r) -> float (&)[4][8] { return r.raw_x; });
    this->fetch_solutions(backward.z, [](Registers& r) -> float (&)[4][8] { return r.raw_z; });
    this->fetch(job.k, head / job.k_group, 0);
    group.barrier();
    this->put_state();
    this->put(0, keys());
    this->put_weighted_keys(this->now().key_weight, m());
    this->put_solutions(this->now().half, x(),
                        [](Registers& r) -> float (&)[4][8] { return r.raw_x; });
    this->put_solutions(this->now().half, z(),
                        [](Registers& r) -> float (&)[4][8] { return r.raw_z; });
    this->prefetch_solutions(backward.x);
    this->prefetch_solutions(backward.z);
    this->prefetch_tensor(job.k, head / job.k_group);
    group.barrier();
  }

  // All that reads a state. dk begins.
  KALMANET_KERNEL void multiply_states(int chunk) {
    this->load_state(this->chunk_state(chunk), Start());  // under way meanwhile
    this->clear(Dk());
    this->template multiply<false, true, kLows, true>(keys(), this->state(), Dk());
    each_sum(
        [&](Registers& r, int, int tile, int i, int t) { r.dk[tile][i] *= -this->now().end[t]; });
    this->template measure_with<true>(kTileCarry, keys(), Dk());
    group.each([](int, Registers& r) { r.sum[0] = r.sum[1] = 0.0f; });
    const float total = this->now().total[0], through_f = 2.0f * this->now().through_f;
    this->put_start([&](Registers& r, float (&s)[4], const float (&h)[4]) {
      r.sum[0] += (s[0] * h[0] + s[1] * h[1]) + (s[2] * h[2] + s[3] * h[3]);
      r.sum[1] += (h[0] * h[0] + h[1] * h[1]) + (h[2] * h[2] + h[3] * h[3]);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) s[i] = total * s[i] + through_f * h[i];
    });
    this->put_sum(0);
    this->put_sum(1);
    this->clear(First());
    this->template multiply<false, true, kLows, true>(keys(), this->state(), First());
    this->template measure_with<true>(kTileStart, keys(), First());
    each_sum([&](Registers& r, int, int tile, int i, int t) {
      r.dk[tile][i] += this->now().key_factor[t] * r.s[tile][i];
    });
    this->clear(First());
    this->template multiply<false, true, true, true>(x(), this->state(), First());
    this->template measure_with<false>(kTileAdjoint, z(), First());
    this->template add_outer<true, true>(z(), x(), Own());
    this->template add_outer<true, true>(x(), z(), Own());
    this->template add_outer<true, kLows>(m(), keys(), Own());
    group.barrier();
  }

  // What tokens do to each other: dk, and the actions of token t on token i, into dv.
  KALMANET_KERNEL void multiply_tokens() {
    this->clear(First());
    this->template multiply<false, false, kLows, true>(keys(), x(), First());
    this->clear(Second());
    this->template multiply<false, false, kLows, true>(keys(), z(), Second());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const bool later = Base::pair_of(thread, tile, i) >= t;
      const float weight = later ? -this->now().inverse[t] * this->now().beta[t] : 0.0f;
      r.s[tile][i] *= weight;
      r.dv[tile][i] = r.s[tile][i] * (this->now().beta[t] * r.p[tile][i]);
      r.p[tile][i] *= weight;
    });
    this->template apply<true>(First(), z(), Dk());
    this->template apply<true>(Second(), x(), Dk());
    this->clear(First());
    this->template multiply<false, false, kLows, kLows>(keys(), keys(), First());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const int other = Base::pair_of(thread, tile, i);
      const float beta = this->now().beta[other], k_k = beta * this->now().beta[t] * r.s[tile][i];
      // e^{|G_i - G_t|} r of the later one. (A product of one that may be tiny and one that may be
      // huge.)
      const float later = other >= t ? this->now().r_start[other] * this->now().inverse[t]
                                     : this->now().r_start[t] * this->now().inverse[other];
      r.s[tile][i] = -2.0f * later * beta * k_k;
      r.p[tile][i] = this->now().inverse[other] * (k_k * k_k);
    });
    this->template apply<kLows>(First(), keys(), Dk());
    this->template sum_along<false>(Second(), First());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const int other = Base::pair_of(thread, tile, i);
      const float beta = this->now().beta[t];
      const float k_h_k = r.s[tile][i] + beta * beta * this->dot(kTileStart, t);  // e^{-G_i} of it
      const float decay = this->now().start[other] * this->now().inverse[t];
      if (other >= t) r.dv[tile][i] -= decay * (this->now().w_start[other] * k_h_k);
    });
    this->put_crossing(Dv());
  }

  KALMANET_KERNEL void gradients_of_gates() {
    if (backward.dgk.data == nullptr) return;
    const float s_h = -this->sum_of(0), norm2 = this->sum_of(1);
    group.with_warp(0, [&] {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = thread % 32 * 2 + i;
          const float beta = this->now().beta[t];
          r.pair[i] = this->now().inverse[t] * beta * beta * this->dot(kTileStart, t);
        }
      });
      this->template scan<false>();  // <H_t, H_0> e^{-G_t} but for |H_0|^2
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = thread % 32 * 2 + i;
          r.pair[i] = -(this->dot(kTileAdjoint, t) +
                        this->now().w_start[t] * (this->now().start[t] * (norm2 + r.pair[i])));
        }
      });
      this->store_gates(backward.dgk, this->now().total[0] * 0.5f * s_h, 0.5f);
    });
  }

  KALMANET_KERNEL void run() {
    const int chunks = this->num_chunks();
    if (chunks == 0) return;
    this->begin_rows(shared.v, nullptr, nullptr);
    if (this->cuts == nullptr) {
      KALMANET_LOOP
      for (int i = 0; i < chunks; ++i) {  // a warp a chunk, all at once
        this->set_chunk(i);
        this->load_key_scalars(i, 0.0f);
      }
      this->take_start(false);
      group.barrier();
      advance(chunks);
    }
    const StateView<float> d = adjoint_view<float>(backward, piece.slot, head, false);
    this->take_state(this->chunk_state(L::kChunks), [&](int row, int column) {
      if (!has_element<Group>(job, false, row, column)) return 0.0f;
      return -(d.data[d.at(row, column)] + d.data[d.at(column, row)]);
    });
    KALMANET_LOOP
    for (int i = chunks; i-- > 0;) {
      this->set_chunk(i);
      start_chunk(i);
      load_chunk();
      multiply_states(this->cuts == nullptr ? i : 0);
      multiply_tokens();
      this->each_own_row(backward.z, key_dims<Group>(job),
                         [](Registers& r, int h, int tile, float, float* to) {
                           store_pair(to, r.dk[tile][2 * h], r.dk[tile][2 * h + 1]);
                         });
      group.barrier();
      gradients_of_gates();
    }
  }
};

}  // namespace kalmanet::cuda
