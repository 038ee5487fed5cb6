// The chunked backward of one head: for each chunk, last first, the adjoint solve z and every
// gradient.
//
// Written for a chunk that starts from H_0, U_0 and receives D, E, the gradients of the states
// after it (docs/math.md, "Chunked backward"); w_t = (z_t . x_t) a_t / f_t, h_t = sum_{i>=t} M_it
// w_i e^{G_i}, P = M^T diag(w) M:
//
//   dm_t = scale ( e^{Gamma_t} U_0 do_t + sum_{j<=t} N_tj k_j (v_j . do_t) )
//   dv_t = e^{Gamma_C-Gamma_t} E^T k_t + scale sum_{i>=t} N_it do_i (m_i . k_t)
//   dk_t = e^{Gamma_C-Gamma_t} E v_t + scale sum_{i>=t} N_it m_i (do_i . v_t)
//        + e^{G_C-G_t} (D + D^T) k_t - 2 h_t H_0 k_t - 2 sum_j P_tj k_j (k_j . k_t)
//        - sum_{i>=t} M_it ( z_i (x_i . k_t) + x_i (z_i . k_t) )
//   E <- e^{Gamma_C} E + scale sum_i e^{Gamma_i} m_i do_i^T
//   D <- e^{G_C} D - sum_i e^{G_i} z_i x_i^T - (sum_i w_i e^{2G_i}) H_0 - sum_j h_j k_j k_j^T
#pragma once

#include "cpu/gka_backward_gradients.hpp"
#include "cpu/gka_backward_solve.hpp"
#include "cpu/gka_forward.hpp"

