// The backward's last kernels on matrix units, second part (backward_tile_keys.hpp is the first):
// the gradients of values, what goes through U of those of keys, and those of U's gates and of
// beta, of one head of one piece, in chunks of 64 tokens, last chunk first. E stays in registers.
#pragma once

#include "cuda/backward_tile_keys.hpp"

namespace kalmanet::cuda {

template <class Group>
struct TileValues : TileGates<Group> {
  using Base = TileGates<Group>;
  using Base::group, Base::shared, Base::backward, Base::job, Base::piece, Base::head, Base::t0,
      Base::n, Base::keys, Base::values, Base::output_gradients, Base::m, Base::each_sum;
  using L = TileLayout;
  using Registers = TileRegisters;
  using typename Base::Dk, typename Base::Dv, typename Base::First, typename Base::Second,
      typename Base::Own, typename Base::Start;
  static constexpr bool kLows = Base::kLows;

  // U before every chunk, in scratch.
  KALMANET_KERNEL void advance(int chunks) {
    this->set_chunk(0);
    fetch_sources();
    KALMANET_LOOP
    for (int i = 0; i + 1 < chunks; ++i) {
      this->set_chunk(i);
      group.barrier();  // the chunk before was read
      this->put(0, keys());
      this->put(1, values());
      this->put_weighted_keys(this->now().to_end, m());
      this->scale_state(this->now().total[1]);
      group.barrier();
      this->set_chunk(i + 1);
      fetch_sources();  // under way meanwhile
      this->template add_outer<true, kLows>(m(), values(), Own());
      this->store_state(this->chunk_state(i + 1));
    }
  }
  KALMANET_KERNEL void fetch_sources() {
    this->fetch(job.k, head / job.k_group, 0);
    this->fetch(job.v, head / job.v_group, 1);
  }

  // What is there of other chunks from the beginning.
  KALMANET_KERNEL void start_chunk(int chunk) {
    if (this->cuts == nullptr) return;
    this->find_start(chunk, true);
    this->load_value_scalars(0, true);
  }

  // A chunk's tiles, and what dk has so far. Begins and ends with a barrier.
  KALMANET_KERNEL void load_chunk() {
    this->fetch_solutions(backward.x, [](Registers& r) -> float (&)[4][8] { return r.raw_x; });
    fetch_sources();
    this->fetch(backward.d_o, head, 2);
    this->fetch(job.q, head / job.q_group, 3);
    group.barrier();
    this->put_state();
    this->put(0, keys());
    this->put(1, values());
    this->put(2, output_gradients());
    this->put_mix(3);
    this->prefetch_solutions(backward.x);
    this->prefetch_solutions(backward.z);
    this->prefetch_tensor(job.k, head / job.k_group);
    this->prefetch_tensor(job.v, head / job.v_group);
    this->prefetch_tensor(backward.d_o, head);
    this->prefetch_tensor(job.q, head / job.q_group);
    group.barrier();
    this->clear(Dk());
    this->each_own_row(backward.z, key_dims<Group>(job),
                       [](Registers& r, int h, int tile, float, float* from) {
                         load_pair(from, r.dk[tile][2 * h], r.dk[tile][2 * h + 1]);
                       });
  }

  KALMANET_KERNEL void run_chunk(int chunk) {
    this->clear(Dv());
    this->template multiply<true, true, kLows, true>(keys(), this->state(), Dv());
    this->clear(First());
    this->template multiply<false, true, kLows, true>(values(), this->state(), First());
    each_sum([&](Registers& r, int, int tile, int i, int t) {
      r.dv[tile][i] *= this->now().end[t];
      r.dk[tile][i] += this->now().end[t] * r.s[tile][i];
    });
    this->template measure_with<true>(kTileCarry, values(), Dv());
    this->load_state(this->chunk_state(chunk), Start());
    group.each([](int, Registers& r) { r.sum[0] = 0.0f; });
    const float total = this->now().total[1];
    this->put_start([&](Registers& r, float (&e)[4], const float (&u)[4]) {
      r.sum[0] += (e[0] * u[0] + e[1] * u[1]) + (e[2] * u[2] + e[3] * u[3]);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) e[i] *= total;
    });
    this->put_sum(0);
    this->clear(First());
    this->template multiply<false, true, kLows, true>(output_gradients(), this->state(), First());
    this->template measure_with<false>(kTileStart, m(), First());
    this->template add_outer<true, kLows>(m(), output_gradients(), Own());
    multiply_tokens();
  }

