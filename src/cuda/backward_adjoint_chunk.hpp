// What a piece adds to the gradients of the states before it, on matrix units (the twin for any
// shape, and the formulas: backward_segment_body.hpp). One block makes D's part of a piece, another
// E's; K = V = 128.
#pragma once

#include "cuda/backward_gradient_gates.hpp"

namespace kalmanet::cuda {

template <class Group>
struct AdjointChunkBody : GradientChunkGates<Group> {
  using Base = GradientChunkGates<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::t0, Base::n,
      Base::backward, Base::extra;
  using L = ChunkLayout;
  using Registers = ChunkRegisters;
  using typename Base::Tiles;

  bool u;

  KALMANET_KERNEL Split columns(int i) { return {shared.main[i], shared.main[i] + L::kKeys}; }

  // The chunk's columns and weights. later: e^{2 gk_t} r_t of the token after the chunk.
  KALMANET_KERNEL void load(double later) {
    const Split none = {nullptr, nullptr};
    group.barrier();
    this->load_scalars();
    if (u) {
      this->load_tiles(backward.d_o, head, nullptr, extra.do_columns);
      this->load_solutions(backward.x, true, none, columns(0));
    } else {
      this->load_tiles(job.k, head / job.k_group, nullptr, shared.columns);
      this->load_solutions(backward.x, false, none, columns(0));
      this->load_solutions(backward.z, false, none, columns(1));
    }
    group.each([&](int thread, Registers&) {
      if (thread >= L::kTokens) return;
      const int64_t at = thread < n ? this->place(thread) : -1;
      const double since = at < 0 ? 0.0 : backward.since[2 * at + (u ? 1 : 0)];
      extra.h[thread] = since;
      extra.w[thread] = at < 0 ? 0.0 : backward.w[at];
      extra.minus_start[thread] = static_cast<float>(-since);
      extra.mix_weight[thread] = static_cast<float>(job.scale * since);
    });
    group.barrier();
    if (u) return;
    group.each([&](int thread, Registers&) {
      if (thread >= L::kTokens) return;
      const double own = shared.since[thread];
      const double to_end = exp(shared.total64[0] - own);
      double r = later * to_end * to_end;
      for (int i = thread; i < L::kTokens; ++i) {
        const double decay = static_cast<double>(expf(static_cast<float>(shared.since[i] - own)));
        r += extra.w[i] * decay * decay;
      }
      extra.r[thread] = r;
      extra.key_weight[thread] = -extra.h[thread] * r * static_cast<double>(shared.beta2[thread]);
    });
    group.barrier();
  }

  KALMANET_KERNEL void add(int half) {
    const auto of = [half](Registers& r) -> Tiles { return half == 0 ? r.x : r.d; };
    if (u) {
      this->add_update(half, {extra.do_columns, nullptr}, extra.mix_weight, columns(0), of);
      return;
    }
    this->add_update(half, columns(1), extra.minus_start, columns(0), of);
    this->add_update(half, {shared.columns, nullptr}, extra.key_weight, {shared.columns, nullptr},
                     of);
  }

  KALMANET_KERNEL void run() {
    this->each_tile([](Registers& r, int, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.x[m][tile][i] = r.d[m][tile][i] = 0;
    });
    double later = 0.0;
    const int64_t chunks = (piece.end - piece.begin + L::kTokens - 1) / L::kTokens;
    for (int64_t i = chunks; i-- > 0;) {
      t0 = piece.begin + i * L::kTokens;
      n = static_cast<int>(piece.end - t0 < L::kTokens ? piece.end - t0 : L::kTokens);
      load(later);
      add(0);
      add(1);
      if (!u) later = exp(2.0 * shared.since[0]) * extra.r[0];
    }
    const StateView<float> to = adjoint_view<float>(backward, piece.slot, head, u);
    StateView<float> start;
    if (!u) {
      start = piece.first ? state_view<float>(job.h0, piece.sequence, head)
                          : slot_view<float>(job, piece.slot, head, false);
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
          const int column = tile * 8 + thread % 4 * 2 + i % 2;
          float e = tile < 8 ? r.x[tile / 4][tile % 4][i] : r.d[tile % 8 / 4][tile % 4][i];
          if (start.data != nullptr) {
            e -= static_cast<float>(later * static_cast<double>(start.data[start.at(row, column)]));
          }
          to.data[u ? to.at(column, row) : to.at(row, column)] = e;
        }
      }
    });
  }
};

// Block (piece_index, head, u)'s work.
template <class Group>
KALMANET_KERNEL void run_adjoint_chunks(Group& group, GradientChunkShared& shared,
                                        const BackwardJob& backward, int64_t piece_index,
                                        int64_t head, bool u) {
  const Piece piece = piece_of(backward.in, piece_index);
  if (!has_before(backward, piece) || !is_done(backward.in, piece_index, head)) return;
  AdjointChunkBody<Group> body{
      {{{{{group, shared}, backward.in, piece, head, nullptr}}, backward}, shared}, u};
  body.run();
}

}  // namespace kalmanet::cuda
