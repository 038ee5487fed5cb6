// What the backward's last matrix-unit kernel (backward_gradient_chunk.hpp) needs of each token,
// and the gradients of the gates.
#pragma once

#include "cuda/backward_chunk_body.hpp"
#include "cuda/backward_gradient_kernel.hpp"

namespace kalmanet::cuda {

struct GradientChunkShared : BackwardChunkShared {
  Left do_rows[ChunkLayout::kKeys], do_columns[ChunkLayout::kKeys];
  float log_since[2][ChunkLayout::kTokens];  // G_t of H and of U
  float end[2][ChunkLayout::kTokens];        // beta_t e^{G_C - G_t}
  float beta[ChunkLayout::kTokens];
  double decay[ChunkLayout::kTokens];       // e^{gk_t}
  float minus_start[ChunkLayout::kTokens];  // - e^{G_t}
  float mix_weight[ChunkLayout::kTokens];   // scale e^{G_t} of U
  double key_weight[ChunkLayout::kTokens];  // - 2 h_t beta_t^2
  // w_t; r_t = sum_{i>=t} w_i e^{2 (G_i - G_t)}; h_t = e^{G_t} r_t
  double w[ChunkLayout::kTokens], r[ChunkLayout::kTokens], h[ChunkLayout::kTokens];
  double through_f;  // 2 sum_i w_i e^{2 G_i}
  float dots[kGradientDots][ChunkLayout::kTokens];
  float start[2][ChunkLayout::kTokens];      // actions of the start, of H and of U, on token i
  float carry[2][ChunkLayout::kTokens + 1];  // of what tokens before t (and the start) on the carry
};

template <class Group>
struct GradientChunkGates : BackwardProducts<Group> {
  using Base = BackwardProducts<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::t0, Base::n,
      Base::backward;
  using L = ChunkLayout;
  using Registers = ChunkRegisters;

  GradientChunkShared& extra;

  // [which][t][i], in right's and middle's memory; a row's padding keeps lanes out of one bank.
  using PairRows = float[L::kTokens][L::kTokens + 1];
  KALMANET_KERNEL PairRows* pairs() { return reinterpret_cast<PairRows*>(shared.right); }
  static_assert(2 * sizeof(PairRows) <= sizeof(ChunkShared::right) + sizeof(ChunkShared::middle));

  // e^{G_i - G_t} of a state between two tokens, whichever is the later; and 0 where i is earlier.
  KALMANET_KERNEL float decay_between(int which, int t, int i) const {
    const float* const since = extra.log_since[which];
    return expf(i > t ? since[i] - since[t] : since[t] - since[i]);
  }
  KALMANET_KERNEL float between(int which, int t, int i) const {
    return i >= t ? decay_between(which, t, i) : 0.0f;
  }

  // After load_scalars. Ends with a barrier.
  KALMANET_KERNEL void load_extra() {
    group.each([&](int thread, Registers&) {
      if (thread >= 2 * L::kTokens) return;
      const int which = thread / L::kTokens, t = thread % L::kTokens;
      double since = 0.0, rest = 0.0;
      for (int j = 0; j < L::kTokens; ++j) (j <= t ? since : rest) += shared.gate[which][j];
      const float beta = t < n ? scalar_at<float>(job.beta, piece.row, t0 + t, head, 1.0) : 0.0f;
      extra.log_since[which][t] = static_cast<float>(since);
      extra.end[which][t] = beta * static_cast<float>(exp(rest));
      if (which == 1) {
        extra.mix_weight[t] = static_cast<float>(job.scale * exp(since));
        return;
      }
      extra.beta[t] = beta;
      extra.decay[t] = exp(shared.gate[0][t]);
      extra.minus_start[t] = -static_cast<float>(exp(since));
      extra.w[t] = t < n ? backward.w[this->place(t)] : 0.0;
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread >= L::kTokens) return;
      double r = 0.0;
      for (int i = thread; i < L::kTokens; ++i) {
        const double decay = static_cast<double>(decay_between(0, thread, i));
        r += extra.w[i] * decay * decay;
      }
      const double start = exp(shared.since[thread]);
      extra.r[thread] = r;
      extra.h[thread] = start * r;
      extra.key_weight[thread] = -2.0 * start * r * static_cast<double>(shared.beta2[thread]);
      if (thread == 0) extra.through_f = 2.0 * start * start * r;
    });
    group.barrier();
  }

