// A few tokens' systems at once, on matrix units (few_kernel.hpp has the formulas).
#pragma once

#include "cuda/few_kernel.hpp"

namespace kalmanet::cuda {

template <class Group>
struct FewSolve {
  using L = FewLayout;
  using Registers = FewRegisters;
  Group& group;
  FewShared& shared;
  const GkaJob& job;
  int64_t sequence, head;
  int n = 0;           // tokens at work
  float scale = 1.0f;  // of H_0 as it is split

  KALMANET_KERNEL float total(int which, int t) const {
    float a[4];
    load4(shared.squares[which][t], a);
    return (a[0] + a[1]) + (a[2] + a[3]);
  }
  // Token t in a state: the weights of the outer products up to its own; returns that of what was
  // there before.
  KALMANET_KERNEL float weights(StepScalar decays, int t, float (&weight)[L::kTokens]) const {
    float through = 1;
    KALMANET_UNROLL
    for (int j = L::kTokens - 1; j >= 0; --j) {
      weight[j] = j <= t ? through * shared.scalar[kStepBeta][j] : 0.0f;
      if (j <= t) through *= shared.scalar[decays][j];
    }
    return through;
  }

  // The keys as left factors, each brought to one size.
  KALMANET_KERNEL void split_keys() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int key = L::key(thread, i);
        const float size = to_size(shared.key_norm[key]);
        KALMANET_UNROLL
        for (int tile = 0; tile < L::kTiles; ++tile) {
          float k[4];
          load4(shared.k[key] + L::column(thread, tile), k);
          r.key[tile][i] = pack_float16(k[0] * size, k[1] * size);
          r.key[tile][i + 2] = pack_float16(k[2] * size, k[3] * size);
        }
      }
    });
  }

  // H from float32 to its two parts and back. One barrier; |H_0|^2 is total(1, 0) from it on.
  KALMANET_KERNEL void split_h() {
    group.each([&](int, Registers& r) {
      float sum[4] = {};
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int m = 0; m < L::kRowTiles; ++m) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            sum[j] += r.raw[m][tile][0][j] * r.raw[m][tile][0][j];
            sum[j] += r.raw[m][tile][1][j] * r.raw[m][tile][1][j];
          }
        }
      }
      r.sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.squares[1][0][thread / 32] = r.sum;
    });
    group.barrier();
    scale = to_size(sqrtf(total(1, 0)));
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < L::kRowTiles; ++m) {
        KALMANET_UNROLL
        for (int tile = 0; tile < L::kTiles; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float a = r.raw[m][tile][i % 2][i / 2 * 2] * scale;
            const float b = r.raw[m][tile][i % 2][i / 2 * 2 + 1] * scale;
            split(a, b, r.high[m][tile][i], r.low[m][tile][i]);
          }
        }
      }
    });
  }
  KALMANET_KERNEL static void split(float a, float b, uint32_t& high, uint32_t& low) {
    high = pack_float16(a, b);
    low = pack_float16(a - low_float16(high), b - high_float16(high));
  }
  KALMANET_KERNEL void unsplit_h() {
    const float back = power_inverse(scale);
    // (0, which the compiler does not know: it would keep the halves of each word apart, in twice
    // as many registers, from split_h on.)
    const uint32_t nothing = static_cast<uint32_t>(n) >> 8;
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < L::kRowTiles; ++m) {
        KALMANET_UNROLL
        for (int tile = 0; tile < L::kTiles; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            const uint32_t high = r.high[m][tile][i] ^ nothing, low = r.low[m][tile][i] ^ nothing;
            float* const to = r.raw[m][tile][i % 2] + i / 2 * 2;
            to[0] = (low_float16(high) + low_float16(low)) * back;
            to[1] = (high_float16(high) + high_float16(low)) * back;
          }
        }
      }
    });
  }

  // d as two columns of the right factor, in the one of two places whose turn it is. Ends with a
  // barrier.
  KALMANET_KERNEL void begin_right() {
    group.each([&](int thread, Registers& r) {
      r.own_byte = kept(L::own_byte(thread));
      r.read_byte = kept(L::read_byte(thread));
    });
  }
  KALMANET_KERNEL void put_right() {
    group.each([&](int, Registers& r) {
      uint32_t high[2], low[2];
      KALMANET_UNROLL
      for (int m = 0; m < L::kRowTiles; ++m) {
        split(r.d[2 * m], r.d[2 * m + 1], high[m], low[m]);
      }
      uint32_t* const to = StepLayout::at_byte(shared.right[0], r.own_byte);
      store8(to, high);
      store8(to + L::right_column(1), low);
      r.own_byte = kept(r.own_byte ^ L::kTurn);
    });
    group.barrier();
  }
  // Of the right factor: its products with H_0 into registers.product, times scale, and with the
  // keys into registers.dots, times dot_scale of the lane that makes them.
  KALMANET_KERNEL void multiply() {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int pair = 0; pair < L::kTiles / 2; ++pair) {
        uint32_t words[4];
        load16(StepLayout::at_byte(shared.right[0], r.read_byte) + pair * 16, words);
        r.b[2 * pair][0] = words[0], r.b[2 * pair][1] = words[1];
        r.b[2 * pair + 1][0] = words[2], r.b[2 * pair + 1][1] = words[3];
      }
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        r.c[i] = 0;
        KALMANET_UNROLL
        for (int m = 0; m < L::kRowTiles; ++m) r.y[m][i] = r.z[m][i] = 0;
      }
      r.read_byte = kept(r.read_byte ^ L::kTurn);
    });
    KALMANET_UNROLL
    for (int tile = 0; tile < L::kTiles; ++tile) {
      const auto b = [tile](Registers& r) -> uint32_t (&)[2] { return r.b[tile]; };
      const auto c = [](Registers& r) -> float (&)[4] { return r.c; };
      group.multiply_add_float16(
          c, c, [tile](Registers& r) -> uint32_t (&)[4] { return r.key[tile]; }, b);
      KALMANET_UNROLL
      for (int m = 0; m < L::kRowTiles; ++m) {
        const auto y = [m](Registers& r) -> float (&)[4] { return r.y[m]; };
        const auto z = [m](Registers& r) -> float (&)[4] { return r.z[m]; };
        group.multiply_add_float16(
            y, y, [m, tile](Registers& r) -> uint32_t (&)[4] { return r.high[m][tile]; }, b);
        group.multiply_add_float16(
            z, z, [m, tile](Registers& r) -> uint32_t (&)[4] { return r.low[m][tile]; }, b);
      }
    }
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        r.dots[i] = (r.c[2 * i] + r.c[2 * i + 1]) * r.dot_scale[i];
      }
    });
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {  // those of the lane two fragment rows further
      group.template exchange<8>([i](Registers& r) -> float& { return r.dots[2 + i]; },
                                 [i](Registers& r) { return r.dots[i]; });
    }
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int m = e / 2, f = e % 2 * 2;
        r.product[e] = (r.y[m][f] + r.y[m][f + 1]) + (r.z[m][f] + r.z[m][f + 1]);
      }
    });
  }

  // |H_t| of a lane's token i = thread % 4 into registers.sum, by
  //   |H_t|^2 = e^{2 gk} |H_{t-1}|^2 + 2 e^{gk} beta^2 k_t^T H_{t-1} k_t + beta^4 |k_t|^4
  //   k_t^T H_{t-1} k_t = c_{t-1} k_t^T H_0 k_t + sum_{j<t} m_{t-1,j} (k_j . k_t)^2 ;
  // no term is negative. 0 where it has vanished.
  KALMANET_KERNEL void norms() {
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4;
      r.into = to_size(shared.key_norm[i]);
      load4(shared.k[i] + L::first_row(thread), r.d);
      KALMANET_UNROLL
      for (int e = 0; e < 4; ++e) r.d[e] *= r.into;
      KALMANET_UNROLL
      for (int j = 0; j < 2; ++j) {
        r.dot_scale[j] =
            power_inverse(r.into) * power_inverse(to_size(shared.key_norm[L::key(thread, j)]));
      }
    });
    begin_right();
    put_right();
    multiply();
    group.each([&](int thread, Registers& r) {
      r.sum = ((r.d[0] * r.product[0] + r.d[1] * r.product[1]) +
               (r.d[2] * r.product[2] + r.d[3] * r.product[3])) *
              power_inverse(scale) * power_inverse(r.into) * power_inverse(r.into);
      if (thread < 4 * L::kTokens) shared.key_dots[thread % 4][thread / 4] = r.dots[0];
    });
    group.sum_rows([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 < 4) shared.squares[0][thread % 4][thread / 32] = r.sum;
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      float f2 = total(1, 0), start = 1.0f, weight[L::kTokens] = {};
      r.sum = 0;
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) {
        const float decay = shared.scalar[kStepDecay][t], beta2 = shared.scalar[kStepBeta][t];
        const float k2 = shared.key_norm[t] * shared.key_norm[t] * beta2;
        float quadratic = start * total(0, t), dots[L::kTokens];
        load4(shared.key_dots[t], dots);
        KALMANET_UNROLL
        for (int j = 0; j < t; ++j) {
          quadratic += weight[j] * dots[j] * dots[j];
          weight[j] *= decay;
        }
        weight[t] = beta2;
        f2 = decay * (decay * f2 + 2.0f * beta2 * quadratic) + k2 * k2;
        start *= decay;
        if (t == thread % 4) r.sum = f2;
      }
      constexpr float kVanished = static_cast<float>(kVanishedNorm * kVanishedNorm);
      r.sum = r.sum <= kVanished ? 0.0f : sqrtf(r.sum);
    });
  }

  // What a lane keeps of its token: the iteration's constants, and the keys at its rows.
  KALMANET_KERNEL void prepare() {
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4;
      const float f = r.sum, ridge = shared.scalar[kStepRidge][i];
      const float rho = divide(0.5f, 2.0f * ridge + 1.0f);
      const bool idle = i >= n || f == 0.0f;
      r.rho2 = rho * rho;
      r.lambda = idle ? 0.0f : ridge * f;
      r.step = idle ? 0.0f : divide(2.0f, 2.0f * r.lambda + f);
      r.steps = shared.steps[i];
      // d must stay below float16's largest. With the spectrum in [a, 2 - a], a = lambda step, it
      // is (p_i - p_{i+1}) / mu of the first residual, p_i = T_i((1 - mu) / (1 - a)) / T_i(1 / (1 -
      // a)), most at mu = a: cosh(theta) = 1 / (1 - a), so theta = sqrt(2 a), gives (sech(i theta)
      // - sech((i
      // + 1) theta)) / a, at most 0.71 / sqrt(a), and at most 2 i + 1 by sech's curvature.
      const float slowest = r.lambda * r.step, most = 2.0f * static_cast<float>(r.steps) + 1.0f;
      float growth = slowest > 0.0f && slowest < 1.0f ? divide(1.0f, sqrtf(slowest)) : 1.0f;
      if (growth > most) growth = most;
      r.into = to_size(r.step * shared.query_norm[i] * growth);
      float weight[L::kTokens];
      r.start = -weights(kStepDecay, i, weight) * power_inverse(scale) * r.step;
      r.dot_scale[0] = r.dot_scale[1] = 0;
      KALMANET_UNROLL
      for (int j = 0; j < L::kTokens; ++j) {
        const float scaled = -weight[j] * power_inverse(to_size(shared.key_norm[j])) * r.step;
        if (j == L::key(thread, 0)) r.dot_scale[0] = scaled;
        if (j == L::key(thread, 1)) r.dot_scale[1] = scaled;
        load4(shared.k[L::key(thread, j)] + L::first_row(thread), r.here[j]);
      }
      r.w = reciprocal(1.0f - 2.0f * r.rho2);
      r.lambda *= r.step;
      load4(shared.q[i] + L::first_row(thread), r.r);
      KALMANET_UNROLL
      for (int e = 0; e < 4; ++e) {
        r.x[e] = r.d[e] = r.r[e] *= r.into * r.step;
      }
    });
  }

  // x into registers; m and |x|^2 into shared memory. Ends with a barrier.
  KALMANET_KERNEL void solve() {
    prepare();
    int most = 0;
    KALMANET_UNROLL
    for (int t = 0; t < L::kTokens; ++t) most = shared.steps[t] > most ? shared.steps[t] : most;
    KALMANET_LOOP
    for (most = uniform(most); most > 0; --most) {
      put_right();
      multiply();
      group.each([&](int, Registers& r) {
        // (A token with fewer steps than another has its answer.)
        const float gain = r.steps > 0 ? r.w : 0.0f;
        const float momentum = r.steps > 0 ? r.w - 1.0f : 0.0f;
        --r.steps;
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) {  // (start and dots are negative)
          r.r[e] = fused(r.start, r.product[e], r.r[e] - r.lambda * r.d[e]);
          KALMANET_UNROLL
          for (int j = 0; j < L::kTokens; ++j) r.r[e] += r.dots[j] * r.here[j][e];
          r.d[e] = fused(gain, r.r[e], momentum * r.d[e]);
          r.x[e] += r.d[e];
        }
        r.w = reciprocal(1.0f - r.rho2 * r.w);
      });
    }
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4, row = L::first_row(thread);
      const float back = power_inverse(r.into);
      float m[4];
      r.sum = 0;
      KALMANET_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float q = shared.q[i][row + e], x = r.x[e] * back;
        m[e] = q + shared.scalar[kStepAlpha][i] * (x - q);
        shared.m_rows[row + e][i] = m[e];
        r.sum += x * x;
      }
      store4(shared.m[i] + row, m);
    });
    group.sum_rows([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 < 4) shared.squares[1][thread % 4][thread / 32] = r.sum;
    });
    group.barrier();
  }
};

}  // namespace kalmanet::cuda
