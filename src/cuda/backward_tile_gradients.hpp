// The backward's last kernel on matrix units: the gradients of keys, values and gates of one head
// of one piece, in chunks of 64 tokens, last chunk first. K = V = 128, bfloat16 tensors. The
// formulas are those of its twin for any shape (backward_gradient_kernel.hpp), with S = D + D^T.
//
// Tokens are rows throughout (tile.hpp): the sums of a product of tokens with tokens are, where they
// lie, a factor of the next. A state is read as a tile, high and low parts; between chunks S and E
// lie in scratch memory as the sums of the threads that update them, as do H and U before each chunk.
// Kept is -S: all that tokens add to it is then positive.
#pragma once

#include "cuda/backward_tile_gates.hpp"

namespace kalmanet::cuda {

template <class Group>
struct TileGradients : TileGates<Group> {
  using Base = TileGates<Group>;
  using Base::group, Base::shared, Base::backward, Base::job, Base::piece, Base::head, Base::t0,
      Base::n, Base::keys, Base::values, Base::output_gradients, Base::x, Base::z, Base::m;
  using L = TileLayout;
  using Registers = TileRegisters;
  using Rows = float (&)[8][4];
  using State = float (&)[2][8][4];

  float* scratch;

  struct Dk {
    KALMANET_KERNEL Rows operator()(Registers& r) const { return r.dk; }
  };
  struct Dv {
    KALMANET_KERNEL Rows operator()(Registers& r) const { return r.dv; }
  };
  struct First {
    KALMANET_KERNEL Rows operator()(Registers& r) const { return r.s; }
  };
  struct Second {
    KALMANET_KERNEL Rows operator()(Registers& r) const { return r.p; }
  };
  struct Own {
    KALMANET_KERNEL State operator()(Registers& r) const { return r.state; }
  };
  struct Other {
    KALMANET_KERNEL State operator()(Registers& r) const { return r.other; }
  };

  KALMANET_KERNEL float* chunk_state(int chunk, bool u) const {
    return scratch + static_cast<int64_t>(chunk * 2 + (u ? 1 : 0)) * L::kState;
  }
  KALMANET_KERNEL float* carry(bool u) const { return chunk_state(L::kChunks, u); }

