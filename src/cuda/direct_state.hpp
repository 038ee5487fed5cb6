// What the direct chunk kernel does around its solves: tensors into quads, what is a token's own,
// |H_t|, and the states, which lie in scratch memory in the order of a warp's sums: warp w has rows
// 16 w .. of H and of U^T.
#pragma once

#include <cstring>

#include "cuda/direct_inverse.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

// A chunk ends where its keys have faded by e^{-4}: more would take more steps than a new chunk
// costs. A single token that forgets more than e^{-30} (its states' sums are float32) is left over.
inline constexpr double kLongestForgetting = 4.0, kMostForgotten = 30.0;
inline constexpr double kMostForgottenValues = 40.0;

template <class Group>
struct DirectState : DirectInverse<Group> {
  using Base = DirectInverse<Group>;
  using Base::group, Base::shared;
  using L = DirectLayout;
  using Registers = DirectRegisters;
  static constexpr int64_t kStateFloats = 2 * 128 * 128;  // a block's scratch

  const GkaJob& job;
  Piece piece;
  int64_t head;
  float* states;  // H, then U^T: [warp][tile of 8 columns][lane][4]
  int64_t t0 = 0;
  int n = 0;  // tokens

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
          v[i] = from.data == nullptr ? 0.0f
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
          to.data[u ? to.at(column, row) : to.at(row, column)] = v[i];
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

