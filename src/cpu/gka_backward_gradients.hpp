// The backward of one chunk, second half: from x, z and dm to every gradient (formulas:
// gka_backward.hpp).
#pragma once

#include <cmath>

#include "cpu/gka_backward_solve.hpp"
#include "cpu/gka_gate_gradient.hpp"
#include "cpu/lanes.hpp"

namespace kalmanet::cpu {

// w_t, h_t and P, the carried weight taken in; the gradients of alpha and of the ridge ratio.
template <class Vec, class S = typename Vec::Elem>
void ridge_gradient(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const GkaBackwardJob<S>& job) {
  Chunk<S>& c = b.c;
  double dm_q[kLanes];
  lanes_dot<Vec>(b.dm, c.q_lanes, c.K, dm_q);
  for (int64_t t = 0; t < kLanes; ++t) {
    const double f = c.norm[t];
    work.w[t] = f == 0.0 || !job.bp_lambda ? 0.0 : b.z_dot_x[t] * c.ridge[t] / f;
    work.h_sum[t] = 0.0;
    if (t >= c.n) continue;
    const int64_t at = c.t0 + t;
    if (job.dalpha.data != nullptr) set_value<S>(job.dalpha, at, b.dm_dot_x[t] - dm_q[t]);
    if (job.d_ridge.data != nullptr) set_value<S>(job.d_ridge, at, -b.z_dot_x[t] * f);
  }
  const ChunkDecay<S>& d = *c.h_decay;
  for (int64_t i = 0; i < kLanes * kLanes; ++i) work.p[i] = 0.0;
  for (int64_t i = 0; i < c.n; ++i) {
    const S* mi = d.rows + i * kLanes;
    for (int64_t t = 0; t <= i; ++t) {
      const double weight = mi[t] * work.w[i];
      work.h_sum[t] += weight * d.since_start[i];
      for (int64_t j = 0; j < kLanes; ++j) work.p[t * kLanes + j] += weight * mi[j];
    }
  }
  // omega H_C is as one more -w_i H_i at the chunk's end.
  const double omega = *job.carry_weight, total = d.total;
  double h_weight = -omega * total * total;
  for (int64_t t = 0; t < kLanes; ++t) {
    h_weight += work.w[t] * d.since_start64[t] * d.since_start64[t];
    work.h_sum[t] -= omega * total * d.to_end[t];
    for (int64_t j = 0; j < kLanes; ++j) {
      work.p[t * kLanes + j] -= omega * d.to_end[t] * d.to_end[j];
    }
  }
  work.omega = omega;
  *job.carry_weight = -h_weight;
}

// The small token-by-token products that several gradients share.
template <class Vec, class S = typename Vec::Elem>
void pair_products(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, S scale) {
  Chunk<S>& c = b.c;
  lanes_product<Vec>(work.m, kLanes, c.K, kLanes, c.k_lanes, work.m_k);
  lanes_product<Vec>(b.do_lanes, kLanes, c.V, kLanes, b.v_lanes, work.do_v);
  lanes_product<Vec>(b.x, kLanes, c.K, kLanes, c.k_lanes, work.x_k);
  lanes_product<Vec>(b.z, kLanes, c.K, kLanes, c.k_lanes, work.z_k);
  for (int64_t i = 0; i < kLanes * kLanes; ++i) work.m_k[i] *= scale * c.u_decay->rows[i];
}

// dv, in lanes work.out_v.
template <class Vec, class S = typename Vec::Elem>
void gradient_of_values(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const S* e) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  Chunk<S>& c = b.c;
  for (int64_t n = 0; n < c.Vp; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(e + n, c.Vp, c.K, c.k_lanes);
    tile.scale_lanes(c.u_decay->to_end);
    tile.each([&](int64_t at, int, Reg acc) { Vec::store(work.out_v + n * kLanes + at, acc); });
  }
  lanes_dot<Vec>(work.out_v, b.v_lanes, c.V, work.carry_kv);
  for (int64_t n = 0; n < c.Vp; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(work.do_rows + n, c.Vp, c.n, work.m_k);
    tile.each([&](int64_t at, int, Reg acc) {
      S* out = work.out_v + n * kLanes + at;
      Vec::store(out, Vec::add(Vec::load(out), acc));
    });
  }
}

