// What the matrix-unit kernel does around its products: tensors into fragments, decays, and the
// states, which lie in scratch memory in the order of a warp's sums: warp w has rows 16 w .. of H
// and of U^T.
#pragma once

#include <cstring>

#include "cuda/chunk_kernel.hpp"

namespace kalmanet::cuda {

// e^{-G_j} must stay a float32: a chunk that forgets more is left to the token kernel.
inline constexpr double kMostDecay = 75.0;

template <class Group>
struct ChunkState : ChunkProducts<Group> {
  using Base = ChunkProducts<Group>;
  using Base::group;
  using Base::shared;
  using L = ChunkLayout;
  using Registers = ChunkRegisters;
  static constexpr int64_t kStateFloats = 2 * 128 * 128;  // a block's scratch

  const GkaJob& job;
  Piece piece;
  int64_t head;
  float* states;  // H, then U^T: [warp][tile of 8 columns][lane][4]
  int64_t t0 = 0;
  int n = 0;  // tokens

  KALMANET_KERNEL static int64_t state_at(int thread, int tile) {
    return (static_cast<int64_t>(thread / 32 * 16 + tile) * 32 + thread % 32) * 4;
  }

  // Whether H, or U^T, has such an element.
  KALMANET_KERNEL bool has(bool u, int row, int column) const {
    return has_element<Group>(job, u, u ? column : row, u ? row : column);
  }

