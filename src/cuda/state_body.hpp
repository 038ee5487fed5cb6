// What each piece adds to the states on its own, by matrix units: K = V = 128, bfloat16 tensors, or
// what any_rows.hpp says (the plain twin is segment_body.hpp). One block makes H's part of a piece,
// another U's:
//
//   sum_j (beta_j^2 e^{G_end - G_j} k_j) r_j^T     r_j: k_j or v_j
//
// k_j and r_j are the exact bfloat16 that came in; only the weighted factor is rounded, split in
// two (high + low, 16 bits; of float16 22). The sums stay in registers from the piece's first token
// to its last.
#pragma once

#include <cstring>

#include "cuda/chunk_kernel.hpp"
#include "cuda/segment_body.hpp"

namespace kalmanet::cuda {

struct StateLayout {
  static constexpr int kDim = 128;
  static constexpr int kTokens = 32;  // a step
  static constexpr int kThreads = 256;
  static constexpr int kTile = 8 * 2 * 32;  // fragments of 128 dims x 32 tokens
  static constexpr int kMost = static_cast<int>(kSegmentTokens);
};

inline constexpr double kWiped = -1e4;  // e^this is nothing

struct StateShared {
  StagedRows staged[2];            // K and V
  Left left[StateLayout::kTile];   // K^T
  Left right[StateLayout::kTile];  // V^T, read as right factor
  float weight[StateLayout::kMost];
  double warp[StateLayout::kThreads / 32];
};

struct StateRegisters {
  float sum[16][4];
  uint32_t raw[2][2][4];  // K, V of the next step
  uint32_t t[4], a[2][4], b[2][2];
  double scan, other, gate[2];
  uint32_t most;
  int exponent;  // of float16 keys: what the warp's sums are counted in (counted_in)
};

// Weighted float16 keys as a factor in float16: a warp's sums, its own rows, are counted in
// 2^-exponent, which rises with the largest that came. most: the bits of what comes, of the warp.
// Returns what the sums so far are to be multiplied by.
inline constexpr int kFinestExponent = 100;
KALMANET_KERNEL float counted_in(uint32_t most, int& exponent) {
  int fits = 127 + 13 - static_cast<int>(most >> 23);
  fits = fits < -kFinestExponent ? -kFinestExponent : fits;
  if (most == 0 || fits >= exponent) return 1.0f;
  const int by = fits - exponent;
  exponent = fits;
  return power_of_two(by < -126 ? -126 : by);
}
KALMANET_KERNEL uint32_t largest_bits(uint32_t most, float a, float b) {
  const uint32_t first = bits_of(fabsf(a)), second = bits_of(fabsf(b));
  most = first > most ? first : most;
  return second > most ? second : most;
}

// shared.weight; returns the piece's whole log decay. Thread i has tokens 2 i and 2 i + 1.
template <class Group, class Shared>
KALMANET_KERNEL double load_state_weights(Group& group, Shared& shared, const GkaJob& job,
                                          const Piece& piece, int64_t head, bool u) {
  const Array gate = u ? job.g : job.gk;
  const int64_t n = piece.end - piece.begin;
  group.each([&](int thread, auto& r) {
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t t = 2 * thread + i;
      r.gate[i] =
          t < n ? static_cast<double>(scalar_at<float>(gate, piece.row, piece.begin + t, head, 0.0))
                : 0.0;
      // (Of -infinity no difference could be taken.)
      if (r.gate[i] < kWiped) r.gate[i] = kWiped;
    }
    r.scan = r.gate[0] + r.gate[1];
  });
  KALMANET_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    group.shuffle([](auto& r) -> double& { return r.other; }, [](auto& r) { return r.scan; },
                  [step](int thread) { return thread - step; });
    group.each([&](int thread, auto& r) {
      if (thread % 32 >= step) r.scan += r.other;
    });
  }
  group.each([&](int thread, auto& r) {
    if (thread % 32 == 31) shared.warp[thread / 32] = r.scan;
  });
  group.barrier();
  double total = 0.0;
  for (int w = 0; w < StateLayout::kThreads / 32; ++w) total += shared.warp[w];
  group.each([&](int thread, auto& r) {
    double after = total - r.scan;  // of the gates after token 2 i + 1
    for (int w = 0; w < thread / 32; ++w) after -= shared.warp[w];
    KALMANET_UNROLL
    for (int i = 1; i >= 0; --i) {
      const int64_t t = 2 * thread + i;
      const float beta =
          t < n ? scalar_at<float>(job.beta, piece.row, piece.begin + t, head, 1.0) : 0.0f;
      shared.weight[t] = beta * beta * static_cast<float>(exp(after));
      after += r.gate[i];
    }
  });
  return total;
}