  // Rows of a [B,T,heads,128] tensor, on their way into raw: 8 tokens from `first` on, 16 bytes a
  // load, eight lanes beside each other in as many rows. (So that eight lanes' stores are a matrix.)
  KALMANET_KERNEL void fetch_rows(const Array& a, int64_t a_head, int first, int at) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head);
    const int64_t left = piece.end - t0;
    group.each([&](int thread, Registers& r) {
      const int token = first + thread % 8;
      const uint16_t* const row = base + token * a.stride[1] + thread % 32 / 8 * 8;
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (token < left) {
          load16(row + i * 32, r.raw[at + i]);
        } else {
          r.raw[at + i][0] = r.raw[at + i][1] = r.raw[at + i][2] = r.raw[at + i][3] = 0;
        }
      }
    });
  }
  // They, scaled to float16 by a power of two a token, into a tile; tokens from n on are zero. unit
  // <- what a number there stands for.
  KALMANET_KERNEL void put_rows(int first, int at, int log2, Quad* to, float* unit) {
    group.each([&](int, Registers& r) {
      uint32_t most = 0;
      KALMANET_UNROLL
      for (int i = 0; i < 16; ++i) {
        const uint32_t v = r.raw[at + i / 4][i % 4];
        const uint32_t low = v & 0x7fff, high = v >> 16 & 0x7fff;
        most = low > most ? low : most;
        most = high > most ? high : most;
      }
      r.most = most;
    });
    group.template max_apart<8>([](Registers& r) -> uint32_t& { return r.most; });
    group.each([&](int thread, Registers& r) {
      const int token = first + thread % 8;
      const float power = token < n ? power_for(r.most, log2) : 0.0f;
      if (token < n && r.most >= 0x7f80) shared.ill = 1;
      if (thread % 32 < 8) unit[token] = token < n && r.most > 0 ? 1.0f / power : 0.0f;
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t v[4];
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) {
          const uint32_t both = token < n ? r.raw[at + i][e] : 0;
          v[e] = pack_float16(low_bfloat16(both) * power, high_bfloat16(both) * power);
        }
        const int column = thread % 32 / 8 + i * 4;  // of 16 of 8 dims
        store16(&to[token / 16 * 8 + column / 2].word[token / 8 % 2 * 2 + column % 2][token % 8 * 4],
                v);
      }
    });
  }

  // By the last four warps: 16 tokens each, the others have work.
  KALMANET_KERNEL void fetch_rows_of_half(const Array& a, int64_t a_head, int warp) {
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) fetch_rows(a, a_head, (warp - 4) * 16 + i * 8, 4 * i);
  }
  KALMANET_KERNEL void put_rows_of_half(int warp, int log2, Quad* to, int which) {
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      put_rows((warp - 4) * 16 + i * 8, 4 * i, log2, to, shared.unit[which]);
    }
  }

  // Everything that is a token's own, what follows from the gates, and how many tokens the chunk
  // has: by the first warp, two tokens a lane.
  KALMANET_KERNEL void load_scalars() {
    group.with_warp(0, [&] {
      const int64_t left = piece.end - t0;
      const auto at = [&](const Array& a, int t, double absent) {
        return t < left ? scalar_at<float>(a, piece.row, t0 + t, head, absent)
                        : static_cast<float>(absent);
      };
      KALMANET_UNROLL
      for (int which = 0; which < 2; ++which) {
        group.each([&](int thread, Registers& r) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            r.pair[i] = static_cast<double>(at(which == 0 ? job.gk : job.g, 2 * thread + i, 0.0));
          }
        });
        scan();
        group.each([&](int, Registers& r) {
          r.since[which][0] = r.pair[0], r.since[which][1] = r.pair[1];
        });
      }
      group.each([&](int thread, Registers& r) {
        r.extreme[0] = -64.0f;
        KALMANET_UNROLL
        for (int i = 1; i >= 0; --i) {
          const int t = 2 * thread + i;
          shared.alpha[t] = at(job.alpha, t, 1.0);
          const float ridge = at(job.ridge, t, job.ridge_ratio);
          shared.ridge[t] = ridge > 0.0f ? ridge : NAN;
          const float beta = at(job.beta, t, 1.0);
          shared.beta2[t] = t < left ? beta * beta : 0.0f;
          const bool faded =
              r.since[0][i] < -kLongestForgetting || r.since[1][i] < -kMostForgottenValues;
          if (faded) r.extreme[0] = -static_cast<float>(t);
        }
        if (thread == 0 && !(r.since[0][0] > -kMostForgotten && r.since[1][0] > -kMostForgotten)) {
          shared.ill = 1;
        }
      });
      group.max_warp([](Registers& r) -> float& { return r.extreme[0]; });
      group.each([&](int thread, Registers& r) {
        int count = static_cast<int>(-r.extreme[0]);
        if (count > left) count = static_cast<int>(left);
        if (count < 1) count = 1;
        r.extreme[1] = static_cast<float>(count);
        if (thread == 0) shared.tokens = count;
      });
      KALMANET_UNROLL
      for (int which = 0; which < 2; ++which) {
        group.each([&](int thread, Registers& r) {  // of the last token, to all
          const int last = static_cast<int>(r.extreme[1]) - 1;
          r.other = 2 * thread == last ? r.since[which][0] : 0.0;
          if (2 * thread + 1 == last) r.other = r.since[which][1];
        });
        group.template sum_lanes<32>([](Registers& r) -> double& { return r.other; });
        group.each([&](int thread, Registers& r) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int t = 2 * thread + i;
            const bool real = t < static_cast<int>(r.extreme[1]);
            const float since = real ? static_cast<float>(r.since[which][i]) : 0.0f;
            const float beta2 = real ? shared.beta2[t] : 0.0f;
            shared.start[which][t] = expf(since);
            shared.since_end[which][t] = beta2 * expf(static_cast<float>(r.other) - since);
            (which == 0 ? shared.weight : shared.value_weight)[t] = beta2 * expf(-since);
          }
          if (thread == 0) shared.total[which] = expf(static_cast<float>(r.other));
        });
      }
    });
  }

  // pair <- the sums over the warp's pairs up to and with each.
  KALMANET_KERNEL void scan() {
    group.each([](int, Registers& r) { r.scan = r.pair[0] + r.pair[1]; });
    KALMANET_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      add_before(step, [&](int thread, Registers& r) {
        if (thread % 32 >= step) r.scan += r.other;
      });
    }
    add_before(1, [](int thread, Registers& r) {
      r.pair[0] = thread % 32 == 0 ? r.pair[0] : r.other + r.pair[0];
      r.pair[1] += r.pair[0];
    });
  }
  template <class F>
  KALMANET_KERNEL void add_before(int step, F&& f) {
    group.shuffle([](Registers& r) -> double& { return r.other; },
                  [](Registers& r) { return r.scan; }, [step](int thread) { return thread - step; });
    group.each(f);
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

  KALMANET_KERNEL DirectMeasured& measured() {
    return *reinterpret_cast<DirectMeasured*>(&shared.gains);
  }

  // k_t^T H_0 k_t and the keys' own products, from which |H_t| follows. `scale`: what h is
  // multiplied by. A barrier before them is read.
  KALMANET_KERNEL void measure_keys(float scale) {
    this->clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      group.each([&](int, Registers& r) {
        pack_state<false>(r.h[2 * k], r.h[2 * k + 1], scale, r.a);
      });
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
      dot_columns(measured().dots, tile, [=](int, Registers& r, int i) {
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
          if (j == t) measured().norm2[t] = g;
        }
      }
    });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[0]; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[1]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 4 != 0) return;
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        measured().gram[thread / 128][thread / 32 % 4 * 16 + this->row_of(thread, 2 * half)] =
            r.dot[half];
      }
    });
  }

  // r.largest <- the largest beta_j^2 and unit of k_j k_j^T or k_j v_j^T (`u`): what the chunk's sums
  // are counted in, so that no factor overflows.
  KALMANET_KERNEL void find_largest(bool u) {
    group.each([&](int thread, Registers& r) {
      r.largest = 0;
      KALMANET_UNROLL
      for (int t = thread % 32; t < L::kTokens; t += 32) {
        const float e = t < n ? shared.beta2[t] * shared.unit[0][t] * shared.unit[u ? 1 : 0][t] : 0.0f;
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
          const float w1 =
              divide(weight[j + 1] * unit[j + 1] * shared.unit[0][j + 1], r.largest);
          KALMANET_UNROLL
          for (int e = i; e < i + 2; ++e) {
            r.z[0][k][e] = split_float16(low_float16(r.a[0][e]) * w0,
                                         high_float16(r.a[0][e]) * w1, r.z[1][k][e]);
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

  // The next chunk's rows towards L2: by the last four warps, half a row a thread.
  KALMANET_KERNEL void prefetch_rows(const Array& a, int64_t a_head, int64_t from) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, from, a_head);
    const int64_t left = piece.end - from;
    group.each([&](int thread, Registers&) {
      const int token = thread % 128 / 2;
      if (token < left) prefetch(base + token * a.stride[1] + thread % 2 * 64);
    });
  }
  KALMANET_KERNEL void prefetch_scalars(const Array& a, int64_t from) {
    if (a.data == nullptr) return;
    const int64_t left = piece.end - from;
    group.each([&](int thread, Registers&) {
      const int token = thread % 128;
      if (token >= 64 || token >= left) return;
      prefetch(static_cast<const char*>(a.data) +
               offset_of(a, piece.row, from + token, head) * (a.dtype == DType::float32 ? 4 : 2));
    });
  }
};

}  // namespace kalmanet::cuda