  // `u`: U^T, else H.
  KALMANET_KERNEL void load_state(bool u) {
    this->dims = most_dims<Group>(job);
    const StateView<float> from = piece.first
                                      ? state_view<float>(u ? job.u0 : job.h0, piece.sequence, head)
                                      : slot_view<float>(job, piece.slot, head, u);
    const bool empty = from.data == nullptr;
    float* const to = states + (u ? 128 * 128 : 0);
    group.each([&](int thread, Registers&) {
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
          const int column = tile * 8 + thread % 4 * 2 + i % 2;
          v[i] = empty || !has(u, row, column)
                     ? 0.0f
                     : from.data[u ? from.at(column, row) : from.at(row, column)];
        }
        store4(to + state_at(thread, tile), v);
      }
    });
  }

  KALMANET_KERNEL void store_state(bool u, const StateView<float>& to) {
    const float* const from = states + (u ? 128 * 128 : 0);
    if (to.data == nullptr) return;
    group.each([&](int thread, Registers&) {
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        load4(from + state_at(thread, tile), v);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
          const int column = tile * 8 + thread % 4 * 2 + i % 2;
          if (has(u, row, column)) to.data[u ? to.at(column, row) : to.at(row, column)] = v[i];
        }
      }
    });
  }

  // H or U^T as the left factor; returns its squared norm. Begins and ends with a barrier.
  KALMANET_KERNEL double load_main(bool u) {
    const float* const from = states + (u ? 128 * 128 : 0);
    group.barrier();
    group.each([&](int thread, Registers& r) {
      r.sum = 0.0;
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {
        float v[2][4];
        load4(from + state_at(thread, 2 * k), v[0]);
        load4(from + state_at(thread, 2 * k + 1), v[1]);
        Left high, low;
        float squares = 0;
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float a = v[i / 2][i % 2 * 2], b = v[i / 2][i % 2 * 2 + 1];
          high.part[i] = pack_bfloat16(a, b);
          low.part[i] = low_parts(a, b, high.part[i]);
          squares += a * a + b * b;
        }
        r.sum += squares;
        const int at = (thread / 32 * 8 + k) * 32 + thread % 32;
        shared.main[0][at] = high;
        shared.main[1][at] = low;
      }
    });
    group.template sum_lanes<32>([](Registers& r) -> double& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.warp[thread / 32] = r.sum;
    });
    group.barrier();
    double sum = 0.0;
    for (int w = 0; w < 8; ++w) sum += shared.warp[w];
    return sum;
  }

  // Tokens t0.. of a [B,T,heads,128] tensor as left fragments by rows (if not null) and by columns.
  // No barrier.
  KALMANET_KERNEL void load_tiles(const Array& a, int64_t a_head, Left* rows, Left* columns) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head);
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      group.each([&](int thread, Registers& r) {
        const int tile = thread / 32 * 4 + i;  // token tile * 8 + dim tile
        KALMANET_UNROLL
        for (int part = 0; part < 4; ++part) {
          const int token = tile / 8 * 16 + thread % 32 / 4 + part % 2 * 8;
          const int dim = tile % 8 * 16 + thread % 4 * 2 + part / 2 * 8;
          r.t[part] = 0;
          if (token < n && has_column<Group>(a, dim)) {
            memcpy(&r.t[part], base + token * a.stride[1] + dim, 4);
          }
        }
        if (rows != nullptr) {
          rows[tile * 32 + thread % 32] = {{r.t[0], r.t[1], r.t[2], r.t[3]}};
        }
      });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[2]; });
      group.transpose([](Registers& r) -> uint32_t& { return r.t[3]; });
      group.each([&](int thread, Registers& r) {
        const int tile = thread / 32 * 4 + i;
        columns[(tile % 8 * 4 + tile / 8) * 32 + thread % 32] = {{r.t[0], r.t[2], r.t[1], r.t[3]}};
      });
    }
  }

  // A value of y's layout out of fragments by columns: c[4] of tile (m, n).
  KALMANET_KERNEL static void unpack(const Left* columns, int thread, int m, int tile_n,
                                     float (&c)[4]) {
    const int tile = thread / 128 * 4 + tile_n;
    const Left left = columns[((thread / 32 % 4 * 2 + m) * 4 + tile / 2) * 32 + thread % 32];
    const uint32_t a = tile % 2 == 0 ? left.part[0] : left.part[2];
    const uint32_t b = tile % 2 == 0 ? left.part[1] : left.part[3];
    c[0] = low_bfloat16(a), c[1] = high_bfloat16(a);
    c[2] = low_bfloat16(b), c[3] = high_bfloat16(b);
  }

  // Everything that is a token's own, and what follows from the gates. Ends with a barrier.
  KALMANET_KERNEL void load_scalars() {
    group.each([&](int thread, Registers&) {
      if (thread >= L::kTokens) return;
      const int64_t t = t0 + thread;
      const bool real = thread < n;
      const auto at = [&](const Array& a, double absent) {
        return real ? static_cast<double>(scalar_at<float>(a, piece.row, t, head, absent)) : absent;
      };
      shared.gate[0][thread] = at(job.gk, 0.0);
      shared.gate[1][thread] = at(job.g, 0.0);
      shared.alpha[thread] = static_cast<float>(at(job.alpha, 1.0));
      const float ridge = static_cast<float>(at(job.ridge, job.ridge_ratio));
      shared.ridge[thread] = ridge > 0.0f ? ridge : NAN;
      const float beta = static_cast<float>(at(job.beta, 1.0));
      shared.beta2[thread] = real ? beta * beta : 0.0f;
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread == 2 * L::kTokens) {
        float smallest = INFINITY;
        for (int j = 0; j < L::kTokens; ++j) {
          smallest = j < n ? fminf(smallest, shared.ridge[j]) : smallest;
        }
        shared.smallest_ridge = smallest;
      }
      if (thread >= 2 * L::kTokens) return;
      const int which = thread / L::kTokens, t = thread % L::kTokens;
      double since = 0.0, total = 0.0;
      for (int j = 0; j < L::kTokens; ++j) {
        if (j <= t) since += shared.gate[which][j];
        total += shared.gate[which][j];
      }
      const float start = static_cast<float>(exp(since));
      const float weight = shared.beta2[t] * static_cast<float>(exp(-since));
      (which == 0 ? shared.start : shared.value_start)[t] = start;
      (which == 0 ? shared.weight : shared.value_weight)[t] = weight;
      shared.to_end[which][t] = shared.beta2[t] * static_cast<float>(exp(total - since));
      if (which == 0) shared.since[t] = since;
      if (t != 0) return;
      shared.total[which] = static_cast<float>(exp(total));
      shared.total64[which] = total;
    });
    group.barrier();
  }

  // state <- total state + left diag(to_end) K, left K^T or V^T (`u`), whose rows are the state's.
  KALMANET_KERNEL void advance(bool u) {
    float* const state = states + (u ? 128 * 128 : 0);
    const Left* const left = u ? shared.values : shared.columns;
    const float* const weight = shared.to_end[u ? 1 : 0];
    const float total = shared.total[u ? 1 : 0];
    for (int half = 0; half < 2; ++half) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          float v[4];
          load4(state + state_at(thread, half * 8 + tile), v);
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.y[tile / 4][tile % 4][i] = total * v[i];
        }
      });
      for (int k = 0; k < 4; ++k) {
        group.each([&](int thread, Registers& r) {
          const Left raw = left[(thread / 32 * 4 + k) * 32 + thread % 32];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int j = k * 16 + thread % 4 * 2 + i / 2 * 8;
            const float a = low_bfloat16(raw.part[i]) * weight[j];
            const float b = high_bfloat16(raw.part[i]) * weight[j + 1];
            r.a[0][0][i] = pack_bfloat16(a, b);
            r.a[1][0][i] = low_parts(a, b, r.a[0][0][i]);
          }
        });
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          group.each([&](int thread, Registers& r) {
            const Left right = shared.columns[((half * 4 + tile / 2) * 4 + k) * 32 + thread % 32];
            r.b[0][0][0] = right.part[tile % 2], r.b[0][0][1] = right.part[tile % 2 + 2];
          });
          const auto y = [tile](Registers& r) -> float (&)[4] { return r.y[tile / 4][tile % 4]; };
          const auto b = [](Registers& r) -> uint32_t (&)[2] { return r.b[0][0]; };
          group.multiply_add(y, [](Registers& r) -> uint32_t (&)[4] { return r.a[1][0]; }, b);
          group.multiply_add(y, [](Registers& r) -> uint32_t (&)[4] { return r.a[0][0]; }, b);
        }
      }
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          store4(state + state_at(thread, half * 8 + tile), r.y[tile / 4][tile % 4]);
        }
      });
    }
  }
};

}  // namespace kalmanet::cuda
