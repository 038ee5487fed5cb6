// One chunk of one head: at most kLanes tokens loaded into the kernels' layouts, with their decays
// and their ridges. Letters as in docs/math.md: G_t is the running sum of gk from the chunk's
// start, M_tj = e^{G_t - G_j} for j <= t (else 0); N is the same of g.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/kernel_table.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"
#include "cpu/transpose.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

// Decays inside a chunk: every factor is a product of e^{g} <= 1, never a quotient.
template <class S>
struct ChunkDecay {
  S rows[kLanes * kLanes];   // [t][j]: M_tj
  S lanes[kLanes * kLanes];  // [j][t]: M_tj
  S since_start[kLanes];     // e^{G_t}
  S to_end[kLanes];          // e^{G_C - G_t}
  double since_start64[kLanes];
  S total;  // e^{G_C}
};

// Hands out pieces of a scratch buffer, each aligned as the buffer (64 bytes).
template <class S>
class Arena {
 public:
  KALMANET_INLINE explicit Arena(S* base) : next_(base) {}
  KALMANET_INLINE S* take(int64_t elements) {
    S* p = next_;
    next_ += padded(elements);
    return p;
  }

 private:
  S* next_;
};

template <class S>
struct Chunk {
  int64_t K, V, Kp, Vp;
  int64_t t0 = 0;  // first token
  int64_t n = 0;   // tokens
  // lanes [Kp][t] and rows [t][Kp] of the keys; lanes of the queries; rows of the values. Keys and
  // values are multiplied by beta. Rows and lanes from token n on are zeros.
  S *k_lanes, *k_rows, *q_lanes, *v_rows;
  ChunkDecay<S>* h_decay;  // of gk
  ChunkDecay<S>* u_decay;  // of g; the same object where both gates are one tensor
  ChunkDecay<S> decay_storage[2];
  double ridge[kLanes];   // a_t
  double norm[kLanes];    // f_t, 0 where it counts as zero
  double lambda[kLanes];  // a_t f_t
  double step[kLanes];    // of the iteration: 2 / (2 lambda + f); 0 where f_t counts as zero
  double rho2[kLanes];
  S alpha[kLanes];
  double gram2[kLanes][kLanes];  // (k_i . k_j)^2
  double kappa[kLanes];          // k_j^T H_0 k_j
  double start_norm2;            // |H_0|_F^2
};

template <class Vec, class S>
void carve_chunk(Chunk<S>& c, const HeadInputs& in, Arena<S>& arena) {
  c.K = in.K;
  c.V = in.V;
  c.Kp = padded(in.K);
  c.Vp = padded(in.V);
  c.k_lanes = arena.take(c.Kp * kLanes);
  c.k_rows = arena.take(c.Kp * kLanes);
  c.q_lanes = arena.take(c.Kp * kLanes);
  c.v_rows = arena.take(c.Vp * kLanes);
}

template <class Vec, class S>
void load_decay(ChunkDecay<S>& d, const Column& gate, int64_t t0, int64_t n) {
  double factor[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) {
    factor[t] = gate.data == nullptr || t >= n
                    ? 1.0
                    : std::exp(static_cast<double>(value_at<S>(gate, t0 + t, 0)));
  }
  double row[kLanes] = {};  // M_tj of the current t
  double start = 1.0;
  for (int64_t t = 0; t < kLanes; ++t) {
    const bool real = t < n;
    if (real) {
      start *= factor[t];
      for (int64_t j = 0; j < t; ++j) row[j] *= factor[t];
      row[t] = 1.0;
    }
    for (int64_t j = 0; j < kLanes; ++j) {
      const S m = real && j <= t ? static_cast<S>(row[j]) : 0;
      d.rows[t * kLanes + j] = m;
      d.lanes[j * kLanes + t] = m;
    }
    d.since_start64[t] = real ? start : 0.0;
    d.since_start[t] = static_cast<S>(d.since_start64[t]);
  }
  // The last real row holds e^{G_C - G_j}.
  for (int64_t t = 0; t < kLanes; ++t) d.to_end[t] = t < n ? static_cast<S>(row[t]) : 0;
  d.total = static_cast<S>(start);
}

