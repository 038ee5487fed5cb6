// The backward's last kernel, for any shape: the gradients of keys, values and gates of one head of
// one piece, from x and z, chunk by chunk, last chunk first. Plain multiply-adds.
//
// The formulas are src/cpu/gka_backward.hpp's, with S = D + D^T in D's place: dk and dgk need no
// more of D, and S stays symmetric, so that both its products read it along its rows. A chunk's
// vectors lie in shared memory one element of all tokens after the other ("lanes"); the states
// before every chunk, S and E lie in memory of the block's own, padded with zeros.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/backward_segment_body.hpp"

namespace kalmanet::cuda {

template <class S>
struct GradientLayout {
  static constexpr int kThreads = 256;
  static constexpr int kTokens = 64 / static_cast<int>(sizeof(S));
  // 16 bytes of padding: neighbouring lanes' vectors of 16 bytes meet no bank twice.
  static constexpr int kStride = kTokens + 16 / static_cast<int>(sizeof(S));
  static constexpr int kItem = 8;  // tokens of one column that a thread sums up for
  static constexpr int kGroups = kTokens / kItem;
  static constexpr int kRounds = 2;  // items of a thread, at most: 256 columns
  static constexpr int kFine = 8;    // chunks whose states are kept at a time
  static constexpr int kWindow = kFine * kTokens;
  static constexpr int kWindows = static_cast<int>(kSegmentTokens) / kWindow;
  static constexpr KALMANET_BOTH int64_t padded(int64_t n) { return (n + 7) / 8 * 8; }
  static constexpr KALMANET_BOTH int64_t state_elements(int64_t K, int64_t V) {
    return padded(K) * (padded(K) + padded(V));
  }
  // Before each window, before each chunk of one but its first, and S and E.
  static constexpr int64_t block_bytes(int64_t K, int64_t V) {
    return (kWindows + kFine) * state_elements(K, V) * static_cast<int64_t>(sizeof(S));
  }
};

template <class S>
struct GradientRegisters {
  S dk[GradientLayout<S>::kRounds][GradientLayout<S>::kItem];
  S dv[GradientLayout<S>::kRounds][GradientLayout<S>::kItem];
  double sum[3];
};

// What pairs of tokens make: m_i . k_j, do_i . v_j, x_i . k_j, z_i . k_j, k_i . k_j. Beside them,
// in the same order, the weights of what is summed up over i: of m, do, x, z and k.
enum GradientPair { kMix, kOutput, kSolution, kAdjoint, kKey, kGradientPairs };
// Products of a token's own: k H_0 k, k S k, z H_0 x, m U_0 do, v E k; and for beta's gradient.
enum GradientDot {
  kKeyStart,
  kKeyCarry,
  kAdjointStart,
  kMixStart,
  kValueCarry,
  kBetaKey,
  kBetaValue,
  kGradientDots
};

template <class S>
struct GradientShared {
  static constexpr int C = GradientLayout<S>::kTokens;
  alignas(32) S weight[kGradientPairs][C][C];  // [i][t]: of row i in the gradient of token t
  S pair[kGradientPairs][C][C];                // [i][j]
  // Of H and of U.
  double decay[2][C], since[2][C], to_end[2][C];
  double between[2][C][C];  // [i][j]: e^{G_i - G_j}; 0 where j > i
  double total[2];
  double w[C], h[C];
  double dots[kGradientDots][C];
  double actions[2][C + 1][C + 1];  // [i][j]: of source j (C: the start) on sink i (C: the carry)
  double states[3];                 // <S, H_0>, |H_0|^2, <E, U_0>
  double warp[3][GradientLayout<S>::kThreads / 32];
};

// Lanes in shared memory, after GradientShared.
template <class S>
struct GradientLanes {
  using L = GradientLayout<S>;
  S *k, *x, *z, *m, *v, *d_o, *out;
  KALMANET_KERNEL GradientLanes(char* memory, int64_t K, int64_t V) {
    S* at = reinterpret_cast<S*>(memory + (sizeof(GradientShared<S>) + 31) / 32 * 32);
    const int64_t k_size = L::padded(K) * L::kStride, v_size = L::padded(V) * L::kStride;
    k = at, x = k + k_size, z = x + k_size, m = z + k_size;
    v = m + k_size, d_o = v + v_size, out = d_o + v_size;
  }
  static constexpr int64_t shared_bytes(int64_t K, int64_t V) {
    const int64_t most = L::padded(K) > L::padded(V) ? L::padded(K) : L::padded(V);
    return static_cast<int64_t>((sizeof(GradientShared<S>) + 31) / 32 * 32) +
           (4 * L::padded(K) + 2 * L::padded(V) + most) * L::kStride *
               static_cast<int64_t>(sizeof(S));
  }
};

// Loading, products and state updates of a chunk.
template <class Group, class S>
struct GradientProducts {
  using L = GradientLayout<S>;
  using Registers = GradientRegisters<S>;
  static constexpr int C = L::kTokens;

