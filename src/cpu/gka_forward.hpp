// The chunked forward of one head, and the scan that carries its states alone.
#pragma once

#include "cpu/chebyshev.hpp"
#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {

// m_t = q_t + alpha_t (x_t - q_t), in lanes.
template <class Vec>
void mix(const Chunk& c, const float* x, float* m) {
  using Reg = typename Vec::Reg;
  for (int64_t i = 0; i < c.Kp; ++i) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
      const int64_t at = i * kLanes + lane;
      const Reg q = Vec::load(c.q_lanes + at);
      Vec::store(m + at, Vec::fma(Vec::load(c.alpha + lane), Vec::sub(Vec::load(x + at), q), q));
    }
  }
}

// o_t = scale ( e^{Gamma_t} U_0^T m_t + sum_{j<=t} N_tj v_j (k_j . m_t) ), in lanes [Vp][t].
template <class Vec>
void read_out(const Chunk& c, const float* u, bool u_is_zero, const float* m, float scale,
              float* o) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  alignas(64) float s[kLanes * kLanes];
  gained_product<Vec>(c.k_lanes, c.K, m, c.u_decay->lanes, s);
  const Reg gain = Vec::set1(scale);
  for (int64_t n = 0; n < c.Vp; n += T::kRows) {
    T tile;
    tile.clear();
    if (!u_is_zero) {
      tile.accumulate(u + n, c.Vp, c.K, m);
      tile.scale_lanes(c.u_decay->since_start);
    }
    tile.accumulate(c.v_rows + n, c.Vp, c.n, s);
    tile.each([&](int64_t offset, int, Reg acc) {
      Vec::store(o + n * kLanes + offset, Vec::mul(gain, acc));
    });
  }
}

template <class Vec>
void gka_forward_segment(const GkaForwardJob& job) {
  const HeadInputs& in = job.in;
  Arena arena(job.scratch);
  Chunk c;
  carve_chunk<Vec>(c, in, arena);
  float* const a = arena.take(c.Kp * kLanes);
  float* const b = arena.take(c.Kp * kLanes);
  float* const m = arena.take(c.Kp * kLanes);
  float* const o = arena.take(c.Vp * kLanes);
  bool h_is_zero = job.h_is_zero;
  for (int64_t t0 = job.begin; t0 < job.end; t0 += job.chunk_size) {
    const int64_t n = job.end - t0 < job.chunk_size ? job.end - t0 : job.chunk_size;
    load_chunk<Vec>(c, in, t0, n);
    ridge_norms<Vec>(c, job.state.h, h_is_zero, m);
    const int num_iter = choose_num_iter<Vec>(c, in, job.iterations);
    const float* x = chebyshev<Vec>(c, job.state.h, h_is_zero, c.q_lanes, num_iter, a, b);
    if (job.residual.data != nullptr) {
      float r[kLanes];
      relative_residual<Vec>(c, job.state.h, h_is_zero, c.q_lanes, x, r);
      for (int64_t t = 0; t < n; ++t) job.residual.data[(t0 + t) * job.residual.stride] = r[t];
    }
    if (job.x.data != nullptr) store_lanes<Vec>(x, nullptr, job.x, t0, n, c.K);
    mix<Vec>(c, x, m);
    read_out<Vec>(c, job.state.u, false, m, static_cast<float>(in.scale), o);
    store_lanes<Vec>(o, nullptr, job.o, t0, n, c.V);
    advance_h<Vec>(c, job.state.h, m);
    advance_u<Vec>(c, job.state.u, m);
    h_is_zero = false;
  }
}

template <class Vec>
void gka_scan_states(const GkaScanJob& job) {
  Arena arena(job.scratch);
  Chunk c;
  carve_chunk<Vec>(c, job.in, arena);
  float* const weighted = arena.take(c.Kp * kLanes);
  const bool h = job.state.h != nullptr;
  const bool u = job.state.u != nullptr;
  for (int64_t t0 = job.begin; t0 < job.end; t0 += job.chunk_size) {
    const int64_t n = job.end - t0 < job.chunk_size ? job.end - t0 : job.chunk_size;
    load_chunk_for_states<Vec>(c, job.in, t0, n, h, u);
    if (h) advance_h<Vec>(c, job.state.h, weighted);
    if (u) advance_u<Vec>(c, job.state.u, weighted);
  }
}

}  // namespace kalmanet::cpu