// Keys, values and decays: all that the states need. `h`, `u`: which of the two.
template <class Vec, class S>
void load_chunk_for_states(Chunk<S>& c, const HeadInputs& in, int64_t t0, int64_t n, bool h,
                           bool u) {
  c.t0 = t0;
  c.n = n;
  c.h_decay = &c.decay_storage[0];
  c.u_decay = &c.decay_storage[1];
  if (h) load_decay<Vec>(*c.h_decay, in.gk, t0, n);
  if (u) {
    if (h && in.g.data == in.gk.data && in.g.stride == in.gk.stride && in.g.dtype == in.gk.dtype) {
      c.u_decay = c.h_decay;
    } else {
      load_decay<Vec>(*c.u_decay, in.g, t0, n);
    }
  }
  load_rows<Vec>(in.k, in.beta, t0, n, in.K, c.k_rows);
  if (u) load_rows<Vec>(in.v, in.beta, t0, n, in.V, c.v_rows);
}

template <class Vec, class S>
void load_chunk(Chunk<S>& c, const HeadInputs& in, int64_t t0, int64_t n) {
  load_chunk_for_states<Vec>(c, in, t0, n, true, true);
  rows_to_lanes<Vec>(c.k_rows, c.Kp, c.k_lanes);
  load_lanes<Vec>(in.q, t0, n, in.K, c.q_lanes);
  for (int64_t t = 0; t < kLanes; ++t) {
    const bool real = t < n;
    c.alpha[t] = real ? value_at<S>(in.alpha, t0 + t, 1) : 0;
    c.ridge[t] = !real || in.ridge.data == nullptr
                     ? in.ridge_ratio
                     : static_cast<double>(value_at<S>(in.ridge, t0 + t, 0));
  }
}

// kappa_j = k_j^T H_0 k_j and (k_i . k_j)^2, summed in the precision of Vec; `lanes` as
// ridge_norms.
template <class Vec, class S>
void key_products(Chunk<S>& c, const S* h, bool h_is_zero, S* hk_lanes) {
  using T = Tile<Vec>;
  using Elem = typename Vec::Elem;
  constexpr bool kSame = sizeof(Elem) == sizeof(S);
  alignas(64) Elem room[kSame ? 1 : kMaxHeadDim * kLanes];
  const Elem* keys;
  if constexpr (kSame) {
    keys = c.k_lanes;
  } else {
    for (int64_t i = 0; i < c.Kp * kLanes; ++i) room[i] = c.k_lanes[i];
    keys = room;
  }
  for (int64_t t = 0; t < kLanes; ++t) c.kappa[t] = 0.0;
  if (!h_is_zero) {
    alignas(64) Elem hk[T::kRows * kLanes];
    for (int64_t n = 0; n < c.Kp; n += T::kRows) {
      T tile;
      tile.clear();
      tile.accumulate(h + n, c.Kp, c.K, keys);
      tile.store(hk);
      double sum[kLanes];
      lanes_dot<Vec>(hk, keys + n * kLanes, T::kRows, sum);
      for (int64_t t = 0; t < kLanes; ++t) c.kappa[t] += sum[t];
      for (int64_t i = 0; i < T::kRows * kLanes; ++i) {
        hk_lanes[n * kLanes + i] = static_cast<S>(hk[i]);
      }
    }
  }
  alignas(64) Elem gram[kLanes * kLanes];
  lanes_product<Vec>(c.k_lanes, kLanes, c.K, kLanes, keys, gram);
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const double e = gram[i * kLanes + j];
      c.gram2[i][j] = e * e;
    }
  }
}

