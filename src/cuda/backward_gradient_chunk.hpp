// The backward's last kernel on matrix units: the gradients of keys, values and gates of one head
// of one piece, in chunks of 64 tokens, last chunk first. K = V = 128, bfloat16 tensors. The
// formulas are those of its twin for any shape (backward_gradient_kernel.hpp), with S = D + D^T.
//
// Keys, values and do are the exact bfloat16 that came in, beta goes into the weights; all else is
// split in high and low parts. A state lies in memory as fragments of a warp's sums
// (chunk_state.hpp): H, then U^T, before each chunk; S, then E^T. The fragments of x, z and m lie
// where right and main have room by turns.
#pragma once

#include "cuda/backward_gradient_gates.hpp"

namespace kalmanet::cuda {

template <class Group>
struct GradientChunkBody : GradientChunkGates<Group> {
  using Base = GradientChunkGates<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n, Base::backward, Base::extra;
  using L = ChunkLayout;
  using Registers = ChunkRegisters;
  using typename Base::Tiles;
  static constexpr int64_t kState = 128 * 128;  // H, or U^T
  static constexpr int kChunks = static_cast<int>(kSegmentTokens) / L::kTokens;
  static constexpr int64_t kScratchFloats = (kChunks + 1) * 2 * kState;

  float* scratch;

  KALMANET_KERNEL float* chunk_state(int chunk) { return scratch + chunk * 2 * kState; }
  KALMANET_KERNEL float* carry() { return chunk_state(kChunks); }
  KALMANET_KERNEL Split keys() { return {shared.rows, nullptr}; }
  KALMANET_KERNEL Split rows() {  // of x, z or m
    return {reinterpret_cast<Left*>(shared.right[0]), reinterpret_cast<Left*>(shared.right[1])};
  }
  KALMANET_KERNEL Split columns(int i) { return {shared.main[i], shared.main[i] + L::kKeys}; }
  KALMANET_KERNEL static Split none() { return {nullptr, nullptr}; }
  struct Dk {
    KALMANET_KERNEL Tiles operator()(Registers& r) const { return r.x; }
  };
  struct Dv {
    KALMANET_KERNEL Tiles operator()(Registers& r) const { return r.d; }
  };

  KALMANET_KERNEL void load_chunk(int64_t begin, bool all) {
    t0 = begin;
    n = static_cast<int>(piece.end - t0 < L::kTokens ? piece.end - t0 : L::kTokens);
    group.barrier();
    this->load_tiles(job.k, head / job.k_group, all ? shared.rows : nullptr, shared.columns);
    this->load_tiles(job.v, head / job.v_group, all ? extra.value_rows : nullptr, shared.values);
    if (all) this->load_tiles(backward.d_o, head, extra.do_rows, extra.do_columns);
    this->load_scalars();
    if (all) this->load_extra();
  }

  // H and U^T after the chunk.
  KALMANET_KERNEL void advance_states(const float* from, float* to) {
    for (int u = 0; u < 2; ++u) {
      const float total = shared.total[u];
      for (int half = 0; half < 2; ++half) {
        this->each_half_tile(half, [&](Registers&, int, float (&y)[4], int64_t at) {
          load4(from + u * kState + at, y);
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) y[i] *= total;
        });
        const Left* const left = u ? shared.values : shared.columns;
        this->add_update(half, {const_cast<Left*>(left), nullptr}, shared.to_end[u],
                         {shared.columns, nullptr});
        this->each_half_tile(half, [&](Registers&, int, float (&y)[4], int64_t at) {
          store4(to + u * kState + at, y);
        });
      }
    }
  }

  // D + D^T and E^T after the piece.
  KALMANET_KERNEL void load_carry() {
    const StateView<float> d = adjoint_view<float>(backward, piece.slot, head, false);
    const StateView<float> e = adjoint_view<float>(backward, piece.slot, head, true);
    float* const to = carry();
    group.each([&](int thread, Registers&) {
      for (int tile = 0; tile < 16; ++tile) {
        float s[4], et[4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
          const int column = tile * 8 + thread % 4 * 2 + i % 2;
          s[i] = d.data[d.at(row, column)] + d.data[d.at(column, row)];
          et[i] = e.data[e.at(column, row)];
        }
        store4(to + Base::state_at(thread, tile), s);
        store4(to + kState + Base::state_at(thread, tile), et);
      }
    });
  }

