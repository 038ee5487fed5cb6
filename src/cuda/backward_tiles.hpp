// What the backward's kernels on matrix units that read x and z know of a chunk's tokens
// (backward_tile_loads.hpp has their tiles): what follows from the gates, products of a token's
// own, and sums over the block.
#pragma once

#include "cuda/backward_tile_loads.hpp"

namespace kalmanet::cuda {

template <class Group>
struct BackwardTiles : TileLoads<Group> {
  using Base = TileLoads<Group>;
  using Base::group, Base::shared, Base::backward, Base::job, Base::piece, Base::head, Base::t0,
      Base::n;
  using L = TileLayout;
  using Registers = TileRegisters;

  // A warp's lane l has tokens 2 l and 2 l + 1: pair <- the sums of pair up to each token, or
  // (kAfter) from it on.
  template <bool kAfter>
  KALMANET_KERNEL void scan() {
    group.each([](int, Registers& r) { r.all = r.pair[0] + r.pair[1]; });
    KALMANET_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      group.shuffle([](Registers& r) -> float& { return r.passed; },
                    [](Registers& r) { return r.all; },
                    [step](int thread) { return kAfter ? thread + step : thread - step; });
      group.each([&](int thread, Registers& r) {
        const int lane = thread % 32;
        if (kAfter ? lane + step < 32 : lane >= step) r.all += r.passed;
      });
    }
    group.shuffle([](Registers& r) -> float& { return r.passed; },
                  [](Registers& r) { return r.all; },
                  [](int thread) { return kAfter ? thread + 1 : thread - 1; });
    // (No differences: what a strong decay leaves must stay exact.)
    group.each([](int thread, Registers& r) {
      const float beyond = thread % 32 == (kAfter ? 31 : 0) ? 0.0f : r.passed;
      float &first = r.pair[kAfter ? 1 : 0], &second = r.pair[kAfter ? 0 : 1];
      first += beyond, second += first;
    });
  }

