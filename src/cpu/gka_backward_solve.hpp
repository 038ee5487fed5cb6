// The backward of one chunk, first half: the gradient of the mix and the adjoint solve.
#pragma once

#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/solver.hpp"

namespace kalmanet::cpu {

// What a chunk keeps from its solve to its gradients.
template <class Vec>
struct BackwardChunk {
  using S = typename Vec::Elem;
  Chunk<S> c;
  S *x, *z;  // lanes [Kp][t]; they point into solve buffers
  S *solve_x[2], *solve_z[2];
  S *dm, *inter;  // lanes: dm_t, and the part of it that reads U_0
  S* hk;          // lanes: H_0 k_t
  S *v_lanes, *do_lanes;
  double z_dot_x[kLanes], dm_dot_x[kLanes];
  double z_h_x[kLanes];  // z_t^T H_0 x_t
};

// What one chunk after the other uses: the solvers, and room for a chunk's gradients.
template <class Vec>
struct BackwardWork {
  using S = typename Vec::Elem;
  ChunkSolver<Vec> solver;
  ChunkSolver<typename Vec::Wide> wide_solver;  // of a sequence's first chunk, where kHasWider
  double* wide[4];                              // likewise
  S* m;                                         // lanes [Kp][t]
  S* stack_rows;  // [4 * kLanes][Kp]: rows of m, z, k, x, in this order
  S* out_k;       // lanes [Kp][t]: dq, dk
  S *do_rows, *out_v;
  double omega;                   // the carried weight after the chunk
  double w[kLanes];               // w_t; with h_t and P in float64, for 1 / f^3 overflows float32
  double h_sum[kLanes];           // h_t
  double p[kLanes * kLanes];      // P
  S m_k[kLanes * kLanes];         // [i][t]: scale N_it (m_i . k_t)
  S do_v[kLanes * kLanes];        // [i][t]: do_i . v_t
  S x_k[kLanes * kLanes];         // [i][t]: x_i . k_t
  S z_k[kLanes * kLanes];         // [i][t]: z_i . k_t
  double carry_k[kLanes];         // e^{G_C-G_t} k_t^T D k_t
  double carry_kv[kLanes];        // e^{Gamma_C-Gamma_t} k_t^T E v_t
  double dm_inter_dot_m[kLanes];  // m_t . (the part of dm_t that reads U_0)
};

template <class Vec>
void carve_backward(BackwardChunk<Vec>& b, const HeadInputs& in, Arena<typename Vec::Elem>& arena) {
  carve_chunk<Vec>(b.c, in, arena);
  const int64_t k = b.c.Kp * kLanes, v = b.c.Vp * kLanes;
  for (auto& buffer : b.solve_x) buffer = arena.take(k);
  for (auto& buffer : b.solve_z) buffer = arena.take(k);
  b.dm = arena.take(k);
  b.inter = arena.take(k);
  b.hk = arena.take(k);
  b.v_lanes = arena.take(v);
  b.do_lanes = arena.take(v);
}

template <class Vec>
void carve_work(BackwardWork<Vec>& work, const HeadInputs& in, Arena<typename Vec::Elem>& arena) {
  const int64_t k = padded(in.K) * kLanes, v = padded(in.V) * kLanes;
  if constexpr (kHasWider<Vec>) {
    for (double*& wide : work.wide) wide = reinterpret_cast<double*>(arena.take(2 * k));
  }
  work.m = arena.take(k);
  work.stack_rows = arena.take(4 * k);
  work.out_k = arena.take(k);
  work.do_rows = arena.take(v);
  work.out_v = arena.take(v);
  carve_solver<Vec>(work.solver, in, kBlockChunks, arena);
  if constexpr (kHasWider<Vec>) carve_solver<typename Vec::Wide>(work.wide_solver, in, 1, arena);
}

// dm_t; with `inter` (lanes [Kp][t], optional) the part of it that reads U_0.
template <class Vec, class S = typename Vec::Elem>
void gradient_of_mix(BackwardChunk<Vec>& b, const S* u, S scale, S* inter) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  Chunk<S>& c = b.c;
  alignas(64) S s[kLanes * kLanes];  // [j][t]: N_tj (v_j . do_t)
  gained_product<Vec>(b.v_lanes, c.V, b.do_lanes, c.u_decay->lanes, s);
  const Reg gain = Vec::set1(scale);
  for (int64_t n = 0; n < c.Kp; n += T::kRows) {
    T tile;
    tile.clear();
    tile.template accumulate<true>(u + n * c.Vp, c.Vp, c.V, b.do_lanes);
    tile.scale_lanes(c.u_decay->since_start);
    if (inter != nullptr) {
      tile.each([&](int64_t at, int, Reg acc) {
        Vec::store(inter + n * kLanes + at, Vec::mul(gain, acc));
      });
    }
    tile.accumulate(c.k_rows + n, c.Kp, c.n, s);
    tile.each(
        [&](int64_t at, int, Reg acc) { Vec::store(b.dm + n * kLanes + at, Vec::mul(gain, acc)); });
  }
}