  template <class Of>
  KALMANET_KERNEL void store_state(float* to, Of&& of) {
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      store4(to + Base::scratch_at(thread, mm, tile), of(r)[mm][tile]);
    });
  }
  template <class Of>
  KALMANET_KERNEL void load_state(const float* from, Of&& of) {
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      load4(from + Base::scratch_at(thread, mm, tile), of(r)[mm][tile]);
    });
  }
  template <class Of>
  KALMANET_KERNEL void scale_state(float factor, Of&& of) {
    this->each_of_state([&](Registers& r, int, int mm, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) of(r)[mm][tile][i] *= factor;
    });
  }
  // element(row, column) of a state.
  template <class Of, class F>
  KALMANET_KERNEL void take_state(Of&& of, F&& element) {
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        of(r)[mm][tile][i] =
            element(Base::state_row(thread, mm, i), Base::column_of(thread, tile, i));
      }
    });
  }

  // H and U before the piece, and their gradients after it.
  KALMANET_KERNEL void load_piece() {
    const StateView<float> d = adjoint_view<float>(backward, piece.slot, head, false);
    const StateView<float> e = adjoint_view<float>(backward, piece.slot, head, true);
    take_state(Own(), [&](int row, int column) {
      return -(d.data[d.at(row, column)] + d.data[d.at(column, row)]);
    });
    take_state(Other(), [&](int row, int column) { return e.data[e.at(row, column)]; });
    store_state(carry(false), Own());
    store_state(carry(true), Other());
    const auto start = [&](bool u) {
      return piece.first ? state_view<float>(u ? job.u0 : job.h0, piece.sequence, head)
                         : slot_view<float>(job, piece.slot, head, u);
    };
    const StateView<float> h = start(false), u = start(true);
    take_state(Own(), [&](int row, int column) {
      return h.data == nullptr ? 0.0f : h.data[h.at(row, column)];
    });
    take_state(Other(), [&](int row, int column) {
      return u.data == nullptr ? 0.0f : u.data[u.at(row, column)];
    });
    store_state(chunk_state(0, false), Own());
    store_state(chunk_state(0, true), Other());
  }

  // H and U after chunk i, in registers and in scratch.
  KALMANET_KERNEL void advance(int i) {
    this->set_chunk(piece.begin + i * L::kTokens);
    this->fetch(job.k, head / job.k_group, 0);
    this->fetch(job.v, head / job.v_group, 1);
    group.barrier();  // the chunk before was read
    this->load_scalars();
    this->put(0, shared.k);
    this->put(1, shared.v);
    group.barrier();
    this->put_weighted_keys(shared.to_end[0], x());
    this->put_weighted_keys(shared.to_end[1], z());
    scale_state(shared.total[0], Own());
    scale_state(shared.total[1], Other());
    group.barrier();
    this->template add_outer<true, false>(x(), keys(), Own());
    this->template add_outer<true, false>(z(), values(), Other());
    store_state(chunk_state(i + 1, false), Own());
    store_state(chunk_state(i + 1, true), Other());
  }

  // A chunk's tiles and numbers. Begins and ends with a barrier.
  KALMANET_KERNEL void load_chunk() {
    this->fetch_solutions(backward.x, [](Registers& r) -> float(&)[4][8] { return r.raw_x; });
    this->fetch_solutions(backward.z, [](Registers& r) -> float(&)[4][8] { return r.raw_z; });
    this->fetch(job.k, head / job.k_group, 0);
    this->fetch(job.v, head / job.v_group, 1);
    this->fetch(backward.d_o, head, 2);
    this->fetch(job.q, head / job.q_group, 3);
    group.barrier();
    this->load_scalars();
    this->put(0, shared.k);
    this->put(1, shared.v);
    this->put(2, shared.d_o);
    group.barrier();
    this->put_solutions(shared.half, x(), [](Registers& r) -> float(&)[4][8] { return r.raw_x; });
    this->put_solutions(shared.half, z(), [](Registers& r) -> float(&)[4][8] { return r.raw_z; });
    this->put_mix(3);
  }

  // f(registers, thread, tile, i, row's token) for a thread's sums of tokens x anything.
  template <class F>
  KALMANET_KERNEL void each_sum(F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) f(r, thread, tile, i, Base::token_of(thread, i));
      }
    });
  }

  // The chunk's first state as a tile: f(registers, mm, tile, v) sees four of its elements. Begins
  // and ends with a barrier.
  template <class F>
  KALMANET_KERNEL void put_start(const float* from, F&& f) {
    group.barrier();
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      float v[4];
      load4(from + Base::scratch_at(thread, mm, tile), v);
      f(r, mm, tile, v);
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        store_two<128>(this->state(), Base::state_row(thread, mm, 2 * h),
                       Base::column_of(thread, tile, 0), v[2 * h], v[2 * h + 1]);
      }
    });
    group.barrier();
  }

  // dv, and what of dk goes through U.
  KALMANET_KERNEL void multiply_values(int chunk) {
    load_state(carry(true), Own());
    this->put_state();
    group.barrier();
    this->clear(Dv());
    this->template multiply<true, true, false, true>(keys(), this->state(), Dv());
    this->clear(Dk());
    this->template multiply<false, true, false, true>(values(), this->state(), Dk());
    each_sum([&](Registers& r, int, int tile, int i, int t) {
      r.dv[tile][i] *= shared.end[1][t];
      r.dk[tile][i] *= shared.end[1][t];
    });
    this->measure_with(kTileValueCarry, shared.v, Dv());
    group.each([](int, Registers& r) { r.sum[0] = 0.0; });
    put_start(chunk_state(chunk, true), [](Registers& r, int mm, int tile, const float(&u)[4]) {
      const float(&e)[4] = r.state[mm][tile];
      r.sum[0] += static_cast<double>((e[0] * u[0] + e[1] * u[1]) + (e[2] * u[2] + e[3] * u[3]));
    });
    this->put_sum(0);
    this->clear(First());
    this->template multiply<false, true, false, true>(output_gradients(), this->state(), First());
    this->measure_with(kTileMixStart, m(), First());
    scale_state(shared.total[1], Own());
    this->template add_outer<true, false>(m(), output_gradients(), Own());
    store_state(carry(true), Own());
    this->clear(Second());
    this->template multiply<false, false, false, true>(keys(), m(), Second());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const bool later = Base::pair_of(thread, tile, i) >= t;
      r.p[tile][i] = later ? shared.inverse[1][t] * shared.beta[t] * r.p[tile][i] : 0.0f;
    });
    this->template apply<false>(Second(), output_gradients(), Dv());
    this->clear(First());
    this->template multiply<false, false, false, false>(values(), output_gradients(), First());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const bool later = Base::pair_of(thread, tile, i) >= t;
      r.p[tile][i] *= shared.beta[t] * r.s[tile][i];
      r.s[tile][i] = later ? shared.inverse[1][t] * shared.beta[t] * r.s[tile][i] : 0.0f;
    });
    this->template apply<true>(First(), m(), Dk());
    if (backward.dbeta.data != nullptr) this->measure_with(kTileBetaValue, shared.v, Dv());
    store_rows(backward.dv, backward.dv_parts, Dv());
    this->put_crossing(1, Second());
  }

  // What goes through H.
  KALMANET_KERNEL void multiply_keys(int chunk) {
    group.barrier();  // the tiles of U and of m were read
    load_state(carry(false), Own());
    this->put_state();
    this->put_weighted_keys(shared.key_weight, m());
    group.barrier();
    this->clear(First());
    this->template multiply<false, true, false, true>(keys(), this->state(), First());
    each_sum([&](Registers& r, int, int tile, int i, int t) {
      r.s[tile][i] *= -shared.end[0][t];
      r.dk[tile][i] += r.s[tile][i];
    });
    this->measure_with(kTileKeyCarry, shared.k, First());
    group.each([](int, Registers& r) { r.sum[1] = r.sum[2] = 0.0; });
    const float total = shared.total[0], through_f = static_cast<float>(shared.through_f);
    put_start(chunk_state(chunk, false), [&](Registers& r, int mm, int tile, const float(&h)[4]) {
      float(&s)[4] = r.state[mm][tile];
      r.sum[1] += static_cast<double>((s[0] * h[0] + s[1] * h[1]) + (s[2] * h[2] + s[3] * h[3]));
      r.sum[2] += static_cast<double>((h[0] * h[0] + h[1] * h[1]) + (h[2] * h[2] + h[3] * h[3]));
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) s[i] = total * s[i] + through_f * h[i];
    });
    this->put_sum(1);
    this->put_sum(2);
    this->template add_outer<true, true>(z(), x(), Own());
    this->template add_outer<true, true>(x(), z(), Own());
    this->template add_outer<true, false>(m(), keys(), Own());
    store_state(carry(false), Own());
    this->clear(First());
    this->template multiply<false, true, false, true>(keys(), this->state(), First());
    this->measure_with(kTileKeyStart, shared.k, First());
    each_sum([&](Registers& r, int, int tile, int i, int t) {
      r.dk[tile][i] += shared.key_factor[t] * r.s[tile][i];
    });
    this->clear(First());
    this->template multiply<false, true, true, true>(x(), this->state(), First());
    this->measure_with(kTileAdjointStart, z(), First());
    group.barrier();
    pairs_of_keys();
  }

  // What tokens do to each other through H: dk, and the actions of token t on token i, into dv.
  KALMANET_KERNEL void pairs_of_keys() {
    this->clear(First());
    this->template multiply<false, false, false, true>(keys(), x(), First());
    this->clear(Second());
    this->template multiply<false, false, false, true>(keys(), z(), Second());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const bool later = Base::pair_of(thread, tile, i) >= t;
      const float weight = later ? -shared.inverse[0][t] * shared.beta[t] : 0.0f;
      r.s[tile][i] *= weight;
      r.dv[tile][i] = r.s[tile][i] * (shared.beta[t] * r.p[tile][i]);
      r.p[tile][i] *= weight;
    });
    this->template apply<true>(First(), z(), Dk());
    this->template apply<true>(Second(), x(), Dk());
    this->clear(First());
    this->template multiply<false, false, false, false>(keys(), keys(), First());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const int other = Base::pair_of(thread, tile, i), last = other > t ? other : t;
      const int first = other > t ? t : other;
      const float beta = shared.beta[other], k_k = beta * shared.beta[t] * r.s[tile][i];
      // (A decay is the product of one that may be tiny and one that may be huge.)
      const float decay = shared.start[0][last] * shared.inverse[0][first];
      r.s[tile][i] = -2.0f * decay * shared.r[last] * beta * k_k;
      r.p[tile][i] = shared.inverse[0][other] * (k_k * k_k);
    });
    this->template apply<false>(First(), keys(), Dk());
    this->template sum_along<false>(Second());
    each_sum([&](Registers& r, int thread, int tile, int i, int t) {
      const int other = Base::pair_of(thread, tile, i);
      const float beta = shared.beta[t], start = shared.start[0][other];
      const float k_h_k =
          start * (r.p[tile][i] + beta * beta * this->dot(kTileKeyStart, t));
      if (other >= t) r.dv[tile][i] -= start * shared.inverse[0][t] * (shared.w[other] * k_h_k);
    });
    this->put_crossing(0, Dv());
  }

  // beta_t times a gradient's rows.
  template <class Of>
  KALMANET_KERNEL void store_rows(const Array& gradient, void* parts, Of&& of) {
    if (parts != nullptr) {
      float* const to =
          static_cast<float*>(parts) + place_of(backward, piece, t0, head) * L::kDim;
      const int64_t stride = job.H * L::kDim;
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int t = Base::token_of(thread, 2 * h);
          const float beta = shared.beta[t];
          if (t >= n) continue;
          KALMANET_UNROLL
          for (int tile = 0; tile < 8; ++tile) {
            const float v[2] = {beta * of(r)[tile][2 * h], beta * of(r)[tile][2 * h + 1]};
            memcpy(to + t * stride + Base::column_of(thread, tile, 0), v, 8);
          }
        }
      });
    } else if (gradient.data != nullptr) {
      uint16_t* const to =
          static_cast<uint16_t*>(gradient.data) + offset_of(gradient, piece.row, t0, head);
      const int64_t stride = gradient.stride[1];
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int t = Base::token_of(thread, 2 * h);
          const float beta = shared.beta[t];
          if (t >= n) continue;
          KALMANET_UNROLL
          for (int tile = 0; tile < 8; ++tile) {
            const uint32_t both =
                pack_bfloat16(beta * of(r)[tile][2 * h], beta * of(r)[tile][2 * h + 1]);
            memcpy(to + t * stride + Base::column_of(thread, tile, 0), &both, 4);
          }
        }
      });
    }
  }

  KALMANET_KERNEL void run_chunk(int chunk) {
    this->set_chunk(piece.begin + chunk * L::kTokens);
    load_chunk();
    multiply_values(chunk);
    multiply_keys(chunk);
    if (backward.dbeta.data != nullptr) this->measure_with(kTileBetaKey, shared.k, Dk());
    store_rows(backward.dk, backward.dk_parts, Dk());
    group.barrier();
    this->gradients_of_gates();
    if (backward.dbeta.data == nullptr) return;
    group.each([&](int thread, Registers&) {
      if (thread >= n) return;
      store_scalar<float>(
          backward.dbeta, piece.row, t0 + thread, head,
          static_cast<double>(this->dot(kTileBetaKey, thread) + this->dot(kTileBetaValue, thread)));
    });
  }

  KALMANET_KERNEL void run() {
    const int chunks = static_cast<int>((piece.end - piece.begin + L::kTokens - 1) / L::kTokens);
    if (chunks == 0) return;
    load_piece();
    KALMANET_LOOP
    for (int i = 0; i + 1 < chunks; ++i) advance(i);
    KALMANET_LOOP
    for (int i = chunks; i-- > 0;) run_chunk(i);
  }
};

// Block `block` of `blocks`, each with its own memory: every so-manieth piece and head that was not
// left over.
template <class Group>
KALMANET_KERNEL void run_tile_gradients(Group& group, TileShared& shared,
                                        const BackwardJob& backward, int64_t block,
                                        int64_t blocks) {
  const GkaJob& job = backward.in;
  float* const scratch =
      static_cast<float*>(backward.block_scratch) + block * TileLayout::kScratchFloats;
  for (int64_t i = block; i < job.num_pieces * job.H; i += blocks) {
    if (job.left_over[i] != 0) continue;
    TileGradients<Group> body{
        {{{group}, shared, backward, job, piece_of(job, i / job.H), i % job.H}}, scratch};
    body.run();
    group.barrier();
  }
}

}  // namespace kalmanet::cuda
