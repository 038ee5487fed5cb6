// Heads of short memory: 64 tokens of one, each with a system in the space of its last keys
// (short_plan.hpp says how many: at most 64). K = V = 128, bfloat16 tensors, one gate for H and U.
//
//   H_t = sum_j e_j k_j k_j^T     e_j = beta_j^2 e^{G_t - G_j}     U_t likewise
//
// and y_j = k_j . x of (H_t + lambda_t) x = q_t solves (lambda_t I + Gram diag(e)) y = K q_t, so
// that a token costs w^3 operations instead of K^3, whatever the ridge ratio; Chebyshev's iterates
// of x are those of y. What x has in all directions that no key has touched, q / lambda_t, never
// enters a product: that is what ruins these tokens' digits elsewhere.
//
// The keys' products come from matrix units, exact but for float32 sums. A warp solves for a token,
// in float32: lane l has rows l and (kRows = 2) l + 32 of the matrix in its registers, row i being
// the key i tokens back. Elimination by columns goes through all rows (no substitution afterwards)
// and needs no pivoting: the matrix is similar to a positive definite one.
#pragma once

#include "cuda/short_tiles.hpp"

namespace kalmanet::cuda {

template <class Group, int kRows, int kSides>
struct ShortSystem : ShortTiles<Group, kRows, kSides> {
  using Base = ShortTiles<Group, kRows, kSides>;
  using Base::group, Base::shared, Base::job, Base::window, Base::kColumns;
  using L = ShortLayout;
  using Registers = typename Base::Registers;
  using Base::token_in;

  KALMANET_KERNEL float gram_of(int j, int i) const {
    return j > i ? shared.gram[j][j - i] : shared.gram[i][i - j];
  }
  // f(group's first column) for the columns in use, 16 at a time.
  template <class F>
  KALMANET_KERNEL static void each_columns(int columns, F&& f) {
    KALMANET_UNROLL
    for (int first = 0; first < kColumns; first += 16) {
      if (first < columns) f(first);
    }
  }

  // A warp's system of its token, f_t and lambda_t.
  KALMANET_KERNEL void load_system(int round) {
    group.each([&](int thread, Registers& r) {
      const int t = token_in(round, thread), last = L::kTokens + t;
      KALMANET_UNROLL
      for (int h = 0; h < kRows; ++h) {
        const int i = thread % 32 + 32 * h, j = last - i;
        const float fade = static_cast<float>(shared.since[last] - shared.since[j]);
        r.weight[h] = i < window ? shared.beta2[j] * expf(fade) : 0.0f;
        shared.vector[0][thread / 32][i] = r.weight[h];
        KALMANET_UNROLL
        for (int s = 0; s < kSides; ++s) r.side[s][h] = shared.dots[s][t][j];
      }
    });
    group.barrier_warp();
    group.each([&](int thread, Registers& r) {
      const int last = L::kTokens + token_in(round, thread), lane = thread % 32;
      const float* const e = shared.vector[0][thread / 32];
      float squares[kRows] = {};
      each_columns(window, [&](int first) {
        KALMANET_UNROLL
        for (int i = first; i < first + 16; i += 4) {
          float v[4];
          load4(e + i, v);
          KALMANET_UNROLL
          for (int c = i; c < i + 4; ++c) {
            KALMANET_UNROLL
            for (int h = 0; h < kRows; ++h) {
              const float g = gram_of(last - lane - 32 * h, last - c);
              r.row[h][c] = v[c - i] * g;
              squares[h] += r.row[h][c] * g;
            }
          }
        }
      });
      r.sum = 0.0f;
      KALMANET_UNROLL
      for (int h = 0; h < kRows; ++h) r.sum += r.weight[h] * squares[h];
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      const float f = sqrtf(r.sum);
      r.f = f <= static_cast<float>(kVanishedNorm) ? 0.0f : f;
      r.lambda = shared.ridge[token_in(round, thread)] * r.f;
    });
    group.barrier_warp();  // (the weights were read)
  }

  // other(registers) <- value(registers) of one lane.
  template <class Value>
  KALMANET_KERNEL void take(int lane, Value&& value) {
    group.shuffle([](Registers& r) -> float& { return r.other; }, value,
                  [lane](int) { return lane; });
  }