  Group& group;
  GradientShared<S>& shared;
  const BackwardJob& job;
  GradientLanes<S> lanes;
  S* scratch;
  Piece piece;
  int64_t head;
  int K, V, Kp, Vp;
  int64_t t0 = 0;
  int n = 0;

  // H (then U) before window i; before chunk i of a window (0: the window's); S and E.
  KALMANET_KERNEL S* state(int i) { return scratch + i * L::state_elements(K, V); }
  KALMANET_KERNEL S* chunk_state(int window, int chunk) {
    return state(chunk == 0 ? window : L::kWindows + chunk - 1);
  }
  KALMANET_KERNEL S* carry() { return state(L::kWindows + L::kFine - 1); }
  KALMANET_KERNEL S* second(S* state) { return state + static_cast<int64_t>(Kp) * Kp; }

  // Row `token` of a [.., width] matrix into lanes; `of(t, c)` where it has one.
  template <class Of>
  KALMANET_KERNEL void load_lanes(S* to, int width, int padded, Of&& of) {
    group.each([&](int thread, Registers&) {
      for (int at = thread; at < C * padded; at += L::kThreads) {
        const int token = at / padded, c = at % padded;
        to[c * L::kStride + token] = token < n && c < width ? of(t0 + token, c) : S{0};
      }
    });
  }

  KALMANET_KERNEL void load_keys_and_values() {
    const GkaJob& in = job.in;
    load_lanes(lanes.k, K, Kp, [&](int64_t t, int c) {
      return scalar_at<S>(in.beta, piece.row, t, head, 1.0) * key(t, c);
    });
    load_lanes(lanes.v, V, Vp, [&](int64_t t, int c) {
      return scalar_at<S>(in.beta, piece.row, t, head, 1.0) * value(t, c);
    });
  }
  // As they came.
  KALMANET_KERNEL S key(int64_t t, int c) const {
    const Array& k = job.in.k;
    return load_element<S>(k, offset_of(k, piece.row, t, head / job.in.k_group) + c * k.stride[3]);
  }
  KALMANET_KERNEL S value(int64_t t, int c) const {
    const Array& v = job.in.v;
    return load_element<S>(v, offset_of(v, piece.row, t, head / job.in.v_group) + c * v.stride[3]);
  }

  KALMANET_KERNEL void load_rest() {
    const GkaJob& in = job.in;
    load_lanes(lanes.x, K, Kp, [&](int64_t t, int c) {
      return workspace_at<S>(job.x, place_of(job, piece, t, head), K, c);
    });
    load_lanes(lanes.z, K, Kp, [&](int64_t t, int c) {
      return workspace_at<S>(job.z, place_of(job, piece, t, head), K, c);
    });
    load_lanes(lanes.m, K, Kp, [&](int64_t t, int c) {
      const S q = load_element<S>(
          in.q, offset_of(in.q, piece.row, t, head / in.q_group) + c * in.q.stride[3]);
      const S alpha = scalar_at<S>(in.alpha, piece.row, t, head, 1.0);
      return q + alpha * (workspace_at<S>(job.x, place_of(job, piece, t, head), K, c) - q);
    });
    load_lanes(lanes.d_o, V, Vp, [&](int64_t t, int c) {
      return load_element<S>(job.d_o,
                             offset_of(job.d_o, piece.row, t, head) + c * job.d_o.stride[3]);
    });
  }

