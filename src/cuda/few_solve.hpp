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

  // registers.sums over the block's warps: total() after a barrier.
  KALMANET_KERNEL void put_squares(int which) {
    KALMANET_UNROLL
    for (int t = 0; t < L::kTokens; ++t) {
      group.template sum_lanes<32>([t](Registers& r) -> float& { return r.sums[t]; });
    }
    group.each([&](int thread, Registers& r) {
      if (thread % 32 != 0) return;
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) shared.squares[which][t][thread / 32] = r.sums[t];
    });
  }
  KALMANET_KERNEL float total(int which, int t) const {
    float a[4], b[4];
    load4(shared.squares[which][t], a);
    load4(shared.squares[which][t] + 4, b);
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3]));
  }

  // The keys as a left factor. No barrier.
  KALMANET_KERNEL void split_keys() {
    group.each([&](int thread, Registers&) {
      const int tile = thread / 32, key = thread % 32 / 4;  // in fragment rows 0 to 3
      float k[4] = {};
      if (key < L::kTokens) load4(shared.k[key] + L::column(thread, tile), k);
      const float size = to_one(shared.key_norm[key % L::kTokens]);
      shared.keys[tile][thread % 32] = {
          {pack_float16(k[0] * size, k[1] * size), 0, pack_float16(k[2] * size, k[3] * size), 0}};
    });
  }

  // H from float32 to its two parts and back. One barrier; |H_0|^2 is total(1, 0) from it on.
  KALMANET_KERNEL void split_h() {
    group.each([&](int, Registers& r) {
      float sum[4] = {};
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          sum[j] += r.raw[tile][0][j] * r.raw[tile][0][j] + r.raw[tile][1][j] * r.raw[tile][1][j];
        }
      }
      r.sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.squares[1][0][thread / 32] = r.sum;
    });
    group.barrier();
    scale = to_one(sqrtf(total(1, 0)));
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float a = r.raw[tile][i % 2][i / 2 * 2] * scale;
          const float b = r.raw[tile][i % 2][i / 2 * 2 + 1] * scale;
          const uint32_t high = pack_float16(a, b);
          r.high[tile][i] = high;
          r.low[tile][i] =
              pack_float16((a - low_float16(high)) * L::kLow, (b - high_float16(high)) * L::kLow);
        }
      }
    });
  }
  KALMANET_KERNEL void unsplit_h() {
    const float back = power_inverse(scale);
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint32_t high = r.high[tile][i], low = r.low[tile][i];
          float* const to = r.raw[tile][i % 2] + i / 2 * 2;
          to[0] = (low_float16(high) + low_float16(low) * (1.0f / L::kLow)) * back;
          to[1] = (high_float16(high) + high_float16(low) * (1.0f / L::kLow)) * back;
        }
      }
    });
  }

  // d times into as two columns of the right factor. Ends with a barrier.
  KALMANET_KERNEL void put_right() {
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4, word = L::word(L::row(thread));
      const float a = r.d[0] * r.into, b = r.d[1] * r.into;
      const uint32_t high = pack_float16(a, b);
      shared.right[2 * i][word] = high;
      shared.right[2 * i + 1][word] =
          pack_float16((a - low_float16(high)) * L::kLow, (b - high_float16(high)) * L::kLow);
    });
    group.barrier();
  }
  KALMANET_KERNEL const uint32_t* right_words(int thread, int pair) const {
    return shared.right[thread % 32 / 4] + pair * 16 + thread % 4 * 4;
  }
  // The dots of a token with all keys.
  KALMANET_KERNEL void load_dots(int token, float (&dots)[L::kTokens]) const {
    KALMANET_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      float part[L::kKeyWarps][2];
      KALMANET_UNROLL
      for (int w = 0; w < L::kKeyWarps; ++w) load2(shared.dots[w][pair][token], part[w]);
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        dots[2 * pair + i] = (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]);
      }
    }
  }
  // Of the right factor: its products with H_0 into registers.product, scaled by scale and into,
  // and with the keys into shared.dots, times dot_scale of a lane whose key is thread % 32 / 4.
  // Meanwhile: what goes on beside them. Ends with a barrier.
  template <class Meanwhile>
  KALMANET_KERNEL void multiply(Meanwhile&& meanwhile) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.y[0][i] = r.y[1][i] = r.z[0][i] = r.z[1][i] = 0;
    });
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int pair = 0; pair < L::kTiles / 2; ++pair) {
        uint32_t words[4];
        load16(right_words(thread, pair), words);
        r.b[2 * pair][0] = words[0], r.b[2 * pair][1] = words[1];
        r.b[2 * pair + 1][0] = words[2], r.b[2 * pair + 1][1] = words[3];
      }
    });
    group.with_warps(0, L::kKeyWarps, [&] {
      group.each([&](int thread, Registers& r) {
        const int pair = thread / 32;
        uint32_t words[4];
        load16(right_words(thread, pair), words);
        r.kb[0][0] = words[0], r.kb[0][1] = words[1];
        r.kb[1][0] = words[2], r.kb[1][1] = words[3];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.c[i] = 0;
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) load16(&shared.keys[2 * pair + i][thread % 32], r.key[i]);
      });
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const auto c = [](Registers& r) -> float (&)[4] { return r.c; };
        group.multiply_add_float16(
            c, c, [i](Registers& r) -> uint32_t (&)[4] { return r.key[i]; },
            [i](Registers& r) -> uint32_t (&)[2] { return r.kb[i]; });
      }
    });
    KALMANET_UNROLL
    for (int tile = 0; tile < L::kTiles; ++tile) {  // (two sums each: shorter chains)
      const auto y = [tile](Registers& r) -> float (&)[4] { return r.y[tile % 2]; };
      const auto z = [tile](Registers& r) -> float (&)[4] { return r.z[tile % 2]; };
      const auto b = [tile](Registers& r) -> uint32_t (&)[2] { return r.b[tile]; };
      group.multiply_add_float16(
          y, y, [tile](Registers& r) -> uint32_t (&)[4] { return r.high[tile]; }, b);
      group.multiply_add_float16(
          z, z, [tile](Registers& r) -> uint32_t (&)[4] { return r.low[tile]; }, b);
    }
    group.with_warps(0, L::kKeyWarps, [&] {
      group.each([&](int thread, Registers& r) {
        const int key = thread % 32 / 4;  // a fragment's row
        if (key >= L::kTokens) return;
        const float dot = (r.c[0] + r.c[1] * (1.0f / L::kLow)) * r.dot_scale;
        shared.dots[thread / 32][key / 2][thread % 4][key % 2] = dot;
      });
    });
    meanwhile();
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float low = (r.y[0][2 * e + 1] + r.y[1][2 * e + 1]) + (r.z[0][2 * e] + r.z[1][2 * e]);
        r.product[e] = (r.y[0][2 * e] + r.y[1][2 * e]) + low * (1.0f / L::kLow);
      }
    });
    group.barrier();
  }

  // |H_t| of a lane's token i = thread % 4 into registers.sum, by
  //   |H_t|^2 = e^{2 gk} |H_{t-1}|^2 + 2 e^{gk} beta^2 k_t^T H_{t-1} k_t + beta^4 |k_t|^4
  //   k_t^T H_{t-1} k_t = c_{t-1} k_t^T H_0 k_t + sum_{j<t} m_{t-1,j} (k_j . k_t)^2 ;
  // no term is negative. 0 where it has vanished.
  KALMANET_KERNEL void norms() {
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4, row = L::row(thread);
      r.d[0] = shared.k[i][row];
      r.d[1] = shared.k[i][row + 1];
      r.into = to_one(shared.key_norm[i]);
      r.dot_scale = power_inverse(r.into) *
                    power_inverse(to_one(shared.key_norm[thread % 32 / 4 % L::kTokens]));
    });
    put_right();
    multiply([] {});
    group.each([&](int, Registers& r) {
      r.sum = (r.d[0] * r.product[0] + r.d[1] * r.product[1]) * power_inverse(scale) *
              power_inverse(r.into);
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
        load_dots(t, dots);
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

  // What a lane keeps of its token: the iteration's constants.
  KALMANET_KERNEL void prepare() {
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4, row = L::row(thread);
      const float f = r.sum, ridge = shared.scalar[kStepRidge][i];
      const float rho = divide(0.5f, 2.0f * ridge + 1.0f);
      const bool idle = i >= n || f == 0.0f;
      r.rho2 = rho * rho;
      r.w = 2;
      r.lambda = idle ? 0.0f : ridge * f;
      r.step = idle ? 0.0f : divide(2.0f, 2.0f * r.lambda + f);
      r.steps = shared.steps[i];
      r.into = to_one(r.step * shared.query_norm[i]);
      const float out = power_inverse(r.into);
      // m_ij of key j = thread % 32 / 4, where the lane makes such a dot; c_i.
      const int key = thread % 32 / 4;
      float through = 1;  // the decays after key j up to token i
      r.dot_scale = 0;
      KALMANET_UNROLL
      for (int j = L::kTokens - 1; j >= 0; --j) {
        const float weight =
            through * shared.scalar[kStepBeta][j] * out * power_inverse(to_one(shared.key_norm[j]));
        if (j <= i && j == key) r.dot_scale = weight;
        if (j <= i) through *= shared.scalar[kStepDecay][j];
      }
      r.start = through * out * power_inverse(scale);
      KALMANET_UNROLL
      for (int e = 0; e < 2; ++e) {
        r.r[e] = shared.q[i][row + e];
        r.x[e] = r.d[e] = 0;
      }
    });
  }

  // x into registers; m and |x|^2 into shared memory. Ends with a barrier.
  KALMANET_KERNEL void solve() {
    prepare();
    int most = 0;
    KALMANET_UNROLL
    for (int t = 0; t < L::kTokens; ++t) most = shared.steps[t] > most ? shared.steps[t] : most;
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < 2; ++e) r.x[e] = r.d[e] = r.step * r.r[e];
      r.w = reciprocal(1.0f - 2.0f * r.rho2);
    });
    KALMANET_LOOP
    for (int k = 0; k < most; ++k) {
      put_right();
      multiply([&] {
        group.each([&](int thread, Registers& r) {
          KALMANET_UNROLL
          for (int j = 0; j < L::kTokens; ++j) load2(shared.k[j] + L::row(thread), r.here[j]);
        });
      });
      group.each([&](int thread, Registers& r) {
        float dots[L::kTokens];
        load_dots(thread % 4, dots);
        // (A token with fewer steps than another has its answer.)
        const float gain = k < r.steps ? r.step * r.w : 0.0f;
        const float momentum = k < r.steps ? r.w - 1.0f : 0.0f;
        KALMANET_UNROLL
        for (int e = 0; e < 2; ++e) {
          r.r[e] -= (r.start * r.product[e] + r.lambda * r.d[e]) +
                    ((dots[0] * r.here[0][e] + dots[1] * r.here[1][e]) +
                     (dots[2] * r.here[2][e] + dots[3] * r.here[3][e]));
          r.d[e] = momentum * r.d[e] + gain * r.r[e];
          r.x[e] += r.d[e];
        }
        r.w = reciprocal(1.0f - r.rho2 * r.w);
      });
    }
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4, row = L::row(thread);
      r.sum = 0;
      KALMANET_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float q = shared.q[i][row + e];
        shared.m[i][row + e] = q + shared.scalar[kStepAlpha][i] * (r.x[e] - q);
        r.sum += r.x[e] * r.x[e];
      }
    });
    group.sum_rows([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 < 4) shared.squares[1][thread % 4][thread / 32] = r.sum;
    });
    group.barrier();
  }
};

}  // namespace kalmanet::cuda
