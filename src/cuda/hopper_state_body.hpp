// What each piece adds to the states on its own, on Hopper (state_body.hpp has the formula): rows
// go from the GPU's memory into cores as they are, sixteen bytes a copy, and both factors of wgmma
// are made of them: weighted and split in two in registers, and exact in shared memory.
#pragma once

#include "cuda/async_copy.hpp"
#include "cuda/hopper_group.hpp"
#include "cuda/state_body.hpp"

namespace kalmanet::cuda {

struct HopperStateShared {
  Core rows[2][2][8 * 16];  // [turn][K or V]: 64 tokens x 128 dims, bfloat16
  float weight[StateLayout::kMost];
  double warp[StateLayout::kThreads / 32];
};

struct HopperStateRegisters {
  float sum[64];
  uint32_t a[2][16];  // weighted keys: the warp's 16 dims x 64 tokens, high and low
  double scan, other, gate[2];
  uint32_t most;
  int exponent;  // as StateRegisters
};

template <class Group>
struct HopperStateBody {
  using Registers = HopperStateRegisters;
  static constexpr int kTokens = 64;  // a step
  Group& group;
  HopperStateShared& shared;
  const GkaJob& job;
  Piece piece;
  int64_t head;
  bool u;

  // Step `step`'s rows of K (and V) into shared memory; beyond the piece its last row, whose weight
  // is 0.
  KALMANET_KERNEL void copy_rows(int step) {
    const int64_t first = piece.begin + step * kTokens, left = piece.end - first;
    KALMANET_UNROLL
    for (int which = 0; which < 2; ++which) {
      if (which == 1 && !u) continue;
      const Array& a = which == 0 ? job.k : job.v;
      const int64_t a_head = head / (which == 0 ? job.k_group : job.v_group);
      const uint16_t* const base =
          static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, first, a_head);
      Core* const to = shared.rows[step % 2][which];
      group.each([&](int thread, Registers&) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {  // eight lanes are the rows of a core
          const int token = thread / 32 * 8 + thread % 8, column = i * 4 + thread % 32 / 8;
          const int64_t row = token < left ? token : left - 1;
          uint32_t* const at = &to[token / 8 * 16 + column].word[token % 8 * 4];
          if (has_column<Group>(a, column * 8)) {
            copy16(at, base + row * a.stride[1] + column * 8);
          } else {
            store16(at, {0, 0, 0, 0});
          }
        }
      });
    }
  }

  // a <- the keys of 64 tokens from `first` on, times their weights.
  template <bool kFloat16>
  KALMANET_KERNEL void weigh_keys(const Core* keys, int first) {
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      load_fragment<true>(
          group, [k](Registers& r) { return r.a[0] + 4 * k; },
          [=](int thread) {
            const int lane = thread % 32;
            const int row = 2 * k + lane / 16, column = thread / 32 * 2 + lane / 8 % 2;
            return keys[row * 16 + column].word + lane % 8 * 4;
          });
    }
    if (kFloat16) {
      split_float16_keys(first);
      return;
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {
        float weight[2];
        load2(&shared.weight[first + sum_column(thread, 2 * k)], weight);
        KALMANET_UNROLL
        for (int j = 2 * k; j < 2 * k + 2; ++j) {
          const float a = low_bfloat16(r.a[0][j]) * weight[0];
          const float b = high_bfloat16(r.a[0][j]) * weight[1];
          r.a[0][j] = pack_bfloat16(a, b);
          r.a[1][j] = low_parts(a, b, r.a[0][j]);
        }
      }
    });
  }
  // The same of float16, which is in a[0], in what the warp's sums are counted in from now on.
  KALMANET_KERNEL void split_float16_keys(int first) {
    const auto each_weighted = [&](int thread, Registers& r, auto&& f) {
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {
        float weight[2];
        load2(&shared.weight[first + sum_column(thread, 2 * k)], weight);
        KALMANET_UNROLL
        for (int j = 2 * k; j < 2 * k + 2; ++j) {
          f(j, low_float16(r.a[0][j]) * weight[0], high_float16(r.a[0][j]) * weight[1]);
        }
      }
    };
    group.each([&](int thread, Registers& r) {
      r.most = 0;
      each_weighted(thread, r, [&](int, float a, float b) { r.most = largest_bits(r.most, a, b); });
    });
    group.max_warp([](Registers& r) -> uint32_t& { return r.most; });
    group.each([&](int thread, Registers& r) {
      const float by = counted_in(r.most, r.exponent), unit = power_of_two(r.exponent);
      KALMANET_UNROLL
      for (int e = 0; e < 64; ++e) r.sum[e] *= by;
      each_weighted(thread, r, [&](int j, float a, float b) {
        r.a[0][j] = split_float16(unit * a, unit * b, r.a[1][j]);
      });
    });
  }

  // Step `step`: its keys, weighted, times its keys or values.
  template <bool kFloat16>
  KALMANET_KERNEL void add_step(int step) {
    const auto sum = [](Registers& r) -> float* { return r.sum; };
    const Core* const right = shared.rows[step % 2][u ? 1 : 0];
    weigh_keys<kFloat16>(shared.rows[step % 2][0], step * kTokens);
    begin_products(group);
    KALMANET_UNROLL
    for (int part = 1; part >= 0; --part) {
      KALMANET_UNROLL
      for (int k = 0; k < 4; ++k) {
        multiply_wide<128, true, !kFloat16>(
            group, sum, [part, k](Registers& r) { return r.a[part] + 4 * k; },
            [=](int) { return Cores{right + 2 * k * 16, 16}; });
      }
    }
    commit_products(group);
    wait_products<0>(group);
    settle<64>(group, sum);
  }

  KALMANET_KERNEL void run() {
    const int steps = static_cast<int>((piece.end - piece.begin + kTokens - 1) / kTokens);
    copy_rows(0);
    const double total = load_state_weights(group, shared, job, piece, head, u);
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 64; ++e) r.sum[e] = 0;
      r.exponent = kFinestExponent;
    });
    KALMANET_LOOP
    for (int step = 0; step < steps; ++step) {
      group.each([](int, Registers&) { wait_copies(); });
      publish(group);
      group.barrier();  // (which also ends the reads of the rows before)
      if (step + 1 < steps) copy_rows(step + 1);
      if (is_float16<Group>(job.k)) {
        add_step<true>(step);
      } else {
        add_step<false>(step);
      }
    }
    store_state_sums(group, job, piece, head, u, total,
                     [](Registers& r, int e) { return r.sum[e]; });
  }
};

// Block (piece_index, head, u)'s work.
template <class Group>
KALMANET_KERNEL void run_hopper_states(Group& group, HopperStateShared& shared, const GkaJob& job,
                                       int64_t piece_index, int64_t head, bool u) {
  const Piece piece = piece_of(job, piece_index);
  if (piece.last) return;
  HopperStateBody<Group> body{group, shared, job, piece, head, u};
  body.run();
}

}  // namespace kalmanet::cuda
