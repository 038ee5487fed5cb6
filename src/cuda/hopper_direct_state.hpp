// The direct solver on Hopper: states in scratch memory, in the order of the block's sums: warp w
// has rows 16 w ..; and |H_t|.
#pragma once

#include "cuda/async_copy.hpp"
#include "cuda/hopper_direct_tokens.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperState : HopperTokens<Group> {
  using Base = HopperTokens<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::n;
  using L = HopperLayout;
  using Registers = HopperRegisters;

  static KALMANET_KERNEL float* sums(Registers& r) { return r.y; }
  static KALMANET_KERNEL float* token_sums(Registers& r) { return r.s; }
  KALMANET_KERNEL void finish_sums() {
    commit_products(group);
    wait_products<0>(group);
    settle<32>(group, sums);
  }
  KALMANET_KERNEL void finish_token_sums() {
    commit_products(group);
    wait_products<0>(group);
    settle<32>(group, token_sums);
  }

  // Tile 0 of the thread's; the next is kThreads * 4 further.
  static constexpr int kTileFloats = L::kThreads * 4;
  KALMANET_KERNEL float* state_at(bool u, int thread) {
    float* const states = shared.states;
#ifdef __CUDACC__
    __builtin_assume(__isGlobal(states));
#endif
    return states + (u ? 128 * 128 : 0) + thread * 4;
  }

  // Whether four elements of a state are more than zeros that no tensor has: the others are neither
  // written nor read.
  KALMANET_KERNEL bool is_stored(bool u, int thread, int tile) const {
    return has_element<Group>(job, u, thread / 32 * 16, tile * 8);
  }
  // from: state_at(u, thread).
  KALMANET_KERNEL void load_stored(const float* from, bool u, int thread, int tile,
                                   float (&v)[4]) const {
    if (is_stored(u, thread, tile)) {
      load4(from + tile * kTileFloats, v);
    } else {
      v[0] = v[1] = v[2] = v[3] = shared.zero;  // (from memory: load_pivot says why)
    }
  }
  // Whether keys have no more than half the dims: then what the other half adds is left out.
  KALMANET_KERNEL bool is_half() const { return kAnyRows<Group> && job.K <= 64; }

  // The piece's own state into scratch; shared.warp as advance() leaves it.
  KALMANET_KERNEL void load_state(bool u) {
    const StateView<float> from = piece.first
                                      ? state_view<float>(u ? job.u0 : job.h0, piece.sequence, head)
                                      : slot_view<float>(job, piece.slot, head, u);
    group.each([&](int, Registers& r) { r.sum = 0; });
    const bool dense = from.data != nullptr && from.whole_pieces();
    KALMANET_LOOP
    for (int part = 0; part < 2; ++part) {  // of the columns: loads under way together
      group.each([&](int thread, Registers& r) {
        float v[8][4];
        const int row = sum_row(thread, 0), column = part * 64 + thread % 4 * 2;
        if (dense) {
          const float* const at = from.data + row * from.row + column;
          KALMANET_UNROLL
          for (int i = 0; i < 16; ++i) {
            float pair[2];
            if (has_element<Group>(job, u, row + i % 2 * 8, column + i / 2 * 8)) {
              load2(at + i % 2 * 8 * from.row + i / 2 * 8, pair);
            } else {
              pair[0] = pair[1] = 0.0f;
            }
            v[i / 2][i % 2 * 2] = pair[0], v[i / 2][i % 2 * 2 + 1] = pair[1];
          }
        } else {
          KALMANET_UNROLL
          for (int i = 0; i < 32; ++i) {
            const int at_row = row + i / 2 % 2 * 8, at_column = column + i / 4 * 8 + i % 2;
            v[i / 4][i % 4] = from.data == nullptr || !has_element<Group>(job, u, at_row, at_column)
                                  ? 0.0f
                                  : from.data[from.at(at_row, at_column)];
          }
        }
        float* const to = state_at(u, thread) + part * 8 * kTileFloats;
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          if (is_stored(u, thread, part * 8 + tile)) store4(to + tile * kTileFloats, v[tile]);
          r.sum += (v[tile][0] * v[tile][0] + v[tile][1] * v[tile][1]) +
                   (v[tile][2] * v[tile][2] + v[tile][3] * v[tile][3]);
        }
      });
    }
    put_squares(u);
  }
  KALMANET_KERNEL void store_state(bool u, const StateView<float>& to) {
    if (to.data == nullptr) return;
    group.each([&](int thread, Registers&) {
      KALMANET_LOOP
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        load_stored(state_at(u, thread), u, thread, tile, v);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = sum_row(thread, i / 2), column = sum_column(thread, 2 * tile) + i % 2;
          if (has_element<Group>(job, u, row, column)) to.data[to.at(row, column)] = v[i];
        }
      }
    });
  }
  // H or U into h.
  KALMANET_KERNEL void fetch_state(bool u) {
    group.each([&](int thread, Registers& r) {
      const float* const from = state_at(u, thread);
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        load_stored(from, u, thread, tile, v);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.h[4 * tile + i] = v[i];
      }
    });
  }

  // shared.warp[u] <- each warp's sum of the threads' sums (of squares).
  KALMANET_KERNEL void put_squares(bool u) {
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.warp[u ? 1 : 0][thread / 32] = r.sum;
    });
  }
  KALMANET_KERNEL float squares_of_state(bool u) const {
    float sum = 0.0f;
    KALMANET_UNROLL
    for (int w = 0; w < 8; ++w) sum += shared.warp[u ? 1 : 0][w];
    return sum;
  }

  // H, times `scale`, as float16 cores for measure_keys.
  KALMANET_KERNEL void put_state(float scale) {
    group.each([&](int thread, Registers& r) {
      Core* const to = shared.state + thread / 128 * 128;
      KALMANET_UNROLL
      for (int j = 0; j < 32; ++j) {
        Base::word_of(to, 16, thread, j) = pack_float16(r.h[2 * j] * scale, r.h[2 * j + 1] * scale);
      }
    });
  }

  // s += a b, or = a b, over all dims that keys have.
  template <bool kRows, class A, class B>
  KALMANET_KERNEL void multiply_dims(A&& a, B&& b, bool keep) {
    if (is_half()) {
      multiply_shared<4, kRows>(group, token_sums, a, b, keep);
    } else {
      multiply_shared<8, kRows>(group, token_sums, a, b, keep);
    }
  }

  // shared.measured, from which |H_t| follows. A barrier before it is read.
  KALMANET_KERNEL void measure_keys(float scale) {
    const auto keys = [&](int) { return Cores{shared.keys, 16}; };
    begin_products(group);
    multiply_dims<false>(keys, keys, false);
    finish_token_sums();
    group.each([&](int thread, Registers& r) {
      r.dot[0] = r.dot[1] = 0;
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int t = Base::token_of(thread, j), other = sum_column(thread, j) + c;
          const float g = r.s[2 * j + c];
          const float u = shared.weight[other] * shared.unit[0][other] * shared.unit[0][other];
          if (other <= t) r.dot[j % 2] += u * g * g;
          if (other == t && thread < 128) shared.measured.norm2[t] = g;
        }
      }
    });
    share_dots([&](int thread, int t, float dot) {
      if (thread < 128) shared.measured.gram[t] = dot;
    });
    begin_products(group);
    multiply_dims<true>(
        keys, [&](int thread) { return Cores{shared.state + thread / 128 * 8, 16}; }, false);
    finish_token_sums();
    group.each([&](int thread, Registers& r) {
      r.dot[0] = r.dot[1] = 0;
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        const uint32_t k = Base::half_word(shared.keys, thread, j);
        r.dot[j % 2] += low_float16(k) * r.s[2 * j] + high_float16(k) * r.s[2 * j + 1];
      }
    });
    const float per_scale = divide(1.0f, scale);
    share_dots([&](int thread, int t, float dot) {
      shared.measured.product[thread / 128][t] = dot * per_scale;
    });
  }
  // put(thread, token, the sum over a row's lanes of dot) of the lane's two tokens, by one lane.
  template <class Put>
  KALMANET_KERNEL void share_dots(Put&& put) {
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {
      group.template sum_lanes<4>([half](Registers& r) -> float& { return r.dot[half]; });
      group.each([&](int thread, Registers& r) {
        if (thread % 4 == 0) put(thread, Base::token_of(thread, half), r.dot[half]);
      });
    }
  }

  // r.largest <- the largest beta_j^2 and unit of k_j k_j^T or k_j v_j^T (`u`): what the chunk's
  // sums are counted in, so that no factor overflows.
  KALMANET_KERNEL void find_largest(bool u) {
    group.each([&](int thread, Registers& r) {
      r.largest = 0;
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int t = thread % 32 + 32 * i;
        const float e =
            t < n ? shared.beta2[t] * shared.unit[0][t] * shared.unit[u ? 1 : 0][t] : 0.0f;
        r.largest = e > r.largest ? e : r.largest;
      }
    });
    group.max_warp([](Registers& r) -> float& { return r.largest; });
    group.each([](int, Registers& r) { r.largest = r.largest > 0.0f ? r.largest : 1.0f; });
  }

  // state <- total state + K^T diag(weights) X, X = K or V (`u`), in scratch, and the squares of
  // its elements. H stays in h.
  KALMANET_KERNEL void advance(bool u) {
    fetch_state(u);
    find_largest(u);
    group.each([&](int, Registers& r) {
      const float keep = divide(shared.total[u ? 1 : 0], r.largest);
      KALMANET_UNROLL
      for (int i = 0; i < 64; ++i) r.h[i] *= keep;
      r.sum = 0;
    });
    add_tokens(u);
    group.each([&](int thread, Registers& r) {
      float* const to = state_at(u, thread);
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          v[i] = r.h[4 * tile + i] *= r.largest;
          r.sum += v[i] * v[i];
        }
        if (is_stored(u, thread, tile)) store4(to + tile * kTileFloats, v);
      }
    });
    put_squares(u);
  }
  // h += K^T diag(weights) X.
  KALMANET_KERNEL void add_tokens(bool u) {
    const Core* const right = u ? shared.reading.values : shared.keys;
    const float* const weight = shared.since_end[u ? 1 : 0];
    const float* const unit = shared.unit[u ? 1 : 0];
    this->load_columns(shared.keys, 0);
    group.each([&](int thread, Registers& r) {
      const float per_largest = divide(1.0f, r.largest);
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {  // of 8 tokens, two the lane's, two words each
        const int token = sum_column(thread, 2 * k);
        const float w0 = weight[token] * unit[token] * shared.unit[0][token] * per_largest;
        const float w1 =
            weight[token + 1] * unit[token + 1] * shared.unit[0][token + 1] * per_largest;
        KALMANET_UNROLL
        for (int j = 2 * k; j < 2 * k + 2; ++j) {
          const uint32_t keys = r.f[0][j];
          r.f[0][j] = split_float16(low_float16(keys) * w0, high_float16(keys) * w1, r.f[1][j]);
        }
      }
    });
    const auto h = [](Registers& r) -> float* { return r.h; };
    begin_products(group);
    KALMANET_UNROLL
    for (int part = 1; part >= 0; --part) {
      KALMANET_UNROLL
      for (int k = 0; k < 4; ++k) {
        multiply_wide<128, true>(
            group, h, [part, k](Registers& r) { return r.f[part] + 4 * k; },
            [=](int) { return Cores{right + 2 * k * 16, 16}; });
      }
    }
    commit_products(group);
    wait_products<0>(group);
    settle<64>(group, h);
  }
};

}  // namespace kalmanet::cuda