  // f(y, sum, column's token) element by element, y a product just made.
  template <class F>
  KALMANET_KERNEL void take(F&& f) {
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        f(r.y[m][tile][i], r.x[m][tile][i], r.d[m][tile][i], chunk_column(thread, tile, i));
      }
    });
  }
  // extra.dots[which] <- y times what fragments by columns hold.
  KALMANET_KERNEL void measure_with(int which, const Left* other) {
    this->measure(which, [other](Registers& r, int thread, int m, int tile, int i) {
      float v[4];
      Base::unpack(other, thread, m, tile, v);
      return v[i] * r.y[m][tile][i];
    });
  }

  // All that reads a state: dk and dv begin.
  KALMANET_KERNEL double multiply_states(float* state) {
    states = carry();
    this->load_main(false);
    this->multiply_main(keys());
    take([&](float& y, float& dk, float&, int t) { y = dk = y * extra.end[0][t]; });
    measure_with(kKeyCarry, shared.columns);
    states = state;
    const double norm2 = this->load_main(false);
    this->multiply_main(keys());
    take([&](float& y, float& dk, float&, int t) {
      dk += static_cast<float>(-2.0 * extra.h[t] * static_cast<double>(extra.beta[t] * y));
    });
    measure_with(kKeyStart, shared.columns);
    this->load_solutions(backward.x, false, rows(), none());
    group.barrier();
    this->multiply_main(rows());
    this->load_rows(backward.z, [](Registers& r) -> Tiles { return r.r; });
    this->measure(kAdjointStart, [](Registers& r, int, int m, int tile, int i) {
      return r.r[m][tile][i] * r.y[m][tile][i];
    });
    states = carry();
    this->load_main(true);
    this->multiply_main(keys());
    take([&](float& y, float&, float& dv, int t) { y = dv = y * extra.end[1][t]; });
    measure_with(kValueCarry, shared.values);
    this->load_main_transposed(carry() + kState);
    this->multiply_main({extra.value_rows, nullptr});
    take([&](float& y, float& dk, float&, int t) { dk += extra.end[1][t] * y; });
    states = state;
    this->load_solutions(backward.x, true, rows(), none());
    this->load_main(true);
    this->multiply_main(rows());
    measure_with(kMixStart, extra.do_columns);
    return norm2;
  }

  // What tokens of the chunk add to each other's gradients. Leaves x and z in columns(0) and (1),
  // the pairs' products in r.r and in y.
  KALMANET_KERNEL double multiply_tokens(const float* state) {
    const float scale = static_cast<float>(job.scale);
    group.barrier();
    this->load_solutions(backward.x, true, none(), columns(0));  // (m's rows are there)
    this->multiply_pairs(extra.value_rows, {extra.do_rows, nullptr});
    this->put_weights([&](Registers& r, int tile, int e, int t, int i) {
      const float v_do = r.s[tile][e];
      r.r[1][tile][e] = v_do;
      return scale * this->between(1, t, i) * extra.beta[t] * v_do;
    });
    this->add_columns(columns(0), Dk());
    this->multiply_pairs(shared.rows, rows());
    this->put_weights([&](Registers& r, int tile, int e, int t, int i) {
      const float weight = scale * this->between(1, t, i) * extra.beta[t] * r.s[tile][e];
      r.r[1][tile][e] *= weight * extra.beta[t];
      return weight;
    });
    this->add_columns({extra.do_columns, nullptr}, Dv());
    const double e_u = update_e(state);
    group.barrier();
    this->load_solutions(backward.x, false, rows(), columns(0));
    this->load_solutions(backward.z, false, none(), columns(1));
    group.barrier();
    this->multiply_pairs(shared.rows, rows());
    this->put_weights([&](Registers& r, int tile, int e, int t, int i) {
      r.r[0][tile][e] = r.s[tile][e];
      return -this->between(0, t, i) * extra.beta[t] * r.s[tile][e];
    });
    this->load_solutions(backward.z, false, rows(), none());
    this->add_columns(columns(1), Dk());
    group.barrier();
    this->multiply_pairs(shared.rows, rows());
    this->put_weights([&](Registers& r, int tile, int e, int t, int i) {
      const float weight = -this->between(0, t, i) * extra.beta[t] * r.s[tile][e];
      r.r[0][tile][e] *= weight * extra.beta[t];
      return weight;
    });
    this->add_columns(columns(0), Dk());
    this->multiply_pairs(shared.rows, keys());
    this->put_weights([&](Registers& r, int tile, int e, int t, int i) {
      const float k_k = extra.beta[i] * extra.beta[t] * r.s[tile][e];
      r.y[0][tile][e] = k_k * k_k;
      const int later = i > t ? i : t;
      const double p = static_cast<double>(this->decay_between(0, t, i)) * extra.r[later];
      return static_cast<float>(-2.0 * p * static_cast<double>(extra.beta[i] * k_k));
    });
    this->add_columns({shared.columns, nullptr}, Dk());
    return e_u;
  }

  // E^T from after the chunk to before it; returns its product with U^T.
  KALMANET_KERNEL double update_e(const float* state) {
    float* const e = carry() + kState;
    const float total = shared.total[1];
    group.each([](int, Registers& r) { r.sum = 0.0; });
    for (int half = 0; half < 2; ++half) {
      this->each_half_tile(half, [&](Registers& r, int, float (&y)[4], int64_t at) {
        float u[4];
        load4(e + at, y);
        load4(state + kState + at, u);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.sum += static_cast<double>(y[i] * u[i]);
          y[i] *= total;
        }
      });
      this->add_update(half, {extra.do_columns, nullptr}, extra.mix_weight, columns(0));
      this->each_half_tile(half,
                           [&](Registers&, int, float (&y)[4], int64_t at) { store4(e + at, y); });
    }
    return this->sum_block();
  }

  // S likewise; returns its product with H.
  KALMANET_KERNEL double update_s(const float* state) {
    float* const s = carry();
    const float total = shared.total[0];
    group.each([](int, Registers& r) { r.sum = 0.0; });
    for (int half = 0; half < 2; ++half) {
      this->each_half_tile(half, [&](Registers& r, int, float (&y)[4], int64_t at) {
        float h[4];
        load4(s + at, y);
        load4(state + at, h);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.sum += static_cast<double>(y[i] * h[i]);
          y[i] = total * y[i] - static_cast<float>(extra.through_f * static_cast<double>(h[i]));
        }
      });
      this->add_update(half, columns(1), extra.minus_start, columns(0));
      this->add_update(half, columns(0), extra.minus_start, columns(1));
      this->add_update(half, {shared.columns, nullptr}, extra.key_weight,
                       {shared.columns, nullptr});
      this->each_half_tile(half,
                           [&](Registers&, int, float (&y)[4], int64_t at) { store4(s + at, y); });
    }
    return this->sum_block();
  }

  KALMANET_KERNEL void store() {
    if (backward.dbeta.data != nullptr) {
      take([](float& y, float& dk, float&, int) { y = dk; });
      measure_with(kBetaKey, shared.columns);
      take([](float& y, float&, float& dv, int) { y = dv; });
      measure_with(kBetaValue, shared.values);
      group.each([&](int thread, Registers&) {
        if (thread >= n) return;
        store_scalar<float>(
            backward.dbeta, piece.row, t0 + thread, head,
            static_cast<double>(extra.dots[kBetaKey][thread]) + extra.dots[kBetaValue][thread]);
      });
    }
    take([&](float& y, float& dk, float&, int t) { y = extra.beta[t] * dk; });
    store_gradient_rows(backward.dk, backward.dk_parts);
    take([&](float& y, float&, float& dv, int t) { y = extra.beta[t] * dv; });
    store_gradient_rows(backward.dv, backward.dv_parts);
  }
  KALMANET_KERNEL void store_gradient_rows(const Array& gradient, void* parts) {
    if (parts != nullptr) {
      this->store_rows(parts, [](Registers& r) -> Tiles { return r.y; });
    } else if (gradient.data != nullptr) {
      this->store_tiles(gradient, head);
    }
  }

  KALMANET_KERNEL void run_chunk(int64_t begin, float* state) {
    load_chunk(begin, true);
    const double norm2 = multiply_states(state);
    const double e_u = multiply_tokens(state);
    group.barrier();
    this->put_pairs();
    const double s_h = update_s(state);
    this->gradients_of_gates(norm2, s_h, e_u);
    store();
  }

  KALMANET_KERNEL void run() {
    const int chunks = static_cast<int>((piece.end - piece.begin + L::kTokens - 1) / L::kTokens);
    if (chunks == 0) return;
    states = scratch;
    this->load_state(false);
    this->load_state(true);
    load_carry();
    for (int i = 0; i + 1 < chunks; ++i) {
      load_chunk(piece.begin + i * L::kTokens, false);
      advance_states(chunk_state(i), chunk_state(i + 1));
    }
    for (int i = chunks; i-- > 0;) run_chunk(piece.begin + i * L::kTokens, chunk_state(i));
  }
};

// Block `block` of `blocks`, each with its own memory: every so-manieth piece and head that was not
// left over.
template <class Group>
KALMANET_KERNEL void run_gradient_chunks(Group& group, GradientChunkShared& shared,
                                         const BackwardJob& backward, int64_t block,
                                         int64_t blocks) {
  const GkaJob& job = backward.in;
  float* const scratch = static_cast<float*>(backward.block_scratch) +
                         block * GradientChunkBody<Group>::kScratchFloats;
  for (int64_t i = block; i < job.num_pieces * job.H; i += blocks) {
    if (job.left_over[i] != 0) continue;
    GradientChunkBody<Group> body{
        {{{{{group, shared}, job, piece_of(job, i / job.H), i % job.H, scratch}}, backward},
         shared},
        scratch};
    body.run();
    group.barrier();
  }
}

}  // namespace kalmanet::cuda