// What the piece adds, of(registers) 64 numbers a thread in the order of a warp's sums, and its
// decay into its slot.
template <class Group, class Of>
KALMANET_KERNEL void store_state_sums(Group& group, const GkaJob& job, const Piece& piece,
                                      int64_t head, bool u, double total, Of&& of) {
  const StateView<float> to = slot_view<float>(job, piece.slot + 1, head, u);
  group.each([&](int thread, auto& r) {
    KALMANET_UNROLL
    for (int e = 0; e < 64; ++e) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8;
      const int column = e / 4 * 8 + thread % 4 * 2 + e % 2;
      if (!has_element<Group>(job, u, row, column)) continue;
      float sum = of(r, e);
      if (is_float16<Group>(job.k)) sum *= power_of_two(-r.exponent);
      to.data[to.at(row, column)] = sum;
    }
    if (thread == 0) {
      job.decays[(static_cast<int64_t>(piece.slot + 1) * job.H + head) * 2 + (u ? 1 : 0)] =
          exp(total);
    }
  });
}

template <class Group>
struct StateBody {
  using L = StateLayout;
  using Registers = StateRegisters;
  Group& group;
  StateShared& shared;
  const GkaJob& job;
  Piece piece;
  int64_t head;
  bool u;

  // Tokens t0.. of a [B,T,heads,128] tensor, on their way.
  KALMANET_KERNEL void fetch(const Array& a, int64_t a_head, int64_t t0, int which) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head);
    group.each([&](int thread, Registers& r) {
      const bool real = has_column<Group>(a, thread % 16 * 8);
      fetch_rows(base, a.stride[1], real ? piece.end - t0 : 0, thread, r.raw[which]);
    });
  }
  KALMANET_KERNEL void put(int which, Left* to) {
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int part = 0; part < 4; ++part) {
          r.t[part] = staged(shared.staged[which], m, thread / 32, thread % 32, part);
        }
      });
      KALMANET_UNROLL
      for (int part = 0; part < 4; ++part) {
        group.transpose([part](Registers& r) -> uint32_t& { return r.t[part]; });
      }
      group.each([&](int thread, Registers& r) {
        to[(thread / 32 * 2 + m) * 32 + thread % 32] = {{r.t[0], r.t[2], r.t[1], r.t[3]}};
      });
    }
  }

  // f(i, a, b) for the pairs of weighted keys of a lane's left factor, tokens 16 k .. of the step.
  template <bool kFloat16, class F>
  KALMANET_KERNEL void each_weighted(int first, int k, int thread, F&& f) {
    const Left raw = shared.left[(thread / 32 * 2 + k) * 32 + thread % 32];
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int j = first + k * 16 + thread % 4 * 2 + i / 2 * 8;
      const uint32_t both = raw.part[i];
      f(i, (kFloat16 ? low_float16(both) : low_bfloat16(both)) * shared.weight[j],
        (kFloat16 ? high_float16(both) : high_bfloat16(both)) * shared.weight[j + 1]);
    }
  }
  // Of float16 keys: what the sums are counted in from now on.
  KALMANET_KERNEL void take_exponent(int first) {
    group.each([&](int thread, Registers& r) {
      r.most = 0;
      KALMANET_UNROLL
      for (int k = 0; k < 2; ++k) {
        each_weighted<true>(first, k, thread,
                            [&](int, float a, float b) { r.most = largest_bits(r.most, a, b); });
      }
    });
    group.max_warp([](Registers& r) -> uint32_t& { return r.most; });
    group.each([](int, Registers& r) {
      const float by = counted_in(r.most, r.exponent);
      KALMANET_UNROLL
      for (int e = 0; e < 64; ++e) r.sum[e / 4][e % 4] *= by;
    });
  }

  template <bool kFloat16>
  KALMANET_KERNEL void add_step(int first) {
    if (kFloat16) take_exponent(first);
    const Left* const right = u ? shared.right : shared.left;
    KALMANET_UNROLL
    for (int k = 0; k < 2; ++k) {
      group.each([&](int thread, Registers& r) {
        each_weighted<kFloat16>(first, k, thread, [&](int i, float a, float b) {
          if (kFloat16) {
            const float unit = power_of_two(r.exponent);
            r.a[0][i] = split_float16(unit * a, unit * b, r.a[1][i]);
          } else {
            r.a[0][i] = pack_bfloat16(a, b);
            r.a[1][i] = low_parts(a, b, r.a[0][i]);
          }
        });
      });
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) {
        if (tile % 2 == 0) {
          group.each([&](int thread, Registers& r) {
            const Left both = right[(tile / 2 * 2 + k) * 32 + thread % 32];
            KALMANET_UNROLL
            for (int i = 0; i < 4; ++i) r.b[i % 2][i / 2] = both.part[i];
          });
        }
        const auto sum = [tile](Registers& r) -> float (&)[4] { return r.sum[tile]; };
        const auto b = [tile](Registers& r) -> uint32_t (&)[2] { return r.b[tile % 2]; };
        KALMANET_UNROLL
        for (int part = 1; part >= 0; --part) {
          const auto a = [part](Registers& r) -> uint32_t (&)[4] { return r.a[part]; };
          if constexpr (kFloat16) {
            group.multiply_add_float16(sum, sum, a, b);
          } else {
            group.multiply_add(sum, a, b);
          }
        }
      }
    }
  }

  KALMANET_KERNEL void run() {
    const int64_t k_head = head / job.k_group, v_head = head / job.v_group;
    fetch(job.k, k_head, piece.begin, 0);
    if (u) fetch(job.v, v_head, piece.begin, 1);
    const double total = load_state_weights(group, shared, job, piece, head, u);
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.sum[tile][i] = 0;
      }
      r.exponent = kFinestExponent;
    });
    for (int64_t t0 = piece.begin; t0 < piece.end; t0 += L::kTokens) {
      group.each([&](int thread, Registers& r) {
        stage_rows(r.raw[0], thread, shared.staged[0]);
        if (u) stage_rows(r.raw[1], thread, shared.staged[1]);
      });
      if (t0 + L::kTokens < piece.end) {
        fetch(job.k, k_head, t0 + L::kTokens, 0);
        if (u) fetch(job.v, v_head, t0 + L::kTokens, 1);
      }
      group.barrier();  // (which also ends the reads of the fragments before)
      put(0, shared.left);
      if (u) put(1, shared.right);
      group.barrier();
      const int first = static_cast<int>(t0 - piece.begin);
      if (is_float16<Group>(job.k)) {
        add_step<true>(first);
      } else {
        add_step<false>(first);
      }
    }
    store_state_sums(group, job, piece, head, u, total,
                     [](Registers& r, int e) { return r.sum[e / 4][e % 4]; });
  }
};

// Block (piece_index, head, u)'s work.
template <class Group>
KALMANET_KERNEL void run_states(Group& group, StateShared& shared, const GkaJob& job,
                                int64_t piece_index, int64_t head, bool u) {
  const Piece piece = piece_of(job, piece_index);
  if (piece.last) return;
  StateBody<Group> body{group, shared, job, piece, head, u};
  body.run();
}

}  // namespace kalmanet::cuda
