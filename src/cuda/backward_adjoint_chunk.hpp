// What a piece adds to the gradients of the states before it, on matrix units (the twin for any
// shape, and the formulas: backward_segment_body.hpp). K = V = 128, bfloat16 tensors.
//
// The sums of both stay in registers from the piece's last chunk to its first, where a chunk's
// decays take them to its start: -D <- e^{G_C} (-D) + sum_i (z_i e^{G_i/2}) (x_i e^{G_i/2})^T + ...
#pragma once

#include "cuda/backward_tiles.hpp"

namespace kalmanet::cuda {

template <class Group>
struct TileAdjoints : BackwardTiles<Group> {
  using Base = BackwardTiles<Group>;
  using Base::group, Base::shared, Base::backward, Base::job, Base::piece, Base::head, Base::x,
      Base::z, Base::m, Base::keys, Base::output_gradients;
  using L = TileLayout;
  using Registers = TileRegisters;
  using State = float (&)[2][8][4];
  static constexpr bool kLows = Base::kLows;

  struct MinusD {
    KALMANET_KERNEL State operator()(Registers& r) const { return r.state; }
  };
  struct E {
    KALMANET_KERNEL State operator()(Registers& r) const { return r.other; }
  };

  KALMANET_KERNEL void load_chunk(float later) {
    this->fetch_solutions(backward.x, [](Registers& r) -> float (&)[4][8] { return r.raw_x; });
    this->fetch_solutions(backward.z, [](Registers& r) -> float (&)[4][8] { return r.raw_z; });
    this->fetch(job.k, head / job.k_group, 0);
    this->fetch(backward.d_o, head, 2);
    this->fetch(job.q, head / job.q_group, 3);
    this->load_key_scalars(0, later);
    this->load_value_scalars(1, false);
    this->put(0, keys());
    this->put(2, output_gradients());
    group.barrier();
    this->put_solutions(this->now().half, x(),
                        [](Registers& r) -> float (&)[4][8] { return r.raw_x; });
    this->put_solutions(this->now().half, z(),
                        [](Registers& r) -> float (&)[4][8] { return r.raw_z; });
    this->put_mix(3);
    this->put_weighted_keys(this->now().key_weight, this->state(), 0.5f);
    this->prefetch_solutions(backward.x);
    this->prefetch_solutions(backward.z);
    this->prefetch_tensor(job.k, head / job.k_group);
    this->prefetch_tensor(backward.d_o, head);
    this->prefetch_tensor(job.q, head / job.q_group);
    group.barrier();
  }

  KALMANET_KERNEL void run() {
    this->each_of_state([](Registers& r, int, int mm, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.state[mm][tile][i] = r.other[mm][tile][i] = 0.0f;
    });
    // (Weighted keys are half as many as a state that lies in their place has room for.)
    this->begin_rows(shared.state[0] + L::kTile, nullptr, shared.v);
    float later = 0.0f;
    KALMANET_LOOP
    for (int i = this->num_chunks(); i-- > 0;) {
      this->set_chunk(i);
      load_chunk(later);
      later = this->now().through_f;
      const float total = this->now().total[0], u_total = this->now().total[1];
      this->each_of_state([&](Registers& r, int, int mm, int tile) {
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) {
          r.state[mm][tile][e] *= total;
          r.other[mm][tile][e] *= u_total;
        }
      });
      this->template add_outer<true, true>(z(), x(), MinusD());
      this->template add_outer<true, kLows>(this->state(), keys(), MinusD());
      this->template add_outer<true, kLows>(m(), output_gradients(), E());
      group.barrier();
    }
    const StateView<float> d = adjoint_view<float>(backward, piece.slot, head, false);
    const StateView<float> e = adjoint_view<float>(backward, piece.slot, head, true);
    const StateView<float> start = piece.first ? state_view<float>(job.h0, piece.sequence, head)
                                               : slot_view<float>(job, piece.slot, head, false);
    if (start.data != nullptr) {  // (all of it under way before the first is written)
      this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = Base::state_row(thread, mm, i), column = Base::column_of(thread, tile, i);
          if (!has_element<Group>(job, false, row, column)) continue;
          r.state[mm][tile][i] += later * start.data[start.at(row, column)];
        }
      });
    }
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = Base::state_row(thread, mm, 2 * h);
        const int column = Base::column_of(thread, tile, 0);
        const float (&v)[4] = r.state[mm][tile], (&w)[4] = r.other[mm][tile];
        if (has_element<Group>(job, false, row, column)) {
          store_pair(d.data + d.at(row, column), -v[2 * h], -v[2 * h + 1]);
        }
        if (has_element<Group>(job, true, row, column)) {
          store_pair(e.data + e.at(row, column), w[2 * h], w[2 * h + 1]);
        }
      }
    });
  }
};

// Block (piece_index, head)'s work.
template <class Group>
KALMANET_KERNEL void run_tile_adjoints(Group& group, TileShared& shared,
                                       const BackwardJob& backward, int64_t piece_index,
                                       int64_t head) {
  const Piece piece = piece_of(backward.in, piece_index);
  if (!has_before(backward, piece) || !is_done(backward.in, piece_index, head)) return;
  TileAdjoints<Group> body{{{{group}, shared, backward, backward.in, piece, head}}};
  body.find_cuts(piece_index);
  body.run();
}

}  // namespace kalmanet::cuda
