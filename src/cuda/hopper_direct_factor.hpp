// The direct solver on Hopper: a chunk's factors P, R and the gains Z.
#pragma once

#include "cuda/hopper_direct_inverse.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperFactor : DirectPlan<Group, HopperInverse<Group>> {
  using Base = DirectPlan<Group, HopperInverse<Group>>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::t0, Base::n;
  using L = HopperLayout;
  using Registers = HopperRegisters;

  static KALMANET_KERNEL float* sums(Registers& r) { return r.y; }
  static KALMANET_KERNEL float* token_sums(Registers& r) { return r.s; }

  // P, the gains, and q. H is in h.
  KALMANET_KERNEL void factor() {
    const float inverse_mu = divide(1.0f, shared.mu);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < 2; ++m) {
        KALMANET_UNROLL
        for (int e = 0; e < 64; ++e) {
          const int row = 64 * m + sum_row(thread, e / 2);
          const int column = sum_column(thread, e / 2) + e % 2;
          r.h[m][e] = r.h[m][e] * inverse_mu + (row == column ? 1.0f : 0.0f);
        }
      }
    });
    this->plan_tokens(2);
    this->invert();
    group.new_part();
    this->fetch_rows(job.q, head / job.q_group);
    this->put_inverse();
    this->put_rows(2, shared.gains[0], shared.unit[2]);
    publish(group);
    group.barrier();
    group.new_part();
    this->prefetch_chunk(t0 + n);
    load_queries();
    multiply_keys();
    group.barrier();  // (the queries' place is taken by Y)
    put_gains();
    multiply_gains();
    group.new_part();
    invert_factor();
    group.new_part();
    multiply_factor();
    group.barrier();
    put_gains();
    publish(group);
    group.barrier();
  }
  // q alone, where there is nothing to solve.
  KALMANET_KERNEL void take_queries() {
    this->plan_tokens(2);
    this->fetch_rows(job.q, head / job.q_group);
    this->put_rows(2, shared.gains[0], shared.unit[2]);
    group.barrier();
    load_queries();
    group.barrier();
  }
  KALMANET_KERNEL void load_queries() {
    this->load_rows(shared.gains[0], [](Registers& r) -> uint32_t* { return r.q; });
  }

  // y <- left P (kept, high or low), left 64 x 128 of words left(registers); from y where `keep`.
  template <class Left>
  KALMANET_KERNEL void multiply_inverse(int part, Left&& left, bool keep) {
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {  // of P's columns
      const auto y = [half](Registers& r) -> float* { return r.y + 32 * half; };
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {
        const auto a = [&left, k](Registers& r) { return left(r) + 4 * k; };
        const bool more = keep || k > 0;
        if (half == 0 && k >= 4) {  // P21 as it lies
          multiply_wide<64, true>(group, y, a, {shared.inverse[part][1] + 2 * (k - 4) * 8, 8},
                                  more);
        } else {  // P11; P12 = P21^T; P22
          const int quadrant = half == 0 ? 0 : (k < 4 ? 1 : 2);
          multiply_wide<64, false>(group, y, a, {shared.inverse[part][quadrant] + 2 * (k % 4), 8},
                                   more);
        }
      }
    }
  }
  // y += left gains (Z^T, high or low), left 64 x 64. (In halves, as multiply_inverse, whose
  // products may be under way: sums stay in the registers where they are.)
  template <class Left>
  KALMANET_KERNEL void multiply_by_gains(int part, Left&& left, bool keep) {
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {
      KALMANET_UNROLL
      for (int k = 0; k < 4; ++k) {
        multiply_wide<64, true>(
            group, [half](Registers& r) -> float* { return r.y + 32 * half; },
            [&left, k](Registers& r) { return left(r) + 4 * k; },
            {shared.gains[part] + 2 * k * 16 + 8 * half, 16}, keep || k > 0);
      }
    }
  }
  // s <- left X^T, X of tokens x dims.
  template <class Left>
  KALMANET_KERNEL void multiply_transposed(const Core* right, Left&& left, bool keep) {
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      multiply_wide<64, false>(
          group, token_sums, [&left, k](Registers& r) { return left(r) + 4 * k; },
          {right + 2 * k, 16}, keep || k > 0);
    }
  }
  KALMANET_KERNEL void finish_sums() {
    commit_products(group);
    wait_products<0>(group);
    settle<64>(group, sums);
  }
  KALMANET_KERNEL void finish_token_sums() {
    commit_products(group);
    wait_products<0>(group);
    settle<32>(group, token_sums);
  }
  KALMANET_KERNEL void scale_sums(float by) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 64; ++e) r.y[e] *= by;
    });
  }

  // y <- Y^T = K P, a row a token.
  KALMANET_KERNEL void multiply_keys() {
    this->load_keys();
    const auto keys = [](Registers& r) -> uint32_t* { return r.keys; };
    begin_products(group);
    multiply_inverse(1, keys, false);
    finish_sums();
    scale_sums(1.0f / kLowScale);
    begin_products(group);
    multiply_inverse(0, keys, true);
    finish_sums();
    group.each([&](int thread, Registers& r) {
      float by[2];
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        by[half] = shared.key_scale[sum_row(thread, half)] * (1.0f / kInverseScale);
      }
      KALMANET_UNROLL
      for (int e = 0; e < 64; ++e) r.y[e] *= by[e / 2 % 2];
    });
  }

  // y, Y^T or Z^T, into shared memory, and its parts into w and low.
  KALMANET_KERNEL void put_gains() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 32; ++j) {
        r.w[j] = split_scaled(r.y[2 * j], r.y[2 * j + 1], r.low[j]);
        Base::word_of(shared.gains[0], 16, thread, j) = r.w[j];
        Base::word_of(shared.gains[1], 16, thread, j) = r.low[j];
      }
    });
    publish(group);
  }

  // s <- I + Y^T K^T, K scaled.
  KALMANET_KERNEL void multiply_gains() {
    begin_products(group);
    multiply_transposed(shared.keys, [](Registers& r) -> uint32_t* { return r.low; }, false);
    finish_token_sums();
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) r.s[e] *= 1.0f / kLowScale;
    });
    begin_products(group);
    multiply_transposed(shared.keys, [](Registers& r) -> uint32_t* { return r.w; }, true);
    finish_token_sums();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) {
        const int row = sum_row(thread, e / 2), column = sum_column(thread, e / 2) + e % 2;
        r.s[e] = r.s[e] * shared.key_scale[column] + (row == column ? 1.0f : 0.0f);
      }
    });
  }

  // I + K Y in s becomes R^{-1}, whose parts go into f. Elimination of 16 rows at a time: D = L L^T
  // the pivot, rows_below -= B D^{-1} rows, B their columns of the pivot; where that leaves zeros
  // the inverse grows, as if the pivot's columns had been I. The pivot's own rows become L^{-1}
  // rows.
  KALMANET_KERNEL void invert_factor() {
    KALMANET_LOOP
    for (int b = 0; b < 4; ++b) {
      take_factor_columns(b);
      group.with_warp(b, [&] {
        put_factor_rows(b);
        this->take_pivot([](Registers& r, int tile) -> float (&)[4] { return r.next[0][tile]; });
        this->eliminate_pivot();
        this->put_pivot(shared.pivot[0][0], shared.pivot[0][1], 1.0f);
      });
      publish(group);
      group.barrier();
      load_multiples(b);
      begin_products(group);
      KALMANET_UNROLL
      for (int part = 2; part >= 0; --part) {
        multiply_wide<64, true>(group, token_sums,
                                [part](Registers& r) { return r.left[0][part == 1 ? 1 : 0]; },
                                {shared.factor_rows[part == 2 ? 1 : 0], 8});
      }
      finish_token_sums();
      if (b < 3) group.barrier();
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        float v[2];
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          v[c] = sum_column(thread, j) + c <= sum_row(thread, j) ? r.s[2 * j + c] : 0.0f;
        }
        r.f[0][j] = split_float16(v[0], v[1], r.f[1][j]);
      }
    });
  }
  // next[0] <- columns 16 b .. of s.
  KALMANET_KERNEL void take_factor_columns(int b) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        if (block != b) continue;
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) r.next[0][e / 4][e % 4] = r.s[8 * block + e];
      }
    });
  }
  // One warp: its rows, with I where the pivot is.
  KALMANET_KERNEL void put_factor_rows(int b) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        const int row = sum_row(thread, j) % 16, column = sum_column(thread, j) % 16;
        float v[2];
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          v[c] = j / 4 != b ? r.s[2 * j + c] : (row == column + c ? 1.0f : 0.0f);
        }
        const int at = j % 2 * 8 + j / 2;
        uint32_t low;
        shared.factor_rows[0][at].word[thread % 32] = split_float16(v[0], v[1], low);
        shared.factor_rows[1][at].word[thread % 32] = low;
      }
    });
  }
  // left[0] <- what multiplies the pivot's rows: below -B D^{-1}, in them L^{-1}, above nothing;
  // and s keeps what these rows keep.
  KALMANET_KERNEL void load_multiples(int b) {
    const Quad* const pivot = shared.pivot[0];  // L^{-T}
    const auto clear = [](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) r.g[i / 4][i % 4] = 0;
    };
    group.each(clear);
    this->pack_factor(1.0f, [](Registers& r) -> const float (&)[2][4] { return r.next[0]; });
    this->load_right(0, [&](int) { return pivot; });
    this->load_right(1, [&](int) { return pivot + 1; });
    this->multiply_split();  // B L^{-T}
    this->pack_factor(-1.0f, [](Registers& r) -> const float (&)[2][4] { return r.g; });
    group.each(clear);
    this->load_right_transposed(0, [&](int) { return pivot; });
    this->load_right_transposed(1, [&](int) { return pivot + 1; });
    this->multiply_split();  // -B D^{-1}
    this->load_left_transposed(0, [&](int) { return pivot; });
    this->load_left_transposed(1, [&](int) { return pivot + 1; });
    group.each([&](int thread, Registers& r) {
      const int warp = thread / 32;
      uint32_t below[2][4];
      Base::split_block(r.g, 1.0f, below);
      KALMANET_UNROLL
      for (int part = 0; part < 2; ++part) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          r.left[0][part][j] = warp > b ? below[part][j] : (warp == b ? r.a[part][j] : 0u);
        }
      }
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) {
        if (warp == b || (warp > b && e / 8 == b)) r.s[e] = 0.0f;
      }
    });
  }

  // y <- sqrt(2) Z^T = sqrt(2) R^{-1} Y^T.
  KALMANET_KERNEL void multiply_factor() {
    const auto high = [](Registers& r) -> uint32_t* { return r.f[0]; };
    begin_products(group);
    multiply_by_gains(1, high, false);
    finish_sums();
    scale_sums(1.0f / kLowScale);
    begin_products(group);
    multiply_by_gains(0, [](Registers& r) -> uint32_t* { return r.f[1]; }, true);
    multiply_by_gains(0, high, true);
    finish_sums();
    scale_sums(kGainScale);
  }
};

}  // namespace kalmanet::cuda
