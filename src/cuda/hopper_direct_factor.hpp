// The direct solver on Hopper: a chunk's factors P, R and the gains Z.
#pragma once

#include "cuda/hopper_direct_inverse.hpp"

namespace kalmanet::cuda {

template <class Group>
struct HopperFactor : DirectPlan<Group, HopperInverse<Group>> {
  using Base = DirectPlan<Group, HopperInverse<Group>>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::t0, Base::n,
      Base::sums, Base::token_sums;
  using L = HopperLayout;
  using Registers = HopperRegisters;

  // P, the gains, and q. H is in h.
  KALMANET_KERNEL void factor() {
    const float inverse_mu = divide(1.0f, shared.mu);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 64; ++e) {
        const int row = sum_row(thread, e / 2), column = sum_column(thread, e / 2) + e % 2;
        r.h[e] = r.h[e] * inverse_mu + (row == column ? diagonal_one<Group>(job, row) : 0.0f);
      }
    });
    this->invert();
    group.new_part();
    this->fetch_rows(job.q, head / job.q_group, 0);
    this->put_inverse();
    load_queries();
    multiply_keys();
    group.barrier();  // (the queries' place is taken by Y)
    put_gains();
    publish(group);
    group.barrier();
    group.new_part();
    multiply_gains();
    invert_factor();
    group.new_part();
    multiply_factor();
    group.barrier();
    put_gains();
  }
  // q <- Q, which was fetched, through the gains' place. A barrier on the way.
  KALMANET_KERNEL void load_queries() {
    this->put_rows(job.q, 0, 2, shared.gains[0], shared.unit[2]);
    publish(group);
    group.barrier();
    group.new_part();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) r.q[j] = Base::half_word(shared.gains[0], thread, j);
    });
  }

  // y += left P (high or low), left 64 x 128 in shared memory; or = where not `keep`.
  KALMANET_KERNEL void multiply_inverse(const Core* left, int part, bool keep) {
    // Half g of P's columns: its upper rows are P11, or P12 = P21^T; the lower ones P21, P22.
    multiply_shared<4, false>(
        group, sums, [=](int) { return Cores{left, 16}; },
        [&, part](int thread) { return Cores{shared.inverse[part][thread / 128], 8}; }, keep);
    if (this->is_half()) return;
    multiply_shared<4, true>(
        group, sums, [=](int) { return Cores{left + 8, 16}; },
        [&, part](int thread) { return Cores{shared.inverse[part][1 + thread / 128], 8}; });
  }
  // y += f[of] gains (Z^T or Y^T, high or low).
  KALMANET_KERNEL void multiply_by_gains(int of, int part, bool keep) {
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      multiply_wide<64, true>(
          group, sums, [of, k](Registers& r) { return r.f[of] + 4 * k; },
          [&, part, k](int thread) {
            return Cores{shared.gains[part] + 2 * k * 16 + thread / 128 * 8, 16};
          },
          keep || k > 0);
    }
  }
  // s += left right^T, both tokens x dims in shared memory.
  KALMANET_KERNEL void multiply_transposed(const Core* left, const Core* right, bool keep) {
    this->template multiply_dims<false>([=](int) { return Cores{left, 16}; },
                                        [=](int) { return Cores{right, 16}; }, keep);
  }
  KALMANET_KERNEL void scale_sums(float by) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) r.y[e] *= by;
    });
  }
  KALMANET_KERNEL void scale_token_sums(float by) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) r.s[e] *= by;
    });
  }

  // y <- Y^T = K P, a row a token.
  KALMANET_KERNEL void multiply_keys() {
    begin_products(group);
    multiply_inverse(shared.keys, 1, false);
    this->finish_sums();
    scale_sums(1.0f / kLowScale);
    begin_products(group);
    multiply_inverse(shared.keys, 0, true);
    this->finish_sums();
    group.each([&](int thread, Registers& r) {
      float by[2];
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        by[half] = shared.key_scale[Base::token_of(thread, half)] * (1.0f / kInverseScale);
      }
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) r.y[e] *= by[e / 2 % 2];
    });
  }

  // y, Y^T or Z^T, into shared memory.
  KALMANET_KERNEL void put_gains() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        uint32_t low;
        Base::half_word(shared.gains[0], thread, j) = split_scaled(r.y[2 * j], r.y[2 * j + 1], low);
        Base::half_word(shared.gains[1], thread, j) = low;
      }
    });
  }

  // s <- I + Y^T K^T, K scaled; both warpgroups.
  KALMANET_KERNEL void multiply_gains() {
    begin_products(group);
    multiply_transposed(shared.gains[1], shared.keys, false);
    this->finish_token_sums();
    scale_token_sums(1.0f / kLowScale);
    begin_products(group);
    multiply_transposed(shared.gains[0], shared.keys, true);
    this->finish_token_sums();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 32; ++e) {
        const int row = Base::token_of(thread, e / 2);
        const int column = sum_column(thread, e / 2) + e % 2;
        r.s[e] = r.s[e] * shared.key_scale[column] + (row == column ? 1.0f : 0.0f);
      }
    });
  }

  // I + K Y in s becomes R^{-1}, whose parts go into f; both warpgroups do the same. Elimination of
  // 16 rows at a time: D = L L^T the pivot, rows_below -= B D^{-1} rows, B their columns of the
  // pivot; where that leaves zeros the inverse grows, as if the pivot's columns had been I. The
  // pivot's own rows become L^{-1} rows.
  KALMANET_KERNEL void invert_factor() {
    KALMANET_LOOP
    for (int b = 0; b < 4; ++b) {
      take_factor_columns(b);
      // (Both warpgroups have these rows: what the one writes the other need not.)
      group.with_warp(b + 4, [&] { put_factor_rows(b); });
      group.with_warp(b, [&] {
        this->take_pivot([](Registers& r, int tile) -> float (&)[4] { return r.next[tile]; });
        this->eliminate_pivot();
        this->put_pivot(shared.pivot[0][0], shared.pivot[0][1], 1.0f);
      });
      publish(group);
      group.barrier();
      load_multiples(b);
      begin_products(group);
      KALMANET_UNROLL
      for (int part = 2; part >= 0; --part) {
        multiply_wide<64, true>(
            group, token_sums, [part](Registers& r) { return r.left[part == 1 ? 1 : 0]; },
            [&](int) { return Cores{shared.factor_rows[part == 2 ? 1 : 0], 8}; });
      }
      this->finish_token_sums();
      group.barrier();
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 16; ++j) {
        float v[2];
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          v[c] = sum_column(thread, j) + c <= Base::token_of(thread, j) ? r.s[2 * j + c] : 0.0f;
        }
        r.f[0][j] = split_float16(v[0], v[1], r.f[1][j]);
      }
    });
  }
  // next <- columns 16 b .. of s.
  KALMANET_KERNEL void take_factor_columns(int b) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        if (block != b) continue;
        only_here();
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) r.next[e / 4][e % 4] = r.s[8 * block + e];
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
  // left <- what multiplies the pivot's rows: below -B D^{-1}, in them L^{-1}, above nothing; and s
  // keeps what these rows keep.
  KALMANET_KERNEL void load_multiples(int b) {
    const Quad* const pivot = shared.pivot[0];  // L^{-T}
    const auto clear = [](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) r.g[i / 4][i % 4] = 0;
    };
    group.each(clear);
    this->pack_factor(1.0f, [](Registers& r) -> const float (&)[2][4] { return r.next; });
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
      const int warp = thread / 32 % 4;
      uint32_t below[2][4];
      Base::split_block(r.g, 1.0f, below);
      KALMANET_UNROLL
      for (int part = 0; part < 2; ++part) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          r.left[part][j] = warp > b ? below[part][j] : (warp == b ? r.a[part][j] : 0u);
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
    begin_products(group);
    multiply_by_gains(0, 1, false);
    this->finish_sums();
    scale_sums(1.0f / kLowScale);
    begin_products(group);
    multiply_by_gains(1, 0, true);
    multiply_by_gains(0, 0, true);
    this->finish_sums();
    scale_sums(kGainScale);
  }
};

}  // namespace kalmanet::cuda
