// The body of the kernel of a few tokens at once (few_kernel.hpp has the formulas).
#pragma once

#include "cuda/few_kernel.hpp"

namespace kalmanet::cuda {

template <class Group>
struct FewBody {
  using L = FewLayout;
  using Registers = FewRegisters;
  Group& group;
  FewShared& shared;
  const GkaJob& job;
  int64_t sequence, head;
  StateView<float> h_to, u_to;
  int n = 0;          // tokens at work
  float scale = 1.0f;  // of H_0 as it is split

  // ---- tokens

  // Tokens t0 .. t0 + n of the call, or of the last draft, into shared memory. Ends with a barrier.
  template <bool kDraft>
  KALMANET_KERNEL void take(int64_t t0) {
    const Array& k = kDraft ? job.draft_k : job.k;
    const Array& v = kDraft ? job.draft_v : job.v;
    group.each([&](int thread, Registers&) {
      const int t = thread;
      if (t >= L::kTokens) return;
      const auto scalar = [&](const Array& a, double absent) {
        return t < n ? scalar_at<float>(a, sequence, t0 + t, head, absent) : 0.0f;
      };
      shared.decay[t] = exp_of(scalar(kDraft ? job.draft_gk : job.gk, 0.0));
      shared.u_decay[t] = exp_of(scalar(kDraft ? job.draft_g : job.g, 0.0));
      const float beta = scalar(kDraft ? job.draft_beta : job.beta, 1.0);
      shared.beta2[t] = beta * beta;
      if (kDraft) return;
      shared.alpha[t] = scalar(job.alpha, 1.0);
      const float ridge = scalar(job.ridge, job.ridge_ratio);
      // A ratio that is not positive has no answer, and must not look as if it had one.
      shared.ridge[t] = ridge > 0.0f ? ridge : NAN;
      shared.steps[t] = t >= n              ? 0
                        : job.num_iter != 0 ? job.num_iter
                                            : counted_steps(static_cast<double>(ridge),
                                                            job.tolerance);
    });
    group.each([&](int thread, Registers& r) {
      r.sum = 0;
      // Warps 0 to 3 bring q and v of a token each, 4 to 7 its k.
      const int t = thread / 32 % 4;
      const bool is_key = thread >= 128;
      const int64_t k_at = offset_of(k, sequence, t0 + t, head / job.k_group);
      const int64_t v_at = offset_of(v, sequence, t0 + t, head / job.v_group);
      const int64_t q_at = offset_of(job.q, sequence, t0 + t, head / job.q_group);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int c = thread % 32 + 32 * i;
        float e = 0;
        if (is_key) {
          if (t < n) e = load_element<float>(k, k_at + c * k.stride[3]);
          shared.k[t][c] = e;
        } else {
          shared.v[t][c] = t < n ? load_element<float>(v, v_at + c * v.stride[3]) : 0.0f;
          if (!kDraft && t < n) e = load_element<float>(job.q, q_at + c * job.q.stride[3]);
          shared.q[t][c] = e;
        }
        r.sum += e * e;
      }
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 != 0) return;
      (thread < 128 ? shared.query_norm : shared.key_norm)[thread / 32 % 4] = sqrtf(r.sum);
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      for (int e = thread; e < L::kTokens * L::kDim; e += L::kThreads) {
        const int t = e / L::kDim, c = e % L::kDim;
        shared.weighted_k[t][c] = shared.beta2[t] * shared.k[t][c];
      }
    });
    group.barrier();
  }

  // ---- H

  KALMANET_KERNEL void load_h(const StateView<float>& from) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (from.data != nullptr) {
            load4(from.data + from.at(L::row(thread) + i, L::column(thread, tile)), r.raw[tile][i]);
          } else {
            r.raw[tile][i][0] = r.raw[tile][i][1] = r.raw[tile][i][2] = r.raw[tile][i][3] = 0;
          }
        }
      }
    });
  }

  // The four numbers of a row and tile, as they are split.
  KALMANET_KERNEL void unpack(const Registers& r, int tile, int i, float (&h)[4]) const {
    const float back = 1.0f / scale;  // exact: a power of two
    KALMANET_UNROLL
    for (int j = 0; j < 2; ++j) {
      const uint32_t high = r.high[tile][i + 2 * j], low = r.low[tile][i + 2 * j];
      h[2 * j] = (low_float16(high) + low_float16(low) * (1.0f / L::kLow)) * back;
      h[2 * j + 1] = (high_float16(high) + high_float16(low) * (1.0f / L::kLow)) * back;
    }
  }
  KALMANET_KERNEL void pack(Registers& r, int tile, int i, const float (&h)[4]) const {
    KALMANET_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float a = h[2 * j] * scale, b = h[2 * j + 1] * scale;
      const uint32_t high = pack_float16(a, b);
      r.high[tile][i + 2 * j] = high;
      r.low[tile][i + 2 * j] =
          pack_float16((a - low_float16(high)) * L::kLow, (b - high_float16(high)) * L::kLow);
    }
  }

  // h <- decay_t h + beta_t^2 k_t k_t^T for a thread's two rows of a tile.
  KALMANET_KERNEL void past(int t, int thread, int tile, float (&h)[2][4]) const {
    float k[4], weighted[2];
    load4(shared.k[t] + L::column(thread, tile), k);
    load2(shared.weighted_k[t] + L::row(thread), weighted);
    const float decay = shared.decay[t];
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) h[i][j] = decay * h[i][j] + weighted[i] * k[j];
    }
  }
  KALMANET_KERNEL static void load2(const float* p, float (&out)[2]) {
#ifdef __CUDACC__
    const float2 v = *reinterpret_cast<const float2*>(p);
    out[0] = v.x, out[1] = v.y;
#else
    out[0] = p[0], out[1] = p[1];
#endif
  }

  // H in float32 past a token of the last draft.
  KALMANET_KERNEL void advance_raw(int t) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) past(t, thread, tile, r.raw[tile]);
    });
  }
  KALMANET_KERNEL void store_raw() {
    if (h_to.data == nullptr) return;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          store4(h_to.data + h_to.at(L::row(thread) + i, L::column(thread, tile)), r.raw[tile][i]);
        }
      }
    });
  }

  // |H_t|^2 of every token into shared.squares[0]. Ends with a barrier.
  KALMANET_KERNEL void norms() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) r.sums[t] = 0;
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        float h[2][4];
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) unpack(r, tile, i, h[i]);
        KALMANET_UNROLL
        for (int t = 0; t < L::kTokens; ++t) {
          if (t >= n) break;
          past(t, thread, tile, h);
          add_squares(h, r.sums[t]);
        }
      }
    });
    put_squares(0);
    group.barrier();
  }
  KALMANET_KERNEL static void add_squares(const float (&h)[2][4], float& sum) {
    float part[2] = {};
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) part[i] += h[i][j] * h[i][j];
    }
    sum += part[0] + part[1];
  }
  // registers.sums, over the block's eight warps.
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
  KALMANET_KERNEL float norm(int t) const {
    const float f2 = total(0, t);
    constexpr float kVanished = static_cast<float>(kVanishedNorm * kVanishedNorm);
    return f2 <= kVanished ? 0.0f : sqrtf(f2);
  }

  // H_0 from float32 to its two parts. One barrier.
  KALMANET_KERNEL void split_raw() {
    group.each([&](int, Registers& r) {
      r.sums[0] = r.sums[1] = r.sums[2] = r.sums[3] = 0;
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) add_squares(r.raw[tile], r.sums[tile % 2]);
      r.sums[0] += r.sums[1];
    });
    put_squares(1);
    group.barrier();
    scale = to_one(sqrtf(total(1, 0)));
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) pack(r, tile, i, r.raw[tile][i]);
      }
    });
  }
  // (Before the barrier of the first put_right.)
  KALMANET_KERNEL void split_keys() {
    group.each([&](int thread, Registers&) {
      const int tile = thread / 32, key = thread % 32 / 4;  // in fragment rows 0 to 3
      float k[4] = {};
      if (key < L::kTokens) load4(shared.k[key] + L::column(thread, tile), k);
      const float size = to_one(shared.key_norm[key % L::kTokens]);
      shared.keys[tile][thread % 32] = {{pack_float16(k[0] * size, k[1] * size), 0,
                                         pack_float16(k[2] * size, k[3] * size), 0}};
    });
  }

  // H past all tokens at work: split again, or where it belongs.
  KALMANET_KERNEL void advance_h(bool store) {
    const float old_scale = scale;
    const float new_scale = to_one(sqrtf(total(0, n - 1)));
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        float h[2][4];
        scale = old_scale;
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) unpack(r, tile, i, h[i]);
        KALMANET_UNROLL
        for (int t = 0; t < L::kTokens; ++t) {
          if (t < n) past(t, thread, tile, h);
        }
        scale = new_scale;
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (store) {
            store4(h_to.data + h_to.at(L::row(thread) + i, L::column(thread, tile)), h[i]);
          } else {
            pack(r, tile, i, h[i]);
          }
        }
      }
    });
    scale = new_scale;
  }

  // ---- the systems

  // What a lane keeps of its token, i = thread % 4: the iteration's constants, and m_ij.
  KALMANET_KERNEL void prepare() {
    group.each([&](int thread, Registers& r) {
      const int i = thread % 4, row = L::row(thread);
      const float f = norm(i), ridge = shared.ridge[i];
      const float rho = divide(0.5f, 2.0f * ridge + 1.0f);
      const bool idle = i >= n || f == 0.0f;
      r.rho2 = rho * rho;
      r.w = 2;
      r.lambda = idle ? 0.0f : ridge * f;
      r.step = idle ? 0.0f : divide(2.0f, 2.0f * r.lambda + f);
      r.steps = shared.steps[i];
      r.into = to_one(r.step * shared.query_norm[i]);
      const float out = 1.0f / r.into;
      float through = 1;  // the decays after key j up to token i
      KALMANET_UNROLL
      for (int j = L::kTokens - 1; j >= 0; --j) {
        const bool seen = j <= i && i < n;
        r.weight[j] =
            seen ? through * shared.beta2[j] * out / to_one(shared.key_norm[j]) : 0.0f;
        if (seen) through *= shared.decay[j];
        r.here[j][0] = shared.k[j][row];
        r.here[j][1] = shared.k[j][row + 1];
      }
      r.start = through * out / scale;
      KALMANET_UNROLL
      for (int e = 0; e < 2; ++e) {
        r.r[e] = i < n ? shared.q[i][row + e] : 0.0f;
        r.x[e] = r.d[e] = 0;
      }
    });
  }

  // d as two columns of the right factor. Ends with a barrier.
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

  // registers.r -= A d. The dots go by way of shared memory: one barrier.
  KALMANET_KERNEL void apply() {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.y[i] = r.z[i] = r.c[i] = 0;
    });
    KALMANET_UNROLL
    for (int pair = 0; pair < L::kTiles / 2; ++pair) {
      group.each([&](int thread, Registers& r) {
        uint32_t words[4];
        load16(shared.right[thread % 32 / 4] + pair * 16 + thread % 4 * 4, words);
        r.b[0][0] = words[0], r.b[0][1] = words[1];
        r.b[1][0] = words[2], r.b[1][1] = words[3];
      });
      group.with_warp(0, [&] {
        group.each([&](int thread, Registers& r) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) load16(&shared.keys[2 * pair + i][thread % 32], r.key[i]);
        });
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const auto c = [](Registers& r) -> float (&)[4] { return r.c; };
          group.multiply_add_float16(
              c, c, [i](Registers& r) -> uint32_t (&)[4] { return r.key[i]; },
              [i](Registers& r) -> uint32_t (&)[2] { return r.b[i]; });
        }
      });
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int tile = 2 * pair + i;
        const auto y = [](Registers& r) -> float (&)[4] { return r.y; };
        const auto z = [](Registers& r) -> float (&)[4] { return r.z; };
        const auto b = [i](Registers& r) -> uint32_t (&)[2] { return r.b[i]; };
        group.multiply_add_float16(
            y, y, [tile](Registers& r) -> uint32_t (&)[4] { return r.high[tile]; }, b);
        group.multiply_add_float16(
            z, z, [tile](Registers& r) -> uint32_t (&)[4] { return r.low[tile]; }, b);
      }
    }
    group.each([&](int thread, Registers& r) {
      if (thread >= 4 * L::kTokens) return;  // fragment rows 0 to 3 of warp 0
      shared.dots[thread % 4][thread / 4] = r.c[0] + r.c[1] * (1.0f / L::kLow);
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      float dots[4];
      load4(shared.dots[thread % 4], dots);
      KALMANET_UNROLL
      for (int j = 0; j < L::kTokens; ++j) dots[j] *= r.weight[j];
      KALMANET_UNROLL
      for (int e = 0; e < 2; ++e) {
        float a = r.start * (r.y[2 * e] + (r.y[2 * e + 1] + r.z[2 * e]) * (1.0f / L::kLow));
        KALMANET_UNROLL
        for (int j = 0; j < L::kTokens; ++j) a += dots[j] * r.here[j][e];
        r.r[e] -= a + r.lambda * r.d[e];
      }
    });
  }

  // x into registers; m and |x|^2 into shared memory. Ends with a barrier.
  KALMANET_KERNEL void solve() {
    prepare();
    int most = 0;
    for (int t = 0; t < n; ++t) most = shared.steps[t] > most ? shared.steps[t] : most;
    KALMANET_LOOP
    for (int k = 0;; ++k) {
      group.each([&](int, Registers& r) {
        const float gain = k == 0 ? r.step : r.step * r.w;
        const float momentum = k == 0 ? 0.0f : r.w - 1.0f;
        r.w = divide(1.0f, 1.0f - r.rho2 * r.w);
        KALMANET_UNROLL
        for (int e = 0; e < 2; ++e) {
          // (A token with fewer steps than another has its answer.)
          r.d[e] = k <= r.steps ? momentum * r.d[e] + gain * r.r[e] : 0.0f;
          r.x[e] += r.d[e];
        }
      });
      if (k == most) break;
      put_right();
      apply();
    }
    group.each([&](int thread, Registers& r) {
      r.sum = 0;
      const int i = thread % 4, row = L::row(thread);
      KALMANET_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float q = shared.q[i][row + e];
        shared.m[i][row + e] = q + shared.alpha[i] * (r.x[e] - q);
        r.sum += r.x[e] * r.x[e];
      }
    });
    group.sum_rows([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 < 4) shared.squares[1][thread % 4][thread / 32] = r.sum;
    });
    group.barrier();
  }

  // ---- U

  // U in shared memory past a token of the last draft; a thread has what it copied.
  KALMANET_KERNEL void advance_u(int t) {
    wait_copies();
    group.each([&](int thread, Registers&) {
      float v[4];
      load4(shared.v[t] + StepLayout::u_column(thread), v);
      KALMANET_UNROLL
      for (int i = 0; i < StepLayout::kUSteps; ++i) {
        const int row = StepLayout::u_row(thread, i);
        float* const at = shared.u + row * L::kDim + StepLayout::u_column(thread);
        float u[4];
        load4(at, u);
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          u[j] = shared.u_decay[t] * u[j] + shared.weighted_k[t][row] * v[j];
        }
        store4(at, u);
      }
    });
  }
  KALMANET_KERNEL void start_u(const StateView<float>& from) {
    group.each([&](int thread, Registers&) {
      KALMANET_UNROLL
      for (int i = 0; i < StepLayout::kUSteps; ++i) {
        const int row = StepLayout::u_row(thread, i), column = StepLayout::u_column(thread);
        float* const to = shared.u + row * L::kDim + column;
        if (from.data != nullptr) {
          copy16(to, from.data + from.at(row, column));
        } else {
          store4(to, {0, 0, 0, 0});
        }
      }
    });
  }
  KALMANET_KERNEL void store_u() {
    if (u_to.data == nullptr) return;
    wait_copies();
    group.each([&](int thread, Registers&) {
      KALMANET_UNROLL
      for (int i = 0; i < StepLayout::kUSteps; ++i) {
        const int row = StepLayout::u_row(thread, i), column = StepLayout::u_column(thread);
        float u[4];
        load4(shared.u + row * L::kDim + column, u);
        store4(u_to.data + u_to.at(row, column), u);
      }
    });
  }

  // U past all tokens at work and their outputs, stored; |U_t|^2 and |o_t|^2. Ends with a barrier.
  KALMANET_KERNEL void read_out(int64_t t0) {
    wait_copies();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) {
        r.sums[t] = 0;
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) r.o[t][j] = 0;
      }
      KALMANET_LOOP
      for (int i0 = 0; i0 < StepLayout::kUSteps; i0 += 4) {
        const int row = StepLayout::u_row(thread, i0), column = StepLayout::u_column(thread);
        float u[4][4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) load4(shared.u + (row + i) * L::kDim + column, u[i]);
        KALMANET_UNROLL
        for (int t = 0; t < L::kTokens; ++t) {
          if (t >= n) break;
          float m[4], k[4], v[4];
          load4(shared.m[t] + row, m);
          load4(shared.weighted_k[t] + row, k);
          load4(shared.v[t] + column, v);
          const float decay = shared.u_decay[t];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              u[i][j] = decay * u[i][j] + k[i] * v[j];
              r.o[t][j] += m[i] * u[i][j];
              r.sums[t] += u[i][j] * u[i][j];
            }
          }
        }
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) store4(shared.u + (row + i) * L::kDim + column, u[i]);
      }
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) {
        store4(shared.partial[thread / 32][t] + StepLayout::u_column(thread), r.o[t]);
      }
    });
    put_squares(2);
    group.barrier();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) r.sums[t] = 0;
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {  // tokens 0 and 1, or 2 and 3
        const int t = 2 * half + thread / L::kDim, c = thread % L::kDim;
        if (t >= n) continue;
        float o = 0;
        KALMANET_UNROLL
        for (int w = 0; w < 8; ++w) o += shared.partial[w][t][c];
        o *= static_cast<float>(job.scale);
        store_element(job.o, offset_of(job.o, sequence, t0 + t, head) + c * job.o.stride[3], o);
        const float square = o * o;
        if (thread < L::kDim) {
          r.sums[2 * half] = square;
        } else {
          r.sums[2 * half + 1] = square;
        }
      }
    });
    put_squares(3);
    group.barrier();
  }

  // Whether a token's amplification is more than this arithmetic bears.
  KALMANET_KERNEL bool amplified() const {
    const double limit = largest_amplification(job.o.dtype) / 4;
    bool ill = false;
    for (int t = 0; t < n; ++t) {
      const double weight = static_cast<double>(shared.alpha[t]) * job.scale;
      const double scaled = weight * weight * static_cast<double>(total(1, t)) *
                            static_cast<double>(total(2, t));
      const double o2 = static_cast<double>(total(3, t));
      if (o2 > 0.0 && scaled > limit * limit * L::kDim * o2) ill = true;
    }
    return ill;
  }

  // Returns whether the step kernel must do it instead. Written are then outputs, and of a draft
  // the states before its tokens.
  KALMANET_KERNEL bool run(int64_t row) {
    const StateView<float> h_from = state_view<float>(job.h0, row, head);
    const StateView<float> u_from = state_view<float>(job.u0, row, head);
    h_to = state_view<float>(job.h_final, row, head);
    u_to = state_view<float>(job.u_final, row, head);
    const int64_t accepted = accepted_of(job, sequence);
    load_h(h_from);
    start_u(u_from);
    KALMANET_LOOP
    for (int64_t t0 = 0; t0 < accepted; t0 += L::kTokens) {
      n = static_cast<int>(accepted - t0 < L::kTokens ? accepted - t0 : L::kTokens);
      group.barrier();
      take<true>(t0);
      KALMANET_LOOP
      for (int t = 0; t < n; ++t) {
        advance_raw(t);
        advance_u(t);
      }
    }
    if (job.is_draft) {  // what the states become is known before the new tokens
      if (accepted > 0 || h_from.data != h_to.data) store_raw();
      if (accepted > 0 || u_from.data != u_to.data) store_u();
    }
    split_raw();
    KALMANET_LOOP
    for (int64_t t0 = 0; t0 < job.T; t0 += L::kTokens) {
      n = static_cast<int>(job.T - t0 < L::kTokens ? job.T - t0 : L::kTokens);
      group.barrier();
      take<false>(t0);
      norms();
      split_keys();
      solve();
      read_out(t0);
      if (amplified()) return true;
      const bool last = t0 + L::kTokens >= job.T;
      if (!last) {
        advance_h(false);
      } else if (!job.is_draft) {
        if (h_to.data != nullptr) advance_h(true);
        store_u();
      }
    }
    return false;
  }
};

// The work of block (sequence, head); returns whether it is left to run_step, with `resumed`.
template <class Group>
KALMANET_KERNEL bool run_few(Group& group, FewShared& shared, const GkaJob& job, int64_t sequence,
                             int64_t head) {
  const int64_t row = state_row(job, sequence);
  if (!has_states(job, row)) {
    answer_nothing(group, job, {sequence, 0, job.T, 0, 1, 1, 0}, head, row);
    return false;
  }
  FewBody<Group> body{group, shared, job, sequence, head, {}, {}};
  return body.run(row);
}

}  // namespace kalmanet::cuda