// dk, in lanes work.out_k.
template <class Vec, class S = typename Vec::Elem>
void gradient_of_keys(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const S* d, const S* e,
                      bool h_is_zero, S scale) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  Chunk<S>& c = b.c;
  // e^{G_C-G_t} (D + D^T) k_t first: its product with k_t is also a gate's gradient.
  for (int64_t n = 0; n < c.Kp; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(d + n, c.Kp, c.K, c.k_lanes);
    tile.template accumulate<true>(d + n * c.Kp, c.Kp, c.K, c.k_lanes);
    tile.scale_lanes(c.h_decay->to_end);
    tile.each([&](int64_t at, int, Reg acc) { Vec::store(work.out_k + n * kLanes + at, acc); });
  }
  lanes_dot<Vec>(work.out_k, c.k_lanes, c.K, work.carry_k);
  // Of omega H_C its product with k_t alone: the rest is in h_t and P.
  for (int64_t t = 0; t < kLanes; ++t) {
    const S* const to_end = c.h_decay->to_end;
    double k_h_k = static_cast<double>(c.h_decay->total) * c.kappa[t];  // k_t^T H_C k_t
    for (int64_t j = 0; j < c.n; ++j) k_h_k += to_end[j] * c.gram2[j][t];
    work.carry_k[t] = 0.5 * work.carry_k[t] + work.omega * to_end[t] * k_h_k;
  }

  // Weights [4 * kLanes][t] of the stacked rows m, z, k, x.
  alignas(64) S s[4 * kLanes * kLanes];
  // h_t H_0 k_t as (h_t |H_0|) (H_0 / |H_0|) k_t: either factor alone would leave float32's range
  // for keys of 1e-8.
  alignas(64) S minus_2h[kLanes];
  const double h_norm = std::sqrt(c.start_norm2);
  const Reg inverse_norm = Vec::set1(h_norm > 0.0 ? static_cast<S>(1.0 / h_norm) : 0);
  const int64_t block = kLanes * kLanes;
  for (int64_t i = 0; i < kLanes; ++i) {
    minus_2h[i] = static_cast<S>(-2.0 * work.h_sum[i] * h_norm);
    for (int64_t t = 0; t < kLanes; ++t) {
      const int64_t at = i * kLanes + t;
      const S decay = c.h_decay->rows[at];
      s[at] = scale * c.u_decay->rows[at] * work.do_v[at];
      s[block + at] = -decay * work.x_k[at];
      s[3 * block + at] = -decay * work.z_k[at];
    }
  }
  lanes_product<Vec>(c.k_lanes, kLanes, c.K, kLanes, c.k_lanes, s + 2 * block);
  for (int64_t i = 0; i < block; ++i) {
    s[2 * block + i] = static_cast<S>(-2.0 * work.p[i] * s[2 * block + i]);
  }
  for (int64_t n = 0; n < c.Kp; n += T::kRows) {
    T tile;
    tile.clear();
    tile.template accumulate<true>(e + n * c.Vp, c.Vp, c.V, b.v_lanes);
    tile.scale_lanes(c.u_decay->to_end);
    tile.accumulate(work.stack_rows + n, c.Kp, 4 * kLanes, s);
    tile.each([&](int64_t at, int lane, Reg acc) {
      S* out = work.out_k + n * kLanes + at;
      Reg sum = Vec::add(Vec::load(out), acc);
      if (!h_is_zero) {
        const Reg hk = Vec::mul(inverse_norm, Vec::load(b.hk + n * kLanes + at));
        sum = Vec::fma(Vec::load(minus_2h + lane), hk, sum);
      }
      Vec::store(out, sum);
    });
  }
}

// dgk and dg of the chunk's tokens, from D, E (after the chunk) and H_0, U_0.
template <class Vec, class S = typename Vec::Elem>
void gradient_of_gates(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const GkaBackwardJob<S>& job,
                       const StateBuffers<S>& start, bool h_is_zero) {
  Chunk<S>& c = b.c;
  double out[kLanes];
  if (job.dg.data != nullptr) {
    Interactions<Vec> u;
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        u.a[i][j] = static_cast<double>(work.m_k[i * kLanes + j]) * work.do_v[i * kLanes + j];
      }
      u.a[i][kLanes] = work.dm_inter_dot_m[i];
      u.a[kLanes][i] = work.carry_kv[i];
    }
    u.a[kLanes][kLanes] =
        c.u_decay->total * frobenius_dot<Vec>(job.carry.u, start.u, c.Vp, c.K, c.Vp);
    // Sinks that are not tokens of this chunk take nothing.
    for (int64_t i = c.n; i < kLanes; ++i) u.a[i][kLanes] = 0.0;
    u.crossing_sums(c.n, out);
    for (int64_t t = 0; t < c.n; ++t) set_value<S>(job.dg, c.t0 + t, out[t]);
  }
  if (job.dgk.data == nullptr) return;
  Interactions<Vec> h;
  const ChunkDecay<S>& d = *c.h_decay;
  for (int64_t i = 0; i < c.n; ++i) {
    const double e = d.since_start64[i];
    const S* mi = d.rows + i * kLanes;
    double start_norm = e * c.start_norm2;  // <H_i, H_0>
    for (int64_t l = 0; l <= i; ++l) start_norm += mi[l] * c.kappa[l];
    for (int64_t j = 0; j <= i; ++j) {
      double k_h_k = e * c.kappa[j];  // k_j^T H_i k_j
      for (int64_t l = 0; l <= i; ++l) k_h_k += mi[l] * c.gram2[l][j];
      h.a[i][j] =
          -mi[j] * (static_cast<double>(work.z_k[i * kLanes + j]) * work.x_k[i * kLanes + j] +
                    work.w[i] * k_h_k);
    }
    h.a[i][kLanes] = -e * (b.z_h_x[i] + work.w[i] * start_norm);
    h.a[kLanes][i] = work.carry_k[i];
  }
  h.a[kLanes][kLanes] = 0.0;
  if (!h_is_zero) {  // <D', H_0> + omega <H_C, H_0>
    const double total = d.total;
    double of_h = total * c.start_norm2;
    for (int64_t j = 0; j < c.n; ++j) of_h += d.to_end[j] * c.kappa[j];
    h.a[kLanes][kLanes] =
        total * (frobenius_dot<Vec>(job.carry.h, start.h, c.Kp, c.K, c.Kp) + work.omega * of_h);
  }
  for (int64_t i = c.n; i < kLanes; ++i) h.a[i][kLanes] = 0.0;
  h.crossing_sums(c.n, out);
  for (int64_t t = 0; t < c.n; ++t) set_value<S>(job.dgk, c.t0 + t, out[t]);
}