  // Products of decays, never quotients: a gate may be minus infinity. Begins and ends with a
  // barrier.
  KALMANET_KERNEL void load_decays() {
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread >= 2 * C) return;
      const int which = thread / C, t = thread % C;
      double gate = 0.0;
      if (t < n) {
        gate = static_cast<double>(
            scalar_at<S>(which == 0 ? job.in.gk : job.in.g, piece.row, t0 + t, head, 0.0));
      }
      shared.decay[which][t] = exp(gate);
      if (which == 0) shared.w[t] = t < n ? job.w[place_of(job, piece, t0 + t, head)] : 0.0;
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread >= 2 * C) return;
      const int which = thread / C, t = thread % C;
      const double* const decay = shared.decay[which];
      double since = 1.0, to_end = 1.0, between = 1.0;
      for (int i = 0; i < C; ++i) {
        if (i <= t) since *= decay[i];
        if (i > t) to_end *= decay[i];
        if (i > t) between *= decay[i];
        shared.between[which][i][t] = i < t ? 0.0 : between;
      }
      shared.since[which][t] = since;
      shared.to_end[which][t] = to_end;
      if (t == C - 1) shared.total[which] = since;
    });
    group.barrier();
  }

  // For every column of `width` and every eight tokens t of it, f(registers, round, column, t, sum)
  // with sum = sum_c A(c, column) y_c,t: A's element is a[c * ld + column], or (kAlongRows)
  // a[column * ld + c]. No barrier.
  template <bool kAlongRows, class F>
  KALMANET_KERNEL void multiply(const S* a, int ld, int depth, int width, const S* y, F&& f) {
    const int columns = (width + 31) / 32 * 32;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int round = 0; round < L::kRounds; ++round) {
        const int item = round * L::kThreads + thread;
        const int column = item % columns, t = item / columns * L::kItem;
        if (t >= C || column >= width) continue;
        S sum[L::kItem] = {};
        for (int c = 0; c < depth; c += 4) {
          S e[4];
          if constexpr (kAlongRows) {
            load4(a + static_cast<int64_t>(column) * ld + c, e);
          } else {
            KALMANET_UNROLL
            for (int i = 0; i < 4; ++i) e[i] = a[static_cast<int64_t>(c + i) * ld + column];
          }
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) add_lanes(e[i], y + (c + i) * L::kStride + t, sum);
        }
        f(r, round, column, t, sum);
      }
    });
  }
  KALMANET_KERNEL static void add_lanes(S factor, const S* y, S (&sum)[L::kItem]) {
    KALMANET_UNROLL
    for (int i = 0; i < L::kItem; i += 4) {
      S y4[4];
      load4(y + i, y4);
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) sum[i + j] += factor * y4[j];
    }
  }

  // sum += sum_i left_row,i weight_i right_column,i for a warp's four rows and every 32nd column.
  template <class Weight>
  KALMANET_KERNEL static void add_outer(S (&sum)[4][4], const S* left, const S* right, int row,
                                        const int (&column)[4], const Weight* weight, double sign) {
    KALMANET_UNROLL
    for (int i = 0; i < C; i += 4) {
      S l[4][4], factor[4];
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) factor[j] = static_cast<S>(sign * weight[i + j]);
      KALMANET_UNROLL
      for (int a = 0; a < 4; ++a) {
        load4(left + (row + a) * L::kStride + i, l[a]);
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) l[a][j] *= factor[j];
      }
      KALMANET_UNROLL
      for (int b = 0; b < 4; ++b) {
        S r[4];
        load4(right + column[b] * L::kStride + i, r);
        KALMANET_UNROLL
        for (int a = 0; a < 4; ++a) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) sum[a][b] += l[a][j] * r[j];
        }
      }
    }
  }
  // f(registers, row, columns[4]) for tiles of four rows and four columns, 32 apart; a column of
  // `width` or more (a multiple of 8, as rows is) is given as 0, and not `inside`.
  template <class F>
  KALMANET_KERNEL void for_tiles(int rows, int width, F&& f) {
    const int stripes = (width + 127) / 128;
    group.each([&](int thread, Registers& r) {
      for (int tile = thread / 32; tile < rows / 4 * stripes; tile += L::kThreads / 32) {
        int column[4];
        bool inside[4];
        KALMANET_UNROLL
        for (int b = 0; b < 4; ++b) {
          column[b] = tile % stripes * 128 + b * 32 + thread % 32;
          inside[b] = column[b] < width;
          if (!inside[b]) column[b] = 0;
        }
        f(r, tile / stripes * 4, column, inside);
      }
    });
  }

  // H and U after the chunk from those before it. Needs keys, values and decays.
  KALMANET_KERNEL void advance(const S* from, S* to) {
    for (int u = 0; u < 2; ++u) {
      const int width = u ? Vp : Kp;
      const S total = static_cast<S>(shared.total[u]);
      const int64_t first = u ? static_cast<int64_t>(Kp) * Kp : 0;
      for_tiles(
          Kp, width, [&](Registers&, int row, const int (&column)[4], const bool (&inside)[4]) {
            S sum[4][4] = {};
            add_outer(sum, lanes.k, u ? lanes.v : lanes.k, row, column, shared.to_end[u], 1.0);
            KALMANET_UNROLL
            for (int a = 0; a < 4; ++a) {
              KALMANET_UNROLL
              for (int b = 0; b < 4; ++b) {
                if (!inside[b]) continue;
                const int64_t at = first + static_cast<int64_t>(row + a) * width + column[b];
                to[at] = total * from[at] + sum[a][b];
              }
            }
          });
    }
  }

  // S and E from after the chunk to before it; shared.states on the way (not a sum yet: each
  // thread's part is in its registers).
  KALMANET_KERNEL void retreat(const S* h, const S* u) {
    double through_f = 0.0;
    for (int i = 0; i < C; ++i) through_f += shared.w[i] * shared.since[0][i] * shared.since[0][i];
    group.each([&](int, Registers& r) { r.sum[0] = r.sum[1] = r.sum[2] = 0.0; });
    S* const s = carry();
    S* const e = second(s);
    const S total = static_cast<S>(shared.total[0]), u_total = static_cast<S>(shared.total[1]);
    for_tiles(Kp, Kp, [&](Registers& r, int row, const int (&column)[4], const bool (&inside)[4]) {
      S sum[4][4] = {};
      add_outer(sum, lanes.z, lanes.x, row, column, shared.since[0], -1.0);
      add_outer(sum, lanes.x, lanes.z, row, column, shared.since[0], -1.0);
      add_outer(sum, lanes.k, lanes.k, row, column, shared.h, -2.0);
      KALMANET_UNROLL
      for (int a = 0; a < 4; ++a) {
        KALMANET_UNROLL
        for (int b = 0; b < 4; ++b) {
          if (!inside[b]) continue;
          const int64_t at = static_cast<int64_t>(row + a) * Kp + column[b];
          const double start = static_cast<double>(h[at]);
          r.sum[0] += static_cast<double>(s[at]) * start;
          r.sum[1] += start * start;
          s[at] = total * s[at] + (sum[a][b] - static_cast<S>(2.0 * through_f * start));
        }
      }
    });
    for_tiles(Kp, Vp, [&](Registers& r, int row, const int (&column)[4], const bool (&inside)[4]) {
      S sum[4][4] = {};
      add_outer(sum, lanes.m, lanes.d_o, row, column, shared.since[1], job.in.scale);
      KALMANET_UNROLL
      for (int a = 0; a < 4; ++a) {
        KALMANET_UNROLL
        for (int b = 0; b < 4; ++b) {
          if (!inside[b]) continue;
          const int64_t at = static_cast<int64_t>(row + a) * Vp + column[b];
          r.sum[2] += static_cast<double>(e[at]) * static_cast<double>(u[at]);
          e[at] = u_total * e[at] + sum[a][b];
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda
