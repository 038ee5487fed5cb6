// What the backward's last two matrix-unit kernels share (backward_tile_keys.hpp, _values.hpp):
// their states, rows of sums, and the gradients of gates.
//
// A gate's gradient is the sum of all actions that cross it (src/cpu/gka_gate_gradient.hpp), of
// what tokens before it and the start put into a state with what it and later tokens and the carry
// take out. No differences: exact also where a decay leaves almost nothing.
#pragma once

#include "cuda/backward_tiles.hpp"

namespace kalmanet::cuda {

template <class Group>
struct TileGates : BackwardTiles<Group> {
  using Base = BackwardTiles<Group>;
  using Base::group, Base::shared, Base::backward, Base::job, Base::piece, Base::head, Base::t0,
      Base::n;
  using L = TileLayout;
  using Registers = TileRegisters;
  using Rows = float (&)[8][4];
  using State = float (&)[2][8][4];

  float* scratch;  // states before each chunk, each as the sums of the threads that update it

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
  struct Start {
    KALMANET_KERNEL State operator()(Registers& r) const { return r.other; }
  };

  KALMANET_KERNEL float* chunk_state(int chunk) const {
    return scratch + static_cast<int64_t>(chunk) * L::kState;
  }
  KALMANET_KERNEL void store_state(float* to) {
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      store4(to + Base::scratch_at(thread, mm, tile), r.state[mm][tile]);
    });
  }
  KALMANET_KERNEL void scale_state(float factor) {
    this->each_of_state([&](Registers& r, int, int mm, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.state[mm][tile][i] *= factor;
    });
  }
  template <class Of>
  KALMANET_KERNEL void load_state(const float* from, Of&& of) {
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      load4(from + Base::scratch_at(thread, mm, tile), of(r)[mm][tile]);
    });
  }
  // The state's elements, element(row, column), by way of scratch memory: one copy of the code.
  template <class F>
  KALMANET_KERNEL void take_state(float* by, F&& element) {
    KALMANET_LOOP
    for (int first = 0; first < 16; first += 4) {
      group.each([&](int thread, Registers&) {
        float v[4][4];  // (all of it under way before any is written)
        KALMANET_UNROLL
        for (int i = 0; i < 16; ++i) {
          const int at = first + i / 4;
          v[i / 4][i % 4] = element(Base::state_row(thread, at / 8, i % 4),
                                    Base::column_of(thread, at % 8, i % 4));
        }
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) store4(by + Base::scratch_at(thread, 0, first + i), v[i]);
      });
    }
    load_state(by, Own());
  }
  // The one before the piece.
  KALMANET_KERNEL void take_start(bool u) {
    const StateView<float> from = piece.first
                                      ? state_view<float>(u ? job.u0 : job.h0, piece.sequence, head)
                                      : slot_view<float>(job, piece.slot, head, u);
    take_state(chunk_state(0), [&](int row, int column) {
      return from.data == nullptr || !has_element<Group>(job, u, row, column)
                 ? 0.0f
                 : from.data[from.at(row, column)];
    });
  }

  // Of a piece of short memory that is cut elsewhere: the state before a chunk, from the 64 tokens
  // before it, into chunk_state(0). Begins after a barrier; its tiles are free after the next one.
  KALMANET_KERNEL void find_start(int chunk, bool u) {
    this->set_chunk(chunk);
    const int64_t low = piece.first ? piece.begin : t0 - L::kTokens;
    const int64_t from = t0 - L::kTokens > low ? t0 - L::kTokens : low;
    n = static_cast<int>(t0 - from);
    t0 = from;
    this->fetch(job.k, head / job.k_group, 0);
    if (u) this->fetch(job.v, head / job.v_group, 1);
    group.with_warp(0, [&] { this->load_gates(u ? 1 : 0, true); });
    group.barrier();
    this->put(0, this->keys());
    if (u) this->put(1, this->values());
    this->put_weighted_keys(this->now().to_end, this->m());
    this->each_of_state([](Registers& r, int, int mm, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.other[mm][tile][i] = 0.0f;
    });
    group.barrier();
    this->template add_outer<true, Base::kLows>(this->m(), u ? this->values() : this->keys(),
                                                Start());
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      store4(chunk_state(0) + Base::scratch_at(thread, mm, tile), r.other[mm][tile]);
    });
    this->set_chunk(chunk);
  }

  // The chunk's first state, in registers.other, as a tile: f(registers, state's four elements, its
  // own) on the way. Begins and ends with a barrier.
  template <class F>
  KALMANET_KERNEL void put_start(F&& f) {
    group.barrier();
    this->each_of_state([&](Registers& r, int thread, int mm, int tile) {
      const float (&v)[4] = r.other[mm][tile];
      f(r, r.state[mm][tile], v);
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        store_two<128>(this->state(), Base::state_row(thread, mm, 2 * h),
                       Base::column_of(thread, tile, 0), v[2 * h], v[2 * h + 1]);
      }
    });
    group.barrier();
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

  // f(registers, h, tile, place of two neighbours) for sums' rows in [token][width] of a row
  // stride.
  template <class T, class F>
  KALMANET_KERNEL void each_row(T* rows, int64_t stride, int width, F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int t = Base::token_of(thread, 2 * h);
        if (t >= n) continue;
        T* const to = rows + t * stride + Base::column_of(thread, 0, 0);
        const float beta = this->now().beta[t];
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          if (!reaches<Group>(width, Base::column_of(thread, tile, 0))) continue;
          f(r, h, tile, beta, to + tile * 8);
        }
      }
    });
  }
  // The same in the workspace, [place][width] float32.
  template <class F>
  KALMANET_KERNEL void each_own_row(void* rows, int width, F&& f) {
    each_row(static_cast<float*>(rows) + place_of(backward, piece, t0, head) * width, job.H * width,
             width, f);
  }
  // beta_t times a gradient's rows.
  template <class Of>
  KALMANET_KERNEL void store_rows(const Array& gradient, void* parts, int width, Of&& of) {
    if (parts != nullptr) {
      each_own_row(parts, width, [&](Registers& r, int h, int tile, float beta, float* to) {
        store_pair(to, beta * of(r)[tile][2 * h], beta * of(r)[tile][2 * h + 1]);
      });
    } else if (gradient.data != nullptr) {
      each_row(static_cast<uint16_t*>(gradient.data) + offset_of(gradient, piece.row, t0, head),
               gradient.stride[1], width,
               [&](Registers& r, int h, int tile, float beta, uint16_t* to) {
                 store_word(to, pack_numbers<Group>(gradient, beta * of(r)[tile][2 * h],
                                                    beta * of(r)[tile][2 * h + 1]));
               });
    }
  }

  // shared.crossing <- of the actions of token t (rows) on token i (columns), of(registers), those
  // of t < c on i >= c, for every c: each row group's part. Takes registers.s. No barrier.
  template <class Of>
  KALMANET_KERNEL void put_crossing(Of&& of) {
    this->template sum_along<true>(of, First());
    KALMANET_UNROLL
    for (int tile = 0; tile < 8; ++tile) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int column = Base::pair_of(thread, tile, c);
          r.column[c] = 0.0f;
          KALMANET_UNROLL
          for (int h = 0; h < 2; ++h) {
            if (Base::token_of(thread, 2 * h) < column) r.column[c] += r.s[tile][2 * h + c];
          }
        }
      });
      group.sum_rows([](Registers& r) -> float& { return r.column[0]; });
      group.sum_rows([](Registers& r) -> float& { return r.column[1]; });
      group.each([&](int thread, Registers& r) {
        if (thread >= 128 || thread % 32 >= 4) return;
        float* const to = shared.crossing[thread / 32];
        to[Base::pair_of(thread, tile, 0)] = r.column[0];
        to[Base::pair_of(thread, tile, 1)] = r.column[1];
      });
    }
  }

  // By one warp: a gate's gradient from the actions of the start on each token (in pair), carried:
  // what the state before the chunk and what comes after it make; share: of a token's product with
  // the latter.
  KALMANET_KERNEL void store_gates(const Array& gradient, float carried, float share) {
    this->template scan<true>();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int t = thread % 32 * 2 + i;
        float sum = r.pair[i];
        for (int rows = 0; rows < 4; ++rows) sum += shared.crossing[rows][t];
        r.kept[i] = sum;
        r.pair[i] = share * this->now().beta[t] * this->dot(kTileCarry, t);
        r.column[i] = r.pair[i];
      }
    });
    this->template scan<false>();
    group.shuffle([](Registers& r) -> float& { return r.passed; },
                  [](Registers& r) { return r.pair[1]; }, [](int thread) { return thread - 1; });
    group.each([&](int thread, Registers& r) {
      const float before = thread % 32 == 0 ? 0.0f : r.passed;
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int t = thread % 32 * 2 + i;
        if (t >= n) continue;
        const float put = i == 0 ? before : before + r.column[0];
        store_scalar<float>(gradient, piece.row, t0 + t, head,
                            static_cast<double>(carried + put + r.kept[i]));
      }
    });
  }
};

}  // namespace kalmanet::cuda