// D' and E from after the chunk to before it. Consumes stack_rows.
template <class Vec, class S = typename Vec::Elem>
void carry_gradients(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const GkaBackwardJob<S>& job,
                     S scale) {
  Chunk<S>& c = b.c;
  const ChunkDecay<S>& dh = *c.h_decay;
  const ChunkDecay<S>& du = *c.u_decay;
  const int64_t row = c.Kp;
  S* m_rows = work.stack_rows;
  S* z_rows = m_rows + kLanes * row;
  const S* k_rows = z_rows + kLanes * row;
  for (int64_t i = 0; i < kLanes; ++i) {
    const S wm = scale * du.since_start[i];
    const S wz = -dh.since_start[i];
    for (int64_t n = 0; n < row; ++n) {
      m_rows[i * row + n] *= wm;
      z_rows[i * row + n] *= wz;
    }
  }
  rank_update<Vec>(job.carry.u, {job.carry.u, du.total}, c.Vp, c.K, c.Vp, m_rows, row, work.do_rows,
                   c.Vp, c.n);
  // D in one pass: -h_j k_j beside k_j, then -e^{G_i} z_i beside x_i.
  S* const weighted_keys = m_rows;
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t n = 0; n < row; ++n) {
      weighted_keys[i * row + n] = static_cast<S>(-work.h_sum[i] * k_rows[i * row + n]);
    }
  }
  rank_update<Vec>(job.carry.h, {job.carry.h, dh.total}, row, c.K, row, weighted_keys, row, k_rows,
                   row, 2 * kLanes);
}

// dq; dk and dv back through beta, and dbeta.
template <class Vec, class S = typename Vec::Elem>
void store_gradients(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const GkaBackwardJob<S>& job) {
  Chunk<S>& c = b.c;
  const HeadInputs& in = job.in;
  S beta[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) {
    beta[t] = t < c.n ? value_at<S>(in.beta, c.t0 + t, 1) : 1;
  }
  if (job.dk.data != nullptr) store_lanes<Vec>(work.out_k, beta, job.dk, c.t0, c.n, c.K);
  if (job.dv.data != nullptr) store_lanes<Vec>(work.out_v, beta, job.dv, c.t0, c.n, c.V);
  if (job.dbeta.data != nullptr) {
    // The lanes hold beta k and beta v. Where beta is all but zero, k and v are read again: as they
    // came.
    constexpr double kSmallestBeta = 0x1p-20;
    bool divide = true;
    for (int64_t t = 0; t < c.n; ++t) divide = divide && std::abs(beta[t]) >= kSmallestBeta;
    if (!divide) {
      load_lanes<Vec>(in.k, c.t0, c.n, c.K, c.k_lanes);
      load_lanes<Vec>(in.v, c.t0, c.n, c.V, b.v_lanes);
    }
    double dk_k[kLanes], dv_v[kLanes];
    lanes_dot<Vec>(work.out_k, c.k_lanes, c.K, dk_k);
    lanes_dot<Vec>(work.out_v, b.v_lanes, c.V, dv_v);
    for (int64_t t = 0; t < c.n; ++t) {
      const double own = divide ? static_cast<double>(beta[t]) : 1.0;
      set_value<S>(job.dbeta, c.t0 + t, (dk_k[t] + dv_v[t]) / own);
    }
  }
  if (job.dq.data != nullptr) {
    using Reg = typename Vec::Reg;
    const Reg one = Vec::set1(1);
    for (int64_t i = 0; i < c.Kp; ++i) {
      for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
        const int64_t at = i * kLanes + lane;
        const Reg keep = Vec::sub(one, Vec::load(c.alpha + lane));
        Vec::store(work.out_k + at, Vec::fma(keep, Vec::load(b.dm + at), Vec::load(b.z + at)));
      }
    }
    store_lanes<Vec>(work.out_k, nullptr, job.dq, c.t0, c.n, c.K);
  }
}

}  // namespace kalmanet::cpu