// z_t^T H_0 x_t. Where few keys have been seen z and x are long and all but orthogonal to them: the
// product is then a small part of |z| |H_0| |x| and needs float64. Random vectors beside a mature
// state come to about 1 / K of it.
template <class Vec>
void state_products(const BackwardChunk<Vec>& b, const typename Vec::Elem* h,
                    typename Vec::Elem* zh, double* z_h_x) {
  constexpr double kSmallestShare = 1e-3;
  const auto& c = b.c;
  lanes_product<Vec>(h, c.Kp, c.K, c.Kp, b.z, zh);
  lanes_dot<Vec>(zh, b.x, c.K, z_h_x);
  if constexpr (!kHasWider<Vec>) return;
  double x2[kLanes], z2[kLanes], product2 = 0.0, size2 = 0.0;
  lanes_dot<Vec>(b.x, b.x, c.K, x2);
  lanes_dot<Vec>(b.z, b.z, c.K, z2);
  for (int64_t t = 0; t < c.n; ++t) {
    product2 += z_h_x[t] * z_h_x[t];
    size2 += x2[t] * z2[t] * c.start_norm2;
  }
  if (!(product2 < kSmallestShare * kSmallestShare * size2)) return;
  using WideTile = Tile<typename Vec::Wide>;
  alignas(64) double product[WideTile::kRows * kLanes];
  for (int64_t t = 0; t < kLanes; ++t) z_h_x[t] = 0.0;
  for (int64_t n = 0; n < c.Kp; n += WideTile::kRows) {
    WideTile tile;
    tile.clear();
    tile.accumulate(h + n, c.Kp, c.K, b.z);
    tile.store(product);
    for (int64_t i = 0; i < WideTile::kRows * kLanes; ++i) {
      z_h_x[i % kLanes] += product[i] * b.x[n * kLanes + i];
    }
  }
}

// z_t = (H_t + lambda_t I)^{-1} (alpha_t dm_t), and x_t where the forward did not save it.
// `window_chunks`: prepare_solver.
template <class Vec, class S = typename Vec::Elem>
void solve_chunk(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const GkaBackwardJob<S>& job,
                 const S* h, bool h_is_zero, int64_t window_chunks) {
  using Reg = typename Vec::Reg;
  Chunk<S>& c = b.c;
  prepare_solver<Vec>(work.solver, c, job.in, h, h_is_zero, window_chunks, job.count);
  S* rhs = work.out_k;
  for (int64_t i = 0; i < c.Kp; ++i) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
      const Reg d = Vec::load(b.dm + i * kLanes + lane);
      Vec::store(rhs + i * kLanes + lane, Vec::mul(Vec::load(c.alpha + lane), d));
    }
  }
  b.z =
      solve_chunk_system<Vec>(work.solver, c, h, h_is_zero, rhs, b.solve_z[0], b.solve_z[1], true);
  if (job.saved_x.data == nullptr) {
    b.x = solve_chunk_system<Vec>(work.solver, c, h, h_is_zero, c.q_lanes, b.solve_x[0],
                                  b.solve_x[1], true);
  }
}

// The same for a sequence's first tokens, in float64 (gka_forward.hpp says why): dm, x and z, and
// their products, before they are rounded. The solve reads no H_0 and is cheap.
template <class Vec, class S = typename Vec::Elem>
void solve_first_chunk(BackwardChunk<Vec>& b, BackwardWork<Vec>& work,
                       const GkaBackwardJob<S>& job) {
  using Wide = typename Vec::Wide;
  Chunk<S>& c = b.c;
  prepare_solver<Wide>(work.wide_solver, c, job.in, static_cast<const S*>(nullptr), true, 1,
                       job.count);
  double* const dm = work.wide[0];
  double* const rhs = work.wide[1];
  // dm again, in float64: what token j <= t adds is N_tj (v_j . do_t) k_j.
  alignas(64) double s[kLanes * kLanes];
  alignas(64) double d_o[kMaxHeadDim * kLanes];
  for (int64_t i = 0; i < c.Vp * kLanes; ++i) d_o[i] = b.do_lanes[i];
  gained_product<Wide>(b.v_lanes, c.V, d_o, c.u_decay->lanes, s);
  for (int64_t n = 0; n < c.Kp; n += Tile<Wide>::kRows) {
    Tile<Wide> tile;
    tile.clear();
    tile.template accumulate<true>(job.start.u + n * c.Vp, c.Vp, c.V, d_o);
    tile.scale_lanes(c.u_decay->since_start);
    tile.accumulate(c.k_rows + n, c.Kp, c.n, s);
    tile.store(dm + n * kLanes);
  }
  for (int64_t i = 0; i < c.Kp; ++i) {
    for (int64_t t = 0; t < kLanes; ++t) {
      const int64_t at = i * kLanes + t;
      dm[at] *= job.in.scale;
      rhs[at] = c.alpha[t] * dm[at];
      b.dm[at] = static_cast<S>(dm[at]);
    }
  }
  const S* const no_state = nullptr;
  const double* z = solve_chunk_system<Wide>(work.wide_solver, c, no_state, true, rhs, work.wide[2],
                                             work.wide[3], true);
  double* const other = z == work.wide[2] ? work.wide[3] : work.wide[2];
  const double* x =
      solve_chunk_system<Wide>(work.wide_solver, c, no_state, true, c.q_lanes, other, rhs, true);
  b.z = b.solve_z[0];
  b.x = b.solve_x[0];
  for (int64_t i = 0; i < c.Kp * kLanes; ++i) {
    b.z[i] = static_cast<S>(z[i]);
    b.x[i] = static_cast<S>(x[i]);
  }
  lanes_dot<Vec>(z, x, c.K, b.z_dot_x);
  lanes_dot<Vec>(dm, x, c.K, b.dm_dot_x);
}

}  // namespace kalmanet::cpu
