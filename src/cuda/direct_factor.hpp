// The direct chunk kernel: a chunk's factors.
#pragma once

#include "cuda/direct_plan.hpp"
#include "cuda/direct_state.hpp"

namespace kalmanet::cuda {

template <class Group>
struct DirectFactor : DirectPlan<Group, DirectState<Group>> {
  using Base = DirectPlan<Group, DirectState<Group>>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n;
  using L = DirectLayout;
  using Registers = DirectRegisters;

  // P, Y, R and the gains Z. H is in h.
  KALMANET_KERNEL void factor() {
    const float inverse_mu = 1.0f / shared.mu;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 16; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const bool diagonal = this->state_row(thread, i) == this->state_column(thread, tile, i);
          r.h[tile][i] = r.h[tile][i] * inverse_mu +
                         (diagonal ? diagonal_one<Group>(job, this->state_row(thread, i)) : 0.0f);
        }
      }
    });
    this->plan_tokens(6);
    this->invert(num_pivots<Group>(job));
    this->put_inverse();
    multiply_keys();
    put_gains();
    group.barrier();
    group.new_part();
    group.by_warp(0, 4, [&](int) { multiply_gains(); });
    group.by_warp(4, 8, [&](int warp) { fetch_ahead(warp); });
    invert_factor();
    group.barrier();
    group.new_part();
    multiply_factor();
    group.barrier();
    put_gains();
    group.by_warp(4, 8,
                  [&](int warp) { this->put_rows_of_half(job.q, warp, 2, shared.queries, 2); });
  }
  // Q, and all that is needed next towards L2.
  KALMANET_KERNEL void fetch_ahead(int warp) {
    this->fetch_rows_of_half(job.q, head / job.q_group, warp);
    this->prefetch_rows(job.v, head / job.v_group, t0);
    const int64_t next = t0 + n;
    this->prefetch_rows(job.k, head / job.k_group, next);
    this->prefetch_rows(job.q, head / job.q_group, next);
    this->prefetch_scalars(job.gk, next);
    if (job.g.data != job.gk.data) this->prefetch_scalars(job.g, next);
    this->prefetch_scalars(job.alpha, next);
    this->prefetch_scalars(job.beta, next);
    this->prefetch_scalars(job.ridge, next);
  }
  // Q alone, where there is nothing to solve.
  KALMANET_KERNEL void take_queries() {
    this->plan_tokens(6);
    group.by_warp(4, 8, [&](int warp) {
      this->fetch_rows_of_half(job.q, head / job.q_group, warp);
      this->put_rows_of_half(job.q, warp, 2, shared.queries, 2);
    });
  }

  // y <- Y = P K^T: the warp's 16 dims, of P as invert() left it, and all tokens.
  KALMANET_KERNEL void multiply_keys() {
    constexpr float kScale = 256.0f;  // so that what is 1e-3 of 1 has normal low parts
    this->clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      group.each([&](int, Registers& r) {
        this->template pack_state<true>(r.h[2 * k], r.h[2 * k + 1], -kScale, r.a);
      });
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        this->load_right_transposed(0, [&](int) { return &shared.keys[block * 8 + k]; });
        this->add_y(2 * block, 1, 0);
        this->add_y(2 * block, 0, 0);
      }
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.y[tile][i] *= shared.key_scale[this->column_of(thread, tile, i)] * (1.0f / kScale);
        }
      }
    });
  }

  // y, Y or Z, into shared memory.
  KALMANET_KERNEL void put_gains() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int block = 0; block < 4; ++block) {
        const int at = thread / 32 * 4 + block;
        KALMANET_UNROLL
        for (int m = 0; m < 4; ++m) {
          const float (&v)[4] = r.y[2 * block + m % 2];
          uint32_t low;
          shared.gains[0][at].word[m][thread % 32] =
              split_scaled(v[m / 2 * 2], v[m / 2 * 2 + 1], low);
          shared.gains[1][at].word[m][thread % 32] = low;
        }
      }
    });
  }

  // h's first 8 tiles <- the warp's 16 rows of I + K Y.
  KALMANET_KERNEL void multiply_gains() {
    this->clear_y();
    KALMANET_UNROLL
    for (int part = 1; part >= 0; --part) {
      KALMANET_UNROLL
      for (int k = 0; k < 8; ++k) {
        this->load_left(0, [&](int w) { return &shared.keys[w * 8 + k]; });
        KALMANET_UNROLL
        for (int block = 0; block < 4; ++block) {
          this->load_right(0, [&](int) { return &shared.gains[part][k * 4 + block]; });
          this->add_y(2 * block, 0, 0);
        }
      }
      if (part == 1) this->scale_y(1.0f / kLowScale);
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = thread / 32 * 16 + this->row_of(thread, i);
        const float by = shared.key_scale[row];
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          r.h[tile][i] =
              r.y[tile][i] * by + (row == this->column_of(thread, tile, i) ? 1.0f : 0.0f);
        }
      }
    });
  }

  // Rows 16 w .. of I + K Y, in the first four warps' h, become R^{-1}, high and low in queries.
  // Elimination of 16 rows at a time: D = L L^T the pivot, rows_below -= B D^{-1} rows, B their
  // columns of the pivot; where that leaves zeros the inverse grows, as if the pivot's columns
  // had been I. The pivot's own rows become L^{-1} rows. Columns turn as in invert().
  KALMANET_KERNEL void invert_factor() {
    KALMANET_LOOP
    for (int b = 0; b < 4; ++b) {
      group.by_warp(b, b + 1, [&](int) {
        put_factor_rows();
        this->take_pivot([](Registers& r, int tile) -> float (&)[4] { return r.h[tile]; });
        this->eliminate_pivot();
        this->put_pivot(shared.pivot[0][0], shared.pivot[0][1], 1.0f);
      });
      group.barrier();
      group.by_warp(0, 4, [&](int warp) { eliminate_rows(b, warp); });
      group.barrier();
    }
    group.by_warp(0, 4, [&](int warp) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int block = 0; block < 4; ++block) {
          KALMANET_UNROLL
          for (int m = 0; m < 4; ++m) {
            float v[2];
            KALMANET_UNROLL
            for (int i = 0; i < 2; ++i) {
              const int e = m / 2 * 2 + i;
              const int row = warp * 16 + this->row_of(thread, e);
              const int column = this->column_of(thread, 2 * block + m % 2, e);
              v[i] = column <= row ? r.h[2 * block + m % 2][e] : 0.0f;
            }
            uint32_t low;
            shared.queries[warp * 4 + block].word[m][thread % 32] = split_float16(v[0], v[1], low);
            shared.queries[16 + warp * 4 + block].word[m][thread % 32] = low;
          }
        }
      });
    });
  }

  // The pivot's rows as they are, but for the pivot, which is not read: four blocks, high and low.
  KALMANET_KERNEL Quad* factor_rows(int part) { return shared.queries + 16 * part; }
  KALMANET_KERNEL void put_factor_rows() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int block = 1; block < 4; ++block) {
        KALMANET_UNROLL
        for (int m = 0; m < 4; ++m) {
          const float (&v)[4] = r.h[2 * block + m % 2];
          uint32_t low;
          factor_rows(0)[block].word[m][thread % 32] =
              split_float16(v[m / 2 * 2], v[m / 2 * 2 + 1], low);
          factor_rows(1)[block].word[m][thread % 32] = low;
        }
      }
    });
  }

  // One warp's rows, after the elimination of block b.
  KALMANET_KERNEL void eliminate_rows(int b, int warp) {
    const Quad* const pivot = shared.pivot[0];  // L^{-T}
    group.each([](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.g[0][i] = r.g[1][i] = 0;
    });
    if (warp > b) {
      // B L^{-T}, then that times L^{-1}.
      this->pack_factor(1.0f, [](Registers& r) -> const float (&)[2][4] {
        return reinterpret_cast<const float (&)[2][4]>(r.h);
      });
      this->load_right(0, [&](int) { return pivot; });
      this->load_right(1, [&](int) { return pivot + 1; });
      this->multiply_split();
      this->pack_factor(-1.0f, [](Registers& r) -> const float (&)[2][4] { return r.g; });
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.g[0][i] = r.g[1][i] = 0;
      });
      this->load_right_transposed(0, [&](int) { return pivot; });
      this->load_right_transposed(1, [&](int) { return pivot + 1; });
      this->multiply_split();  // -B D^{-1}
      this->pack_factor(1.0f, [](Registers& r) -> const float (&)[2][4] { return r.g; });
    } else if (warp == b) {
      this->load_left_transposed(0, [&](int) { return pivot; });
      this->load_left_transposed(1, [&](int) { return pivot + 1; });
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {  // L^{-1} itself
          float (&g)[4] = r.g[i / 2];
          g[i % 2 * 2] = low_float16(r.a[0][i]) + low_float16(r.a[1][i]);
          g[i % 2 * 2 + 1] = high_float16(r.a[0][i]) + high_float16(r.a[1][i]);
        }
        KALMANET_UNROLL
        for (int tile = 2; tile < 8; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.h[tile][i] = 0;
        }
      });
    } else {
      group.each([](int, Registers& r) {  // its columns go round, unchanged
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) r.g[i / 4][i % 4] = r.h[i / 4][i % 4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.a[0][i] = r.a[1][i] = 0;
      });
    }
    KALMANET_UNROLL
    for (int block = 0; block < 3; ++block) {
      this->load_right(0, [&](int) { return factor_rows(0) + block + 1; });
      this->load_right(1, [&](int) { return factor_rows(1) + block + 1; });
      group.each([&](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i)
          r.h[2 * block + i / 4][i % 4] = r.h[2 * block + 2 + i / 4][i % 4];
      });
      const auto to = [block](Registers& r, int j) -> float (&)[4] { return r.h[2 * block + j]; };
      this->add(to, [](Registers& r) -> uint32_t (&)[4] { return r.a[1]; }, 0);
      this->add(to, [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; }, 1);
      this->add(to, [](Registers& r) -> uint32_t (&)[4] { return r.a[0]; }, 0);
    }
    group.each([](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) r.h[6 + i / 4][i % 4] = r.g[i / 4][i % 4];
    });
  }

  // y <- sqrt(2) Z = sqrt(2) Y R^{-T}: the warp's 16 dims.
  KALMANET_KERNEL void multiply_factor() {
    this->clear_y();
    add_factor(1, 0);
    this->scale_y(1.0f / kLowScale);
    add_factor(0, 1);
    add_factor(0, 0);
    this->scale_y(kGainScale);
  }
  KALMANET_KERNEL void add_factor(int part, int factor_part) {
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      this->load_left(0, [&](int w) { return &shared.gains[part][w * 4 + k]; });
      KALMANET_UNROLL
      for (int block = k; block < 4; ++block) {  // (R^{-1} is lower triangular)
        this->load_right_transposed(
            0, [&](int) { return &shared.queries[16 * factor_part + block * 4 + k]; });
        this->add_y(2 * block, 0, 0);
      }
    }
  }
};

}  // namespace kalmanet::cuda