  // y of all sides by elimination; 16 columns at a time, whose place the next ones take.
  KALMANET_KERNEL void eliminate() {
    const int panels = window / 16;
    group.each([](int, Registers& r) {
      KALMANET_UNROLL
      for (int s = 0; s < kSides; ++s) {
        KALMANET_UNROLL
        for (int h = 0; h < kRows; ++h) r.y[s][h] = r.side[s][h];
      }
      KALMANET_UNROLL
      for (int h = 0; h < kRows; ++h) r.diagonal[h] = 1.0f;
    });
    KALMANET_LOOP
    for (int panel = 0; panel < panels; ++panel) {
      // (The pivot's row is always a lane's first: no register is chosen at run time.)
      if (kRows == 2 && panel == 2) swap_rows();
      KALMANET_UNROLL
      for (int p = 0; p < 16; ++p) {
        const int lane = panel % 2 * 16 + p;
        take(lane, [p](Registers& r) { return r.row[0][p]; });
        group.each([&](int thread, Registers& r) {
          const float pivot = r.other + (r.f == 0.0f ? 1.0f : r.lambda);
          const float per_pivot = 1.0f / pivot;
          KALMANET_UNROLL
          for (int h = 0; h < kRows; ++h) r.factor[h] = r.row[h][p] * per_pivot;
          if (thread % 32 != lane) return;
          r.diagonal[0] = pivot;
          r.factor[0] = 0.0f;
        });
        each_columns(window - panel * 16, [&](int first) {
          KALMANET_UNROLL
          for (int i = first; i < first + 16; ++i) {
            if (i <= p) continue;
            take(lane, [i](Registers& r) { return r.row[0][i]; });
            group.each([i](int, Registers& r) {
              KALMANET_UNROLL
              for (int h = 0; h < kRows; ++h) r.row[h][i] -= r.factor[h] * r.other;
            });
          }
        });
        KALMANET_UNROLL
        for (int s = 0; s < kSides; ++s) {
          take(lane, [s](Registers& r) { return r.y[s][0]; });
          group.each([s](int, Registers& r) {
            KALMANET_UNROLL
            for (int h = 0; h < kRows; ++h) r.y[s][h] -= r.factor[h] * r.other;
          });
        }
      }
      group.each([](int, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i + 16 < kColumns; ++i) {
          KALMANET_UNROLL
          for (int h = 0; h < kRows; ++h) r.row[h][i] = r.row[h][i + 16];
        }
      });
    }
    if (kRows == 2 && panels > 2) swap_rows();
    group.each([](int, Registers& r) {
      r.c_q = r.f == 0.0f ? 0.0f : 1.0f / r.lambda;
      KALMANET_UNROLL
      for (int h = 0; h < kRows; ++h) {
        KALMANET_UNROLL
        for (int s = 0; s < kSides; ++s) {
          r.y[s][h] = r.f == 0.0f ? 0.0f : r.y[s][h] / r.diagonal[h];
        }
        r.c[h] = -r.weight[h] * r.y[0][h] * r.c_q;
      }
    });
  }
  KALMANET_KERNEL void swap_rows() {
    group.each([](int, Registers& r) {
      const auto swap = [&](float (&pair)[kRows]) {
        const float first = pair[0];
        pair[0] = pair[kRows - 1];
        pair[kRows - 1] = first;
      };
      KALMANET_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const float first = r.row[0][i];
        r.row[0][i] = r.row[kRows - 1][i];
        r.row[kRows - 1][i] = first;
      }
      KALMANET_UNROLL
      for (int s = 0; s < kSides; ++s) swap(r.y[s]);
      swap(r.diagonal);
    });
  }

  // The same by Chebyshev's iteration; the first side is x's, whose coefficients come along.
  KALMANET_KERNEL void iterate() {
    group.each([](int, Registers& r) {
      r.w = 2.0f;
      r.c_q = r.f == 0.0f ? 0.0f : 2.0f / (2.0f * r.lambda + r.f);
      r.previous_q = 0.0f;
      KALMANET_UNROLL
      for (int h = 0; h < kRows; ++h) {
        r.c[h] = r.previous_c[h] = 0.0f;
        KALMANET_UNROLL
        for (int s = 0; s < kSides; ++s) {
          r.y[s][h] = r.c_q * r.side[s][h];
          r.previous[s][h] = 0.0f;
        }
      }
    });
    KALMANET_LOOP
    for (int step = 0; step < shared.steps; ++step) {
      put_vectors();
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int s = 0; s < kSides; ++s) {
          const float* const y = shared.vector[s][thread / 32];
          float sum[kRows][2] = {};
          each_columns(window, [&](int first) {
            KALMANET_UNROLL
            for (int i = first; i < first + 16; i += 4) {
              float v[4];
              load4(y + i, v);
              KALMANET_UNROLL
              for (int e = 0; e < 4; ++e) {
                KALMANET_UNROLL
                for (int h = 0; h < kRows; ++h) sum[h][e % 2] += r.row[h][i + e] * v[e];
              }
            }
          });
          KALMANET_UNROLL
          for (int h = 0; h < kRows; ++h) r.product[s][h] = sum[h][0] + sum[h][1];
        }
        const float whole = 2.0f * r.lambda + r.f, lambda = r.lambda;
        const float rho = r.f == 0.0f ? 0.0f : 0.5f * r.f / whole;
        r.w = 1.0f / (1.0f - rho * rho * r.w);
        const float gain = r.f == 0.0f ? 0.0f : 2.0f / whole * r.w, momentum = r.w - 1.0f;
        const auto advance = [&](float& now, float& before, float residual) {
          const float next = now + momentum * (now - before) - gain * residual;
          before = now;
          now = next;
        };
        KALMANET_UNROLL
        for (int h = 0; h < kRows; ++h) {
          advance(r.c[h], r.previous_c[h], r.weight[h] * r.y[0][h] + lambda * r.c[h]);
          KALMANET_UNROLL
          for (int s = 0; s < kSides; ++s) {
            advance(r.y[s][h], r.previous[s][h],
                    r.product[s][h] + lambda * r.y[s][h] - r.side[s][h]);
          }
        }
        advance(r.c_q, r.previous_q, lambda * r.c_q - 1.0f);
      });
      group.barrier_warp();
    }
  }
  KALMANET_KERNEL void put_vectors() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int s = 0; s < kSides; ++s) {
        KALMANET_UNROLL
        for (int h = 0; h < kRows; ++h) {
          shared.vector[s][thread / 32][thread % 32 + 32 * h] = r.y[s][h];
        }
      }
    });
    group.barrier_warp();
  }

  KALMANET_KERNEL void solve() {
    if (job.direct) {
      eliminate();
    } else {
      iterate();
    }
  }
};

}  // namespace kalmanet::cuda
