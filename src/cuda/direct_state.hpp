// The direct chunk kernel's states, which lie in scratch memory in the order of a warp's sums: warp
// w has rows 16 w .. of H and of U^T; and |H_t|.
#pragma once

#include "cuda/direct_tokens.hpp"

namespace kalmanet::cuda {

template <class Group>
struct DirectState : DirectTokens<Group> {
  using Base = DirectTokens<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n;
  using L = DirectLayout;
  using Registers = DirectRegisters;
  static constexpr int64_t kStateFloats = 2 * 128 * 128;  // a block's scratch

  KALMANET_KERNEL float* state_at(bool u, int thread, int tile) {
    return states + (u ? 128 * 128 : 0) +
           (static_cast<int64_t>(thread / 32 * 16 + tile) * 32 + thread % 32) * 4;
  }
  KALMANET_KERNEL static int state_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
  }
  KALMANET_KERNEL static int state_column(int thread, int tile, int i) {
    return tile * 8 + thread % 4 * 2 + i % 2;
  }

  // Whether H, or U^T, has such an element.
  KALMANET_KERNEL bool has(bool u, int row, int column) const {
    return has_element<Group>(job, u, u ? column : row, u ? row : column);
  }

  // The piece's own state into scratch; shared.warp as advance() leaves it.
  KALMANET_KERNEL void load_state(bool u) {
    const StateView<float> from = piece.first
                                      ? state_view<float>(u ? job.u0 : job.h0, piece.sequence, head)
                                      : slot_view<float>(job, piece.slot, head, u);
    group.each([&](int thread, Registers& r) {
      r.sum = 0;
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = state_row(thread, i), column = state_column(thread, tile, i);
          v[i] = from.data == nullptr || !has(u, row, column)
                     ? 0.0f
                     : from.data[u ? from.at(column, row) : from.at(row, column)];
        }
        store4(state_at(u, thread, tile), v);
        r.sum += (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
      }
    });
    put_squares(u);
  }
  KALMANET_KERNEL void store_state(bool u, const StateView<float>& to) {
    if (to.data == nullptr) return;
    group.each([&](int thread, Registers&) {
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        load4(state_at(u, thread, tile), v);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = state_row(thread, i), column = state_column(thread, tile, i);
          if (has(u, row, column)) to.data[u ? to.at(column, row) : to.at(row, column)] = v[i];
        }
      }
    });
  }
  // H or U^T into h.
  KALMANET_KERNEL void fetch_state(bool u) {
    group.each([&](int thread, Registers& r) {
      const float* const from = state_at(u, thread, 0);
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) load4(from + tile * 128, r.h[tile]);
    });
  }

  // shared.warp[u] <- each warp's sum of the threads' sums (of squares).
  KALMANET_KERNEL void put_squares(bool u) {
    group.template sum_lanes<32>([](Registers& r) -> double& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.warp[u ? 1 : 0][thread / 32] = r.sum;
    });
  }
  KALMANET_KERNEL double squares_of_state(bool u) const {
    double sum = 0.0;
    for (int w = 0; w < 8; ++w) sum += shared.warp[u ? 1 : 0][w];
    return sum;
  }

  // Two neighbouring tiles of a state as left factor: a[0] high, a[1] low.
  template <bool kSplit>
  KALMANET_KERNEL static void pack_state(const float (&left)[4], const float (&right)[4],
                                         float scale, uint32_t (&a)[2][4]) {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&v)[4] = i < 2 ? left : right;
      const float v0 = v[i % 2 * 2] * scale, v1 = v[i % 2 * 2 + 1] * scale;
      if (kSplit) {
        a[0][i] = split_float16(v0, v1, a[1][i]);
      } else {
        a[0][i] = pack_float16(v0, v1);
      }
    }
  }

  // dots[warp][token] <- the sum of term(registers, tile, i) over the warp's dims, for sums of dims
  // x tokens.
  template <class F>
  KALMANET_KERNEL void dot_columns(float (*dots)[L::kTokens], int tile, F&& term) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int c = 0; c < 2; ++c) r.dot[c] = term(thread, r, c) + term(thread, r, c + 2);
    });
    group.sum_rows([](Registers& r) -> float& { return r.dot[0]; });
    group.sum_rows([](Registers& r) -> float& { return r.dot[1]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 >= 4) return;
      KALMANET_UNROLL
      for (int c = 0; c < 2; ++c) dots[thread / 32][this->column_of(thread, tile, c)] = r.dot[c];
    });
  }

  // k_t^T H_0 k_t and the keys' own products, from which |H_t| follows. `scale`: what h is
  // multiplied by. A barrier before them is read.
  KALMANET_KERNEL void measure_keys(float scale) {
    this->clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      group.each(
          [&](int, Registers& r) { pack_state<false>(r.h[2 * k], r.h[2 * k + 1], scale, r.a); });
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        this->load_right_transposed(0, [&](int) { return &shared.keys[block * 8 + k]; });
        this->add_y(2 * block, 0, 0);
      }
    }
    KALMANET_UNROLL
    for (int tile = 0; tile < 8; ++tile) {
      if (tile % 2 == 0) {
        this->load_left_transposed(0, [&](int w) { return &shared.keys[tile / 2 * 8 + w]; });
      }
      dot_columns(shared.measured.dots, tile, [=](int, Registers& r, int i) {
        const uint32_t both = r.a[0][tile % 2 * 2 + i / 2];
        return (i % 2 == 0 ? low_float16(both) : high_float16(both)) * r.y[tile][i];
      });
    }
    measure_products();
  }
  // Warp w: of tokens 16 (w % 4) .. with 32 (w / 4) .. .
  KALMANET_KERNEL void measure_products() {
    this->template clear_y<4>();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      this->load_left(0, [&](int w) { return &shared.keys[w % 4 * 8 + k]; });
      KALMANET_UNROLL
      for (int block = 0; block < 2; ++block) {
        this->load_right_transposed(
            0, [&](int w) { return &shared.keys[(w / 4 * 2 + block) * 8 + k]; });
        this->add_y(2 * block, 0, 0);
      }
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int t = thread / 32 % 4 * 16 + this->row_of(thread, 2 * half);
        r.dot[half] = 0;
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) {
          const int j = thread / 128 * 32 + this->column_of(thread, e / 2, e);
          const float g = r.y[e / 2][2 * half + e % 2];
          const float u = shared.weight[j] * shared.unit[0][j] * shared.unit[0][j];
          if (j <= t) r.dot[half] += u * g * g;
          if (j == t) shared.measured.norm2[t] = g;
        }
      }
    });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[0]; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[1]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 4 != 0) return;
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        shared.measured.gram[thread / 128][thread / 32 % 4 * 16 + this->row_of(thread, 2 * half)] =
            r.dot[half];
      }
    });
  }

  // r.largest <- the largest beta_j^2 and unit of k_j k_j^T or k_j v_j^T (`u`): what the chunk's
  // sums are counted in, so that no factor overflows.
  KALMANET_KERNEL void find_largest(bool u) {
    group.each([&](int thread, Registers& r) {
      r.largest = 0;
      KALMANET_UNROLL
      for (int t = thread % 32; t < L::kTokens; t += 32) {
        const float e =
            t < n ? shared.beta2[t] * shared.unit[0][t] * shared.unit[u ? 1 : 0][t] : 0.0f;
        r.largest = e > r.largest ? e : r.largest;
      }
    });
    group.max_warp([](Registers& r) -> float& { return r.largest; });
    group.each([](int, Registers& r) { r.largest = r.largest > 0.0f ? r.largest : 1.0f; });
  }

  // state <- total state + left diag(weights) K, left K^T or V^T (`u`), in scratch, and the squares
  // of its elements. (Loops over columns: code that runs once a chunk must be small, for all of it
  // together goes through the instruction cache.)
  KALMANET_KERNEL void advance(bool u) {
    find_largest(u);
    const Quad* const left = u ? shared.inverse[0] : shared.keys;
    const float* const weight = shared.since_end[u ? 1 : 0];
    const float* const unit = shared.unit[u ? 1 : 0];
    fetch_columns(u, 0);
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      this->load_left_transposed(0, [&](int w) { return left + k * 8 + w; });
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; i += 2) {
          const int j = k * 16 + thread % 4 * 2 + i / 2 * 8;
          const float w0 = divide(weight[j] * unit[j] * shared.unit[0][j], r.largest);
          const float w1 = divide(weight[j + 1] * unit[j + 1] * shared.unit[0][j + 1], r.largest);
          KALMANET_UNROLL
          for (int e = i; e < i + 2; ++e) {
            r.z[0][k][e] = split_float16(low_float16(r.a[0][e]) * w0, high_float16(r.a[0][e]) * w1,
                                         r.z[1][k][e]);
          }
        }
      });
    }
    group.each([](int, Registers& r) { r.sum = 0; });
    KALMANET_LOOP
    for (int block = 0; block < 8; ++block) {
      group.each([&](int, Registers& r) {
        const float keep = divide(shared.total[u ? 1 : 0], r.largest);
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) r.g[i / 4][i % 4] = r.f[i / 4][i % 4] * keep;
      });
      if (block < 7) fetch_columns(u, block + 1);
      KALMANET_UNROLL
      for (int k = 0; k < 4; ++k) {
        this->load_right(0, [&](int) { return &shared.keys[k * 8 + block]; });
        KALMANET_UNROLL
        for (int part = 1; part >= 0; --part) {
          this->add([](Registers& r, int j) -> float (&)[4] { return r.g[j]; },
                    [part, k](Registers& r) -> uint32_t (&)[4] { return r.z[part][k]; }, 0);
        }
      }
      group.each([&](int thread, Registers& r) {
        float squares = 0;
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            r.g[j][i] *= r.largest;
            squares += r.g[j][i] * r.g[j][i];
          }
          store4(state_at(u, thread, 2 * block + j), r.g[j]);
        }
        r.sum += static_cast<double>(squares);
      });
    }
    put_squares(u);
  }
  // 16 columns of a state into f.
  KALMANET_KERNEL void fetch_columns(bool u, int block) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 2; ++j) load4(state_at(u, thread, 2 * block + j), r.f[j]);
    });
  }
};

}  // namespace kalmanet::cuda
