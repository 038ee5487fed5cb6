// The direct solver on Hopper: what is a token's own, and where numbers lie.
#pragma once

#include "cuda/direct_tokens.hpp"
#include "cuda/hopper_direct_kernel.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperTokens : DirectPivot<Group, HopperTraits> {
  using Base = DirectPivot<Group, HopperTraits>;
  using Base::group, Base::shared;
  using L = HopperLayout;
  using Registers = HopperRegisters;

  const GkaJob& job;
  const Piece& piece = shared.piece;
  const int64_t& head = shared.head;
  const int64_t& t0 = shared.t0;
  const int& n = shared.tokens;

  // Every warp's 8 tokens of a tensor, on their way into raw[at ..]; and into 64 x 128 cores.
  KALMANET_KERNEL void fetch_rows(const Array& a, int64_t a_head, int at) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head);
    fetch_token_rows(
        group, a, base, piece.end - t0, [](int thread) { return thread / 32 * 8; }, at);
  }
  KALMANET_KERNEL void put_rows(const Array& a, int at, int log2, Core* to, float* unit) {
    put_token_rows(
        group, a, n, [](int thread) { return thread / 32 * 8; }, at, log2, unit, shared.ill,
        [=](int token, int column) { return &to[token / 8 * 16 + column].word[token % 8 * 4]; });
  }

  // Everything that is a token's own, what follows from the gates, and how many tokens the chunk
  // has.
  KALMANET_KERNEL void load_scalars() {
    const int64_t left = piece.end - t0;
    const auto at = [&](const Array& a, int t, double absent) {
      return t < left ? scalar_at<float>(a, piece.row, t0 + t, head, absent)
                      : static_cast<float>(absent);
    };
    group.by_warp(0, 2, [&](int which) {
      group.each([&](int thread, Registers& r) {
        KALMANET_LOOP
        for (int i = 0; i < 2; ++i) {
          const double gate =
              static_cast<double>(at(which == 0 ? job.gk : job.g, thread % 32 * 2 + i, 0.0));
          r.pair[0] = i == 0 ? gate : r.pair[0], r.pair[1] = gate;
        }
      });
      scan_pairs(group);
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          shared.since[which][thread % 32 * 2 + i] = static_cast<float>(r.pair[i]);
        }
        if (thread % 32 == 0 && !(r.pair[0] > -kMostForgotten)) shared.ill = 1;
      });
    });
    group.by_warp(2, 4, [&](int) {
      group.each([&](int thread, Registers&) {
        const int t = thread % 64;
        shared.alpha[t] = at(job.alpha, t, 1.0);
        const float ridge = at(job.ridge, t, job.ridge_ratio);
        shared.ridge[t] = ridge > 0.0f ? ridge : NAN;
        const float beta = at(job.beta, t, 1.0);
        shared.beta2[t] = t < left ? beta * beta : 0.0f;
      });
    });
    group.barrier();
    count_tokens(left);
    group.by_warp(0, 4, [&](int) {
      group.each([&](int thread, Registers& r) {
        const int t = thread % 64, which = thread / 64, count = static_cast<int>(r.most);
        const float since = t < count ? shared.since[which][t] : 0.0f;
        const float beta2 = t < count ? shared.beta2[t] : 0.0f;
        const float all = shared.since[which][count - 1];
        shared.start[which][t] = expf(since);
        shared.since_end[which][t] = beta2 * expf(all - since);
        (which == 0 ? shared.weight : shared.value_weight)[t] = beta2 * expf(-since);
        if (t == 0) shared.total[which] = expf(all);
        if (thread == 0) shared.tokens = count;
      });
    });
    group.barrier();
  }
  // most <- the tokens up to the first that has forgotten too much; in every warp.
  KALMANET_KERNEL void count_tokens(int64_t left) {
    group.each([&](int thread, Registers& r) {
      r.most = 0;
      KALMANET_UNROLL
      for (int i = 1; i >= 0; --i) {
        const int t = thread % 32 + 32 * i;
        const bool faded = shared.since[0][t] < static_cast<float>(-kLongestForgetting) ||
                           shared.since[1][t] < static_cast<float>(-kMostForgottenValues);
        if (faded) r.most = static_cast<uint32_t>(64 - t);
      }
    });
    group.max_warp([](Registers& r) -> uint32_t& { return r.most; });
    group.each([&](int, Registers& r) {
      const int64_t count = 64 - static_cast<int64_t>(r.most);
      r.most = static_cast<uint32_t>(count > left ? left : (count < 1 ? 1 : count));
    });
  }

  // Word j of the lane where 64 rows of the warpgroup and (8 columns of cores) lie.
  KALMANET_KERNEL static uint32_t& word_of(Core* to, int columns, int thread, int j) {
    return to[(thread % 128 / 32 * 2 + j % 2) * columns + j / 2].word[thread % 32];
  }
  // The same in the warpgroup's half of 64 x 128.
  KALMANET_KERNEL static uint32_t& half_word(Core* to, int thread, int j) {
    return word_of(to + thread / 128 * 8, 16, thread, j);
  }
  KALMANET_KERNEL static int token_of(int thread, int j) { return sum_row(thread, j) % 64; }

  // f[part][4 k ..] <- the warp's 16 dims x tokens, of tokens x dims.
  KALMANET_KERNEL void load_columns(const Core* from, int part) {
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      load_fragment<true>(
          group, [part, k](Registers& r) { return r.f[part] + 4 * k; },
          [=](int thread) {
            const int lane = thread % 32;
            const int row = 2 * k + lane / 16, column = thread / 32 * 2 + lane / 8 % 2;
            return from[row * 16 + column].word + lane % 8 * 4;
          });
    }
  }

  // The rows that are needed next towards L2. (The tokens' numbers are there: other heads' blocks
  // read the same lines.)
  KALMANET_KERNEL void prefetch_chunk(int64_t from) {
    const auto rows = [&](const Array& a, int64_t a_head, int64_t first) {
      const uint16_t* const base =
          static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, first, a_head);
      group.each([&](int thread, Registers&) {
        const int token = thread % 128 / 2, column = thread % 2 * 64;
        if (token < piece.end - first && has_column<Group>(a, column)) {
          prefetch(base + token * a.stride[1] + column);
        }
      });
    };
    group.by_warp(0, 4, [&](int) { rows(job.v, head / job.v_group, t0); });
    group.by_warp(4, 8, [&](int) { rows(job.k, head / job.k_group, from); });
  }
};

}  // namespace kalmanet::cuda