// f_t, lambda_t and the iteration's constants, from the state H_0 before the chunk:
//   f_t^2 = e^{2G_t} |H_0|^2 + 2 e^{G_t} sum_j M_tj k_j^T H_0 k_j + sum_ij M_ti M_tj (k_i . k_j)^2
// All three terms are sums of nothing negative (H_0 is positive semi-definite), so no digits
// cancel. `hk_lanes` [Kp][t] receives H_0 k_t (unused where h_is_zero).
//
// The decays are the storage's (float32) ones that the operator is applied with: where one
// direction holds nearly all of H, its eigenvalue lies at the very edge f + lambda of the
// iteration's interval, where r steps magnify a relative difference between f and the operator
// r^2-fold. So a chunk solved in float64 has its products summed in float64 too (Vec = Wide).
template <class Vec, class S>
void ridge_norms(Chunk<S>& c, const S* h, bool h_is_zero, S* hk_lanes) {
  c.start_norm2 = h_is_zero ? 0.0 : symmetric_squared_norm<Vec>(h, c.Kp, c.K);
  key_products<Vec>(c, h, h_is_zero, hk_lanes);
  const ChunkDecay<S>& d = *c.h_decay;
  for (int64_t t = 0; t < kLanes; ++t) {
    c.norm[t] = 0.0;
    c.lambda[t] = c.step[t] = 0.0;
    const double a = c.ridge[t];
    const double rho = 0.5 / (2.0 * a + 1.0);
    c.rho2[t] = rho * rho;
    if (t >= c.n) continue;
    const S* m = d.rows + t * kLanes;
    double cross = 0.0, inside = 0.0;
    for (int64_t j = 0; j <= t; ++j) {
      cross += m[j] * c.kappa[j];
      double row[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) row[i] = m[i] * c.gram2[j][i];
      double sum = 0.0;
      for (int64_t i = 0; i < kLanes; ++i) sum += row[i];
      inside += m[j] * sum;
    }
    const double e = d.since_start[t];
    const double f = std::sqrt(e * e * c.start_norm2 + 2.0 * e * cross + inside);
    if (f > kVanishedNorm) {
      c.norm[t] = f;
      c.lambda[t] = a * f;
      c.step[t] = 2.0 / (2.0 * a * f + f);
    }
    if (!(f <= kVanishedNorm) && !(f > kVanishedNorm)) {  // a NaN must stay one
      c.norm[t] = f;
      c.lambda[t] = c.step[t] = f;
    }
  }
}

// A state after the chunk: to = e^{G_C} from + sum_j e^{G_C - G_j} k_j r_j^T for the rows r
// [kLanes] [cols] and their decay; from may be to. `weighted` has room for [kLanes][Kp].
template <class Vec, class S>
void advance_state(const Chunk<S>& c, const ChunkDecay<S>& d, const S* rows, int64_t cols,
                   const S* from, S* to, S* weighted) {
  for (int64_t j = 0; j < c.n; ++j) {
    for (int64_t i = 0; i < c.Kp; ++i)
      weighted[j * c.Kp + i] = d.to_end[j] * c.k_rows[j * c.Kp + i];
  }
  if (from != to) {  // the rows that pad a state
    for (int64_t i = c.K * cols; i < c.Kp * cols; ++i) to[i] = from[i];
  }
  rank_update<Vec>(to, {from, d.total}, cols, c.K, cols, weighted, c.Kp, rows, cols, c.n);
}
template <class Vec, class S>
void advance_h(const Chunk<S>& c, const S* from, S* to, S* weighted) {
  advance_state<Vec>(c, *c.h_decay, c.k_rows, c.Kp, from, to, weighted);
}
template <class Vec, class S>
void advance_u(const Chunk<S>& c, const S* from, S* to, S* weighted) {
  advance_state<Vec>(c, *c.u_decay, c.v_rows, c.Vp, from, to, weighted);
}

}  // namespace kalmanet::cpu