namespace kalmanet::cpu {

// z, and x where the forward did not save it, as solve_only left them.
template <class Vec, class S = typename Vec::Elem>
void load_solutions(BackwardChunk<Vec>& b, const GkaBackwardJob<S>& job) {
  const auto load = [&](const OutRows& from, S* to) {
    load_lanes<Vec>(Rows{from.data, from.dtype, from.token_stride, from.stride}, b.c.t0, b.c.n,
                    b.c.K, to);
    return to;
  };
  b.z = load(job.z_rows, b.solve_z[0]);
  if (job.saved_x.data == nullptr) b.x = load(job.x_rows, b.solve_x[0]);
}

// Tokens of a segment that a chunk has, and where its window ends (prepare_solver).
struct ChunkPlace {
  int64_t t0, n;
  int64_t window_chunks;
};

template <class Vec, class S = typename Vec::Elem>
void backward_chunk(BackwardChunk<Vec>& b, const GkaBackwardJob<S>& job,
                    typename GkaBackwardJob<S>::Phase phase, const StateBuffers<S>& start,
                    bool h_is_zero, const ChunkPlace& place) {
  Chunk<S>& c = b.c;
  const int64_t t0 = place.t0, n = place.n;
  const S scale = static_cast<S>(job.in.scale);
  const bool gradients = phase != GkaBackwardJob<S>::solve_only;
  load_chunk<Vec>(c, job.in, t0, n);
  if (h_is_zero) {
    ridge_norms<typename Vec::Wide>(c, start.h, h_is_zero, b.hk);
  } else {
    ridge_norms<Vec>(c, start.h, h_is_zero, b.hk);
  }
  rows_to_lanes<Vec>(c.v_rows, c.Vp, b.v_lanes);
  load_lanes<Vec>(job.d_o, t0, n, c.V, b.do_lanes);
  const bool want_inter = gradients && job.dg.data != nullptr;
  S* const inter = want_inter ? b.stack_rows : nullptr;  // free until the rows are stacked
  gradient_of_mix<Vec>(b, start.u, scale, inter);
  if (kHasWider<Vec> && h_is_zero) {
    if (!gradients) return;  // cheaper to solve again than to store in float64
    if constexpr (kHasWider<Vec>) solve_first_chunk<Vec>(b, job);
  } else {
    if (job.saved_x.data != nullptr) {
      b.x = b.solve_x[0];
      load_lanes<Vec>(job.saved_x, t0, n, c.K, b.x);
    }
    if (phase == GkaBackwardJob<S>::gradients_only) {
      load_solutions<Vec>(b, job);
    } else {
      solve_chunk<Vec>(b, job, start.h, h_is_zero, place.window_chunks);
    }
    if (!gradients) {
      store_lanes<Vec, S>(b.z, nullptr, job.z_rows, t0, n, c.K);
      if (job.saved_x.data == nullptr) {
        store_lanes<Vec, S>(b.x, nullptr, job.x_rows, t0, n, c.K);
      }
      return;
    }
    lanes_dot<Vec>(b.z, b.x, c.K, b.z_dot_x);
    lanes_dot<Vec>(b.dm, b.x, c.K, b.dm_dot_x);
  }
  mix<Vec>(c, b.x, b.m);
  if (want_inter) lanes_dot<Vec>(inter, b.m, c.K, b.dm_inter_dot_m);
  const int64_t rows = kLanes * c.Kp;
  lanes_to_rows<Vec>(b.m, c.Kp, b.stack_rows);
  lanes_to_rows<Vec>(b.z, c.Kp, b.stack_rows + rows);
  lanes_to_rows<Vec>(b.x, c.Kp, b.stack_rows + 2 * rows);
  lanes_to_rows<Vec>(c.k_lanes, c.Kp, b.stack_rows + 3 * rows);
  lanes_to_rows<Vec>(b.do_lanes, c.Vp, b.do_rows);
  ridge_gradient<Vec>(b, job);
  pair_products<Vec>(b, scale);
  gradient_of_values<Vec>(b, job.carry.u);
  gradient_of_keys<Vec>(b, job.carry.h, job.carry.u, h_is_zero, scale);
  // The solver's second buffer is free by now, whichever holds z.
  S* free_lanes = b.z == b.solve_z[0] ? b.solve_z[1] : b.solve_z[0];
  gradient_of_gates<Vec>(b, job, start, h_is_zero, free_lanes);
  carry_gradients<Vec>(b, job, start.h, h_is_zero, scale);
  store_gradients<Vec>(b, job);
}

template <class Vec>
void gka_backward_segment(const GkaBackwardJob<typename Vec::Elem>& job) {
  using S = typename Vec::Elem;
  Arena<S> arena(job.scratch);
  BackwardChunk<Vec> b;
  carve_backward<Vec>(b, job.in, arena);
  const int64_t K = job.in.K, V = job.in.V;
  const int64_t h_floats = padded(K) * padded(K);
  const int64_t u_floats = padded(K) * padded(V);
  const int64_t chunks = (job.end - job.begin + job.chunk_size - 1) / job.chunk_size;
  auto state_of = [&](int64_t chunk) {
    if (chunk == 0) return job.start;
    S* at = job.chunk_states + (chunk - 1) * (h_floats + u_floats);
    return StateBuffers<S>{at, at + h_floats};
  };
  // First forwards: the states before each chunk, by the forward's own arithmetic.
  for (int64_t i = 0; i + 1 < chunks; ++i) {
    const StateBuffers<S> from = state_of(i), to = state_of(i + 1);
    for (int64_t n = 0; n < h_floats; ++n) to.h[n] = from.h[n];
    for (int64_t n = 0; n < u_floats; ++n) to.u[n] = from.u[n];
    load_chunk_for_states<Vec>(b.c, job.in, job.begin + i * job.chunk_size, job.chunk_size, true,
                               true);
    advance_h<Vec>(b.c, to.h, b.m);
    advance_u<Vec>(b.c, to.u, b.m);
  }
  const auto run = [&](int64_t i, typename GkaBackwardJob<S>::Phase phase) {
    const int64_t t0 = job.begin + i * job.chunk_size;
    const int64_t n = job.end - t0 < job.chunk_size ? job.end - t0 : job.chunk_size;
    const ChunkPlace place{t0, n, kBlockChunks - i % kBlockChunks};
    backward_chunk<Vec>(b, job, phase, state_of(i), job.h_is_zero && i == 0, place);
  };
  // The direct solver's blocks grow forwards, so its solves come before the first gradient.
  auto phase = job.phase;
  const bool ahead = phase == GkaBackwardJob<S>::solve_only ||
                     (phase == GkaBackwardJob<S>::both && solves_ahead(job.in.solver));
  if (ahead) {
    for (int64_t i = 0; i < chunks; ++i) run(i, GkaBackwardJob<S>::solve_only);
    if (phase == GkaBackwardJob<S>::solve_only) return;
    phase = GkaBackwardJob<S>::gradients_only;
  }
  // Then the gradients, last chunk first.
  for (int64_t i = chunks - 1; i >= 0; --i) run(i, phase);
}

}  // namespace kalmanet::cpu
