// What the backward's direct solver does around its solves: tensors into fragments, what is a
// token's own, |H_t|, and the states, which lie in scratch memory in the order of a warp's sums:
// warp w has rows 16 w .. of H and of U.
#pragma once

#include <cstring>

#include "cuda/backward_direct_inverse.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda::direct32 {

// A chunk ends where its keys have faded by e^{-8}: more would take more steps than a new chunk
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
  int n = 0;                                    // tokens
  float k_power = 1, v_power = 1, q_power = 1;  // what the tensors are scaled by

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

  // Tokens t0.. of a [B,T,heads,128] tensor into shared memory, where P's low parts will be, and
  // the largest magnitude's bits.
  KALMANET_KERNEL StagedRows* stage() {
    static_assert(3 * sizeof(StagedRows) <= sizeof(shared.low));
    return reinterpret_cast<StagedRows*>(shared.low);
  }
  KALMANET_KERNEL void fetch_tile(const Array& a, int64_t a_head, int which) {
    group.each([&](int thread, Registers& r) { take_rows(a, a_head, thread, r.raw[which]); });
  }
  KALMANET_KERNEL void take_rows(const Array& a, int64_t a_head, int thread,
                                 uint32_t (&raw)[2][4]) {
    const bool real = has_column<Group>(a, thread % 16 * 8);
    fetch_rows(static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head),
               a.stride[1], real ? piece.end - t0 : 0, thread, raw);
  }
  KALMANET_KERNEL void stage_tile(int which) {
    group.each([&](int thread, Registers& r) {
      uint32_t most = 0;
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) {
        const uint32_t v = r.raw[which][i / 4][i % 4];
        const uint32_t low = v & 0x7fff, high = v >> 16 & 0x7fff;
        most = low > most ? low : most;
        most = high > most ? high : most;
      }
      r.most[which] = most;
      stage_rows(r.raw[which], thread, stage()[which]);
    });
    group.max_warp([which](Registers& r) -> uint32_t& { return r.most[which]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.largest[which][thread / 32] = r.most[which];
    });
  }

  // A staged tensor scaled to float16, by rows (if not null) and by columns (likewise). Returns the
  // power of two, NaN where the tensor is not finite.
  KALMANET_KERNEL float put_tile(int which, int log2, Left* rows, Left* columns) {
    uint32_t largest = 0;
    for (int w = 0; w < 8; ++w) {
      largest = shared.largest[which][w] > largest ? shared.largest[which][w] : largest;
    }
    largest = bfloat16_magnitude<Group>(job.q, largest);
    const float power = power_for(largest, log2);
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int part = 0; part < 4; ++part) {
          const uint32_t v = staged(stage()[which], m, thread / 32, thread % 32, part);
          const int token = m * 16 + thread % 32 / 4 + part % 2 * 8;
          r.t[part] = token < n ? pack_float16(low_number<Group>(job.q, v) * power,
                                               high_number<Group>(job.q, v) * power)
                                : 0;
        }
        if (rows != nullptr) {
          rows[(m * 8 + thread / 32) * 32 + thread % 32] = {{r.t[0], r.t[1], r.t[2], r.t[3]}};
        }
      });
      if (columns == nullptr) continue;
      this->transpose_all();
      group.each([&](int thread, Registers& r) {
        columns[(thread / 32 * 2 + m) * 32 + thread % 32] = {{r.t[0], r.t[2], r.t[1], r.t[3]}};
      });
    }
    return largest < 0x7f80 ? power : NAN;
  }

  // Everything that is a token's own, what follows from the gates, and how many tokens the chunk
  // has: by the first warp.
  KALMANET_KERNEL void load_scalars() {
    group.with_warp(0, [&] {
      const int64_t left = piece.end - t0;
      group.each([&](int t, Registers& r) {
        const bool real = t < left;
        const auto at = [&](const Array& a, double absent) {
          return real ? scalar_at<float>(a, piece.row, t0 + t, head, absent)
                      : static_cast<float>(absent);
        };
        r.scan[0] = static_cast<double>(at(job.gk, 0.0));
        r.scan[1] = static_cast<double>(at(job.g, 0.0));
        shared.alpha[t] = at(job.alpha, 1.0);
        const float ridge = at(job.ridge, job.ridge_ratio);
        shared.ridge[t] = ridge > 0.0f ? ridge : NAN;
        const float beta = at(job.beta, 1.0);
        shared.beta2[t] = real ? beta * beta : 0.0f;
      });
      scan(0), scan(1);
      group.each([&](int t, Registers& r) {
        const bool faded = r.scan[0] < -kLongestForgetting || r.scan[1] < -kMostForgottenValues;
        r.extreme[0] = faded ? -static_cast<float>(t) : -32.0f;
      });
      group.max_warp([](Registers& r) -> float& { return r.extreme[0]; });
      group.each([&](int t, Registers& r) {
        int count = static_cast<int>(-r.extreme[0]);
        if (count > left) count = static_cast<int>(left);
        if (count < 1) count = 1;
        r.pivots[0] = static_cast<float>(count);
        r.extreme[1] = t < count ? shared.beta2[t] : 0.0f;
        if (t == 0) {
          shared.tokens = count;
          if (!(r.scan[0] > -kMostForgotten && r.scan[1] > -kMostForgotten)) shared.ill = 1;
        }
      });
      group.max_warp([](Registers& r) -> float& { return r.extreme[1]; });
      KALMANET_UNROLL
      for (int which = 0; which < 2; ++which) {
        group.each([&](int t, Registers& r) {  // of the last token, to all
          r.other = t == static_cast<int>(r.pivots[0]) - 1 ? r.scan[which] : 0.0;
        });
        group.template sum_lanes<32>([](Registers& r) -> double& { return r.other; });
        group.each([&](int t, Registers& r) {
          const bool real = t < static_cast<int>(r.pivots[0]);
          const float since = real ? static_cast<float>(r.scan[which]) : 0.0f;
          const float most = r.extreme[1] > 0.0f ? r.extreme[1] : 1.0f;
          const float beta2 = real ? shared.beta2[t] : 0.0f;
          shared.start[which][t] = expf(since);
          shared.since_end[which][t] = beta2 / most * expf(static_cast<float>(r.other) - since);
          if (which == 0) {
            shared.weight[t] = beta2 * expf(-since);
          } else {
            shared.value_weight[t] = beta2 / most * expf(-since);
          }
          if (t != 0) return;
          shared.total[which] = expf(static_cast<float>(r.other));
          shared.largest_beta2 = most;
        });
      }
    });
  }

  // scan[which] <- the sum over the warp's lanes up to this one.
  KALMANET_KERNEL void scan(int which) {
    KALMANET_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      group.shuffle([](Registers& r) -> double& { return r.other; },
                    [which](Registers& r) { return r.scan[which]; },
                    [step](int thread) { return thread - step; });
      group.each([&](int thread, Registers& r) {
        if (thread % 32 >= step) r.scan[which] += r.other;
      });
    }
  }

  // Two neighbouring tiles of a state as left fragments: a[0] high, a[1] low.
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

  // shared.dots[which][warp][token] <- the sum of term(registers, thread, n, i) over the warp's
  // dims.
  template <class F>
  KALMANET_KERNEL void dot_columns(int which, F&& term) {
    KALMANET_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          r.dot[c] = term(r, thread, tile, c) + term(r, thread, tile, c + 2);
        }
      });
      group.sum_rows([](Registers& r) -> float& { return r.dot[0]; });
      group.sum_rows([](Registers& r) -> float& { return r.dot[1]; });
      group.each([&](int thread, Registers& r) {
        if (thread % 32 >= 4) return;
        shared.dots[which][thread / 32][this->token_of(thread, tile, 0)] = r.dot[0];
        shared.dots[which][thread / 32][this->token_of(thread, tile, 1)] = r.dot[1];
      });
    }
  }
  KALMANET_KERNEL double dot(int which, int token) const {
    double sum = 0.0;
    for (int w = 0; w < 8; ++w) sum += static_cast<double>(shared.dots[which][w][token]);
    return sum;
  }

  // k_t^T H_0 k_t and the keys' own products, from which |H_t| follows. `scale`: what h is
  // multiplied by. A barrier before them is read.
  KALMANET_KERNEL void measure_keys(float scale) {
    this->clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(this->dims, k * 16)) break;
      group.each([&](int thread, Registers& r) {
        pack_state<false>(r.h[2 * k], r.h[2 * k + 1], scale, r.a);
        this->load_right(shared.keys, thread, k, r.b[0]);
      });
      this->add_tiles(0, 0);
    }
    dot_columns(0, [&](Registers& r, int thread, int tile, int i) {
      const Left left = shared.columns[(thread / 32 * 2 + tile / 2) * 32 + thread % 32];
      const uint32_t both = tile % 2 == 0 ? (i < 2 ? left.part[0] : left.part[1])
                                          : (i < 2 ? left.part[2] : left.part[3]);
      return (i % 2 == 0 ? low_float16(both) : high_float16(both)) * r.y[tile][i];
    });
    this->template multiply_tokens<false, false>(shared.keys, nullptr, shared.keys, nullptr);
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {
      group.each([&](int thread, Registers& r) {
        r.dot[half] = 0;
        KALMANET_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int t = this->tile_row(thread, i), j = this->tile_column(thread, i);
          const float g = r.g[0][i];
          if (j <= t) r.dot[half] += shared.weight[j] * g * g;
          if (j == t) shared.norm2[t] = g;
        }
      });
    }
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[0]; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.dot[1]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 4 != 0) return;
      shared.gram[thread / 32 % 4][this->tile_row(thread, 0)] = r.dot[0];
      shared.gram[thread / 32 % 4][this->tile_row(thread, 2)] = r.dot[1];
    });
  }

  // state <- total state + left diag(weights) K, left K^T or V^T (`u`), in scratch, and the squares
  // of its elements.
  KALMANET_KERNEL void advance(bool u) {
    const Left* const left = u ? shared.values : shared.columns;
    const float* const weight = shared.since_end[u ? 1 : 0];
    const float unit = shared.largest_beta2 / k_power / (u ? v_power : k_power);
    const float keep = shared.total[u ? 1 : 0] / unit;
    fetch_state(u);  // (all of it under way at once)
    group.each([&](int thread, Registers& r) {
      r.sum = 0;
      KALMANET_UNROLL
      for (int k = 0; k < 2; ++k) {
        const Left raw = left[(thread / 32 * 2 + k) * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int j = k * 16 + thread % 4 * 2 + i / 2 * 8;
          r.z[0][k][i] = split_float16(low_float16(raw.part[i]) * weight[j],
                                       high_float16(raw.part[i]) * weight[j + 1], r.z[1][k][i]);
        }
      }
    });
    KALMANET_UNROLL
    for (int tile = 0; tile < 16; tile += 2) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.g[j][i] = keep * r.h[tile + j][i];
        }
        KALMANET_UNROLL
        for (int k = 0; k < 2; ++k) {
          const Left right = shared.columns[(tile + k) * 32 + thread % 32];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.b[k][i % 2][i / 2] = right.part[i];
        }
      });
      KALMANET_UNROLL
      for (int at = 0; at < 8; ++at) {
        const int k = at / 4, part = 1 - at / 2 % 2, j = at % 2;
        const auto g = [j](Registers& r) -> float (&)[4] { return r.g[j]; };
        group.multiply_add_float16(
            g, g, [part, k](Registers& r) -> uint32_t (&)[4] { return r.z[part][k]; },
            [k, j](Registers& r) -> uint32_t (&)[2] { return r.b[k][j]; });
      }
      group.each([&](int thread, Registers& r) {
        float squares = 0;
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            r.g[j][i] *= unit;
            squares += r.g[j][i] * r.g[j][i];
          }
          store4(state_at(u, thread, tile + j), r.g[j]);
        }
        r.sum += squares;
      });
    }
    put_squares(u);
  }
};

}  // namespace kalmanet::cuda::direct32