  // extra.dots[which] <- sums of term over dims. Ends with a barrier.
  template <class F>
  KALMANET_KERNEL void measure(int which, F&& term) {
    this->dot_columns(0, term);
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread < L::kTokens) extra.dots[which][thread] = static_cast<float>(this->dot(0, thread));
    });
    group.barrier();
  }

  // The block's sum of registers.sum. Ends with a barrier.
  KALMANET_KERNEL double sum_block() {
    group.template sum_lanes<32>([](Registers& r) -> double& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.warp[thread / 32] = r.sum;
    });
    group.barrier();
    double sum = 0.0;
    for (int w = 0; w < L::kThreads / 32; ++w) sum += shared.warp[w];
    group.barrier();
    return sum;
  }

  // (k_i . k_t)^2 and U's actions of token t on token i. No barrier.
  KALMANET_KERNEL void put_pairs() {
    PairRows* const to = pairs();
    this->each_pair([&](Registers& r, int tile, int e, int t, int i) {
      to[0][t][i] = r.y[0][tile][e];
      to[1][t][i] = r.r[1][tile][e];
    });
  }

  // From actions to gradients, as in backward_gradient_body.hpp; r.r[0] has -e^{G_i - G_t}
  // (z_i . k_t) (x_i . k_t). Sums over tokens j < t and i >= t come in two passes, each with a
  // thread a row. norm2: |H_0|^2; s_h: <S, H_0>; e_u: <E, U_0>.
  KALMANET_KERNEL void gradients_of_gates(double norm2, double s_h, double e_u) {
    PairRows* const a = pairs();
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread < L::kTokens) {  // k_t^T H_i k_t
        double sum = static_cast<double>(shared.beta2[thread]) * extra.dots[kKeyStart][thread];
        for (int i = 0; i < L::kTokens; ++i) {
          sum = sum * extra.decay[i] + static_cast<double>(a[0][thread][i]);
          a[0][thread][i] = static_cast<float>(sum);
        }
      } else if (thread == L::kTokens) {
        double norm = norm2;  // <H_i, H_0>
        for (int i = 0; i < L::kTokens; ++i) {
          norm = norm * extra.decay[i] +
                 static_cast<double>(shared.beta2[i]) * extra.dots[kKeyStart][i];
          extra.start[0][i] = static_cast<float>(
              static_cast<double>(extra.minus_start[i]) *
              (static_cast<double>(extra.dots[kAdjointStart][i]) + extra.w[i] * norm));
          extra.start[1][i] = extra.mix_weight[i] * extra.dots[kMixStart][i];
        }
      }
    });
    group.barrier();
    this->each_pair([&](Registers& r, int tile, int e, int t, int i) {
      const double of_norm = extra.w[i] * static_cast<double>(a[0][t][i]);
      a[0][t][i] =
          i >= t ? r.r[0][tile][e] -
                       static_cast<float>(static_cast<double>(decay_between(0, t, i)) * of_norm)
                 : 0.0f;
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      const int which = thread / L::kTokens, i = thread % L::kTokens;
      if (which < 2) {
        double sum = static_cast<double>(extra.start[which][i]);
        for (int t = 0; t < L::kTokens; ++t) {
          const double action = static_cast<double>(a[which][t][i]);
          a[which][t][i] = static_cast<float>(sum);
          sum += action;
        }
      } else if (which == 2 && i < 2) {
        double sum = static_cast<double>(shared.total[i]) * (i == 0 ? 0.5 * s_h : e_u);
        for (int t = 0; t < L::kTokens; ++t) {
          extra.carry[i][t] = static_cast<float>(sum);
          const float action = extra.dots[i == 0 ? kKeyCarry : kValueCarry][t];
          sum += static_cast<double>((i == 0 ? 0.5f : 1.0f) * extra.beta[t] * action);
        }
      }
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      const int which = thread / L::kTokens, t = thread % L::kTokens;
      if (which >= 2 || t >= n) return;
      double sum = static_cast<double>(extra.carry[which][t]);
      for (int i = t; i < L::kTokens; ++i) sum += static_cast<double>(a[which][t][i]);
      store_scalar<float>(which == 0 ? backward.dgk : backward.dg, piece.row, t0 + t, head, sum);
    });
    group.barrier();
  }
};

}  // namespace kalmanet::cuda