  // What tokens do to each other: dv, dk, and the actions of token t on token i, into p.
  KALMANET_KERNEL void multiply_tokens() {
    this->clear(Second());
    this->template multiply<false, false, kLows, true>(keys(), m(), Second());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const bool later = Base::pair_of(thread, tile, i) >= t;
      r.p[tile][i] = later ? this->now().inverse[t] * this->now().beta[t] * r.p[tile][i] : 0.0f;
    });
    this->template apply<kLows>(Second(), output_gradients(), Dv());
    this->clear(First());
    this->template multiply<false, false, kLows, kLows>(values(), output_gradients(), First());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const bool later = Base::pair_of(thread, tile, i) >= t;
      r.p[tile][i] *= this->now().beta[t] * r.s[tile][i];
      r.s[tile][i] = later ? this->now().inverse[t] * this->now().beta[t] * r.s[tile][i] : 0.0f;
    });
    this->template apply<true>(First(), m(), Dk());
    if (backward.dbeta.data != nullptr) {
      this->measure(kTileBeta, [&](Registers& r, int thread, int tile, int h) {
        const int t = Base::token_of(thread, 2 * h), column = Base::column_of(thread, tile, 0);
        float k[2], v[2];
        load_two_exact<128, Group>(keys(), t, column, k);
        load_two_exact<128, Group>(values(), t, column, v);
        return (r.dk[tile][2 * h] * k[0] + r.dk[tile][2 * h + 1] * k[1]) +
               (r.dv[tile][2 * h] * v[0] + r.dv[tile][2 * h + 1] * v[1]);
      });
    }
    this->store_rows(backward.dv, backward.dv_parts, value_dims<Group>(job), Dv());
    this->store_rows(backward.dk, backward.dk_parts, key_dims<Group>(job), Dk());
    this->put_crossing(Second());
  }

  KALMANET_KERNEL void store_scalars() {
    const float e_u = this->sum_of(0);
    group.with_warp(0, [&] {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = thread % 32 * 2 + i;
          r.pair[i] = this->dot(kTileStart, t);
          if (t >= n || backward.dbeta.data == nullptr) continue;
          store_scalar<float>(backward.dbeta, piece.row, t0 + t, head, this->dot(kTileBeta, t));
        }
      });
      if (backward.dg.data != nullptr)
        this->store_gates(backward.dg, this->now().total[1] * e_u, 1.0f);
    });
  }

  KALMANET_KERNEL void run() {
    const int chunks = this->num_chunks();
    if (chunks == 0) return;
    this->begin_rows(shared.x[0], shared.x[1], shared.z[0]);
    if (this->cuts == nullptr) {
      KALMANET_LOOP
      for (int i = 0; i < chunks; ++i) {  // a warp a chunk, all at once
        this->set_chunk(i);
        this->load_value_scalars(i, true);
      }
      this->take_start(true);
      group.barrier();
      advance(chunks);
    }
    const StateView<float> e = adjoint_view<float>(backward, piece.slot, head, true);
    this->take_state(this->chunk_state(L::kChunks), [&](int row, int column) {
      return has_element<Group>(job, true, row, column) ? e.data[e.at(row, column)] : 0.0f;
    });
    KALMANET_LOOP
    for (int i = chunks; i-- > 0;) {
      this->set_chunk(i);
      start_chunk(i);
      load_chunk();
      run_chunk(this->cuts == nullptr ? i : 0);
      group.barrier();
      store_scalars();
    }
  }
};

// Block `block` of `blocks`, each with its own memory: every so-manieth piece and head that was not
// left over. Body: TileKeys, then, in another launch, TileValues.
template <template <class> class Body, class Group>
KALMANET_KERNEL void run_tile_gradients(Group& group, TileShared& shared,
                                        const BackwardJob& backward, int64_t block,
                                        int64_t blocks) {
  const GkaJob& job = backward.in;
  float* const scratch =
      static_cast<float*>(backward.block_scratch) + block * TileLayout::kScratchFloats;
  for (int64_t i = block; i < job.num_pieces * job.H; i += blocks) {
    if (job.left_over[i] != 0) continue;
    Body<Group> body{
        {{{{group}, shared, backward, job, piece_of(job, i / job.H), i % job.H}}, scratch}};
    body.find_cuts(i / job.H);
    body.run();
    group.barrier();
  }
}

}  // namespace kalmanet::cuda
