// What is a token's own in the direct chunk kernel: rows of its tensors into quads, gates and what
// follows from them.
#pragma once

#include "cuda/direct_inverse.hpp"
#include "cuda/direct_rows.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

// A chunk ends where its keys have faded by e^{-4}: more would take more steps than a new chunk
// costs. A single token that forgets more than e^{-30} (its states' sums are float32) is left over.
inline constexpr double kLongestForgetting = 4.0, kMostForgotten = 30.0;
inline constexpr double kMostForgottenValues = 40.0;

template <class Group>
struct DirectTokens : DirectInverse<Group> {
  using Base = DirectInverse<Group>;
  using Base::group, Base::shared;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  const GkaJob& job;
  Piece piece;
  int64_t head;
  float* states;  // H, then U^T: [warp][tile of 8 columns][lane][4]
  int64_t t0 = 0;
  int n = 0;  // tokens

  // Tokens first .. first + 7 of a tensor on their way, and into a tile (direct_rows.hpp).
  KALMANET_KERNEL void fetch_rows(const Array& a, int64_t a_head, int first, int at) {
    fetch_token_rows(
        group, a, static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head),
        piece.end - t0, [first](int) { return first; }, at);
  }
  KALMANET_KERNEL void put_rows(const Array& a, int first, int at, int log2, Quad* to,
                                float* unit) {
    put_token_rows(
        group, a, n, [first](int) { return first; }, at, log2, unit, shared.ill,
        [=](int token, int column) {
          return &to[token / 16 * 8 + column / 2]
                      .word[token / 8 % 2 * 2 + column % 2][token % 8 * 4];
        });
  }

  // By the last four warps: 16 tokens each, the others have work.
  KALMANET_KERNEL void fetch_rows_of_half(const Array& a, int64_t a_head, int warp) {
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) fetch_rows(a, a_head, (warp - 4) * 16 + i * 8, 4 * i);
  }
  KALMANET_KERNEL void put_rows_of_half(const Array& a, int warp, int log2, Quad* to, int which) {
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      put_rows(a, (warp - 4) * 16 + i * 8, 4 * i, log2, to, shared.unit[which]);
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
        scan_pairs(group);
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

  // The next chunk's rows towards L2: by the last four warps, half a row a thread.
  KALMANET_KERNEL void prefetch_rows(const Array& a, int64_t a_head, int64_t from) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, from, a_head);
    const int64_t left = piece.end - from;
    group.each([&](int thread, Registers&) {
      const int token = thread % 128 / 2, column = thread % 2 * 64;
      if (token < left && has_column<Group>(a, column)) {
        prefetch(base + token * a.stride[1] + column);
      }
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