  // What is a token's own and what follows from H's gates: by a warp, a lane two tokens. later:
  // sum_i w_i e^{2 (G_i - G_C)} over tokens after the chunk that count.
  KALMANET_KERNEL void load_key_scalars(int warp, float later) {
    group.with_warp(warp, [&] {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = thread % 32 * 2 + i;
          r.kept[i] = t < n
                          ? static_cast<float>(backward.w[place_of(backward, piece, t0 + t, head)])
                          : 0.0f;
        }
      });
      load_gates(0, true);
      sum_weights(later);
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = thread % 32 * 2 + i;
          const float start = expf(r.pair[i]), beta = r.beta[i];
          this->now().beta[t] = beta;
          this->now().half[t] = expf(0.5f * r.pair[i]);
          this->now().w_start[t] = start * r.kept[i];
          const float weight = start * r.column[i];
          this->now().r_start[t] = weight;
          this->now().key_factor[t] = -2.0f * weight * beta;
          this->now().key_weight[t] = 2.0f * weight * beta * beta;
        }
        if (thread % 32 == 0) this->now().through_f = expf(2.0f * r.gate[0]) * r.column[0];
      });
    });
  }
  // The same of U's. decays: unless H's are there.
  KALMANET_KERNEL void load_value_scalars(int warp, bool decays) {
    group.with_warp(warp, [&] {
      load_gates(1, decays);
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int t = thread % 32 * 2 + i;
          if (decays) this->now().beta[t] = r.beta[i];
          this->now().alpha[t] =
              t < n ? scalar_at<float>(job.alpha, piece.row, t0 + t, head, 1.0) : 1.0f;
          this->now().mix[t] = t < n ? static_cast<float>(job.scale) * expf(r.pair[i]) : 0.0f;
        }
      });
    });
  }

  // By one warp: gate and beta; pair <- G_t; what both states have.
  KALMANET_KERNEL void load_gates(int which, bool decays) {
    const Array& gates = which == 0 ? job.gk : job.g;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int t = thread % 32 * 2 + i;
        r.gate[i] = t < n ? scalar_at<float>(gates, piece.row, t0 + t, head, 0.0) : 0.0f;
        r.beta[i] = t < n ? scalar_at<float>(job.beta, piece.row, t0 + t, head, 1.0) : 0.0f;
        r.pair[i] = r.gate[i];
      }
    });
    this->template scan<false>();
    group.shuffle([](Registers& r) -> float& { return r.passed; },
                  [](Registers& r) { return r.pair[1]; }, [](int) { return 31; });
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2 && decays; ++i) {
        const int t = thread % 32 * 2 + i;
        const float end = r.beta[i] * expf(r.passed - r.pair[i]);
        this->now().start[t] = expf(r.pair[i]);
        this->now().inverse[t] = expf(-r.pair[i]);
        this->now().end[t] = end;
        this->now().to_end[t] = r.beta[i] * end;
      }
      if (thread % 32 == 0) this->now().total[which] = expf(r.passed);
    });
  }

  // column <- r_t = w_t + e^{2 gk_{t+1}} r_{t+1}, w in kept: a scan of such steps, whose factors
  // are at most 1.
  KALMANET_KERNEL void sum_weights(float later) {
    group.shuffle([](Registers& r) -> float& { return r.passed; },
                  [](Registers& r) { return r.gate[0]; }, [](int thread) { return thread + 1; });
    group.each([&](int thread, Registers& r) {
      const bool last = thread % 32 == 31;
      const float own = expf(2.0f * r.gate[1]);
      r.column[1] = last ? 1.0f : expf(2.0f * r.passed);  // to the next lane's first token
      r.all = r.kept[0] + own * (r.kept[1] + (last ? later : 0.0f));
      r.decay = last ? 0.0f : own * r.column[1];
    });
    KALMANET_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      group.shuffle([](Registers& r) -> float& { return r.passed; },
                    [](Registers& r) { return r.all; },
                    [step](int thread) { return thread + step; });
      group.shuffle([](Registers& r) -> float& { return r.passed2; },
                    [](Registers& r) { return r.decay; },
                    [step](int thread) { return thread + step; });
      group.each([&](int thread, Registers& r) {
        if (thread % 32 + step >= 32) return;
        r.all += r.decay * r.passed;
        r.decay *= r.passed2;
      });
    }
    group.shuffle([](Registers& r) -> float& { return r.passed; },
                  [](Registers& r) { return r.all; }, [](int thread) { return thread + 1; });
    group.each([&](int thread, Registers& r) {
      r.column[0] = r.all;
      r.column[1] = r.kept[1] + r.column[1] * (thread % 32 == 31 ? later : r.passed);
    });
  }

  // shared.dots[which][half][token] <- sums of term(registers, thread, n, i) over the warp's
  // columns.
  template <class F>
  KALMANET_KERNEL void measure(int which, F&& term) {
    group.each([&](int thread, Registers& r) {
      r.row[0] = r.row[1] = 0.0f;
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        KALMANET_UNROLL
        for (int h = 0; h < 2; ++h) r.row[h] += term(r, thread, tile, h);
      }
    });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.row[0]; });
    group.template sum_lanes<4>([](Registers& r) -> float& { return r.row[1]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 4 != 0) return;
      shared.dots[which][thread / 128][Base::token_of(thread, 0)] = r.row[0];
      shared.dots[which][thread / 128][Base::token_of(thread, 2)] = r.row[1];
    });
  }
  // Of sums (of(registers)[n]) and a tile's own elements; kExact: of a tensor's.
  template <bool kExact, class Of>
  KALMANET_KERNEL void measure_with(int which, const Parts& tile_of, Of&& of) {
    measure(which, [&](Registers& r, int thread, int tile, int h) {
      const int t = Base::token_of(thread, 2 * h), column = Base::column_of(thread, tile, 0);
      float v[2];
      if constexpr (kExact) {
        load_two_exact<128, Group>(tile_of, t, column, v);
      } else {
        load_two<128>(tile_of, t, column, v);
      }
      return of(r)[tile][2 * h] * v[0] + of(r)[tile][2 * h + 1] * v[1];
    });
  }
  KALMANET_KERNEL float dot(int which, int token) const {
    return shared.dots[which][0][token] + shared.dots[which][1][token];
  }

  // shared.warp[i] <- each warp's sum of sum[i].
  KALMANET_KERNEL void put_sum(int i) {
    group.template sum_lanes<32>([i](Registers& r) -> float& { return r.sum[i]; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.warp[i][thread / 32] = r.sum[i];
    });
  }
  KALMANET_KERNEL float sum_of(int i) const {
    float sum = 0.0f;
    for (int w = 0; w < L::kThreads / 32; ++w) sum += shared.warp[i][w];
    return sum;
  }
};

}  // namespace kalmanet::cuda
