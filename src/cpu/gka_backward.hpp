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
//
// D's part along H is carried as a number, D = D' + omega H: so no update has to read H_0. With
// omega of the chunk's end, H_C = e^{G_C} H_0 + sum_j e^{G_C-G_j} k_j k_j^T adds
//   -omega e^{G_C} e^{G_C-G_t} to h_t      -omega e^{G_C-G_t} e^{G_C-G_j} to P_tj
// and omega <- omega e^{2G_C} - sum_i w_i e^{2G_i}.
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
  bool h_is_zero;  // the state before it
};

// All that comes before the gradients: the chunk, its norms, dm, x and z.
template <class Vec, class S = typename Vec::Elem>
void backward_solve(BackwardChunk<Vec>& b, BackwardWork<Vec>& work, const GkaBackwardJob<S>& job,
                    const StateBuffers<S>& start, const ChunkPlace& place) {
  Chunk<S>& c = b.c;
  const int64_t t0 = place.t0, n = place.n;
  for (double& product : b.z_h_x) product = 0.0;
  load_chunk<Vec>(c, job.in, t0, n);
  if (place.h_is_zero) {
    ridge_norms<typename Vec::Wide>(c, start.h, true, b.hk);
  } else {
    ridge_norms<Vec>(c, start.h, false, b.hk);
  }
  rows_to_lanes<Vec>(c.v_rows, c.Vp, b.v_lanes);
  load_lanes<Vec>(job.d_o, t0, n, c.V, b.do_lanes);
  const bool want_inter = job.phase != GkaBackwardJob<S>::solve_only && job.dg.data != nullptr;
  gradient_of_mix<Vec>(b, start.u, static_cast<S>(job.in.scale), want_inter ? b.inter : nullptr);
  if (kHasWider<Vec> && place.h_is_zero) {
    // A window begins here too, and prepare_solver does not see it: windows come last first, so the
    // block that is active is one of later tokens.
    work.solver.block.active = false;
    // Cheaper to solve again than to keep in float64 from phase to phase.
    if constexpr (kHasWider<Vec>) {
      if (job.phase != GkaBackwardJob<S>::solve_only) solve_first_chunk<Vec>(b, work, job);
    }
    return;
  }
  if (job.saved_x.data != nullptr) {
    b.x = b.solve_x[0];
    load_lanes<Vec>(job.saved_x, t0, n, c.K, b.x);
  }
  if (job.phase == GkaBackwardJob<S>::gradients_only) {
    load_solutions<Vec>(b, job);
  } else {
    solve_chunk<Vec>(b, work, job, start.h, place.h_is_zero, place.window_chunks);
  }
  if (job.phase == GkaBackwardJob<S>::solve_only) {
    store_lanes<Vec>(b.z, nullptr, job.z_rows, t0, n, c.K);
    if (job.saved_x.data == nullptr) store_lanes<Vec>(b.x, nullptr, job.x_rows, t0, n, c.K);
    return;
  }
  lanes_dot<Vec>(b.z, b.x, c.K, b.z_dot_x);
  lanes_dot<Vec>(b.dm, b.x, c.K, b.dm_dot_x);
  // While the caches hold H_0; the right-hand side's room is free.
  if (!place.h_is_zero && job.dgk.data != nullptr) {
    state_products<Vec>(b, start.h, work.out_k, b.z_h_x);
  }
}

template <class Vec, class S = typename Vec::Elem>
void backward_gradients(BackwardChunk<Vec>& b, BackwardWork<Vec>& work,
                        const GkaBackwardJob<S>& job, const StateBuffers<S>& start,
                        bool h_is_zero) {
  Chunk<S>& c = b.c;
  const S scale = static_cast<S>(job.in.scale);
  mix<Vec>(c, b.x, work.m);
  if (job.dg.data != nullptr) lanes_dot<Vec>(b.inter, work.m, c.K, work.dm_inter_dot_m);
  const int64_t rows = kLanes * c.Kp;
  lanes_to_rows<Vec>(work.m, c.Kp, work.stack_rows);
  lanes_to_rows<Vec>(b.z, c.Kp, work.stack_rows + rows);
  for (int64_t i = 0; i < rows; ++i) work.stack_rows[2 * rows + i] = c.k_rows[i];
  lanes_to_rows<Vec>(b.x, c.Kp, work.stack_rows + 3 * rows);
  lanes_to_rows<Vec>(b.do_lanes, c.Vp, work.do_rows);
  ridge_gradient<Vec>(b, work, job);
  pair_products<Vec>(b, work, scale);
  gradient_of_values<Vec>(b, work, job.carry.u);
  gradient_of_keys<Vec>(b, work, job.carry.h, job.carry.u, h_is_zero, scale);
  gradient_of_gates<Vec>(b, work, job, start, h_is_zero);
  carry_gradients<Vec>(b, work, job, scale);
  store_gradients<Vec>(b, work, job);
}

template <class Vec>
void gka_backward_segment(const GkaBackwardJob<typename Vec::Elem>& job) {
  using S = typename Vec::Elem;
  Arena<S> arena(job.scratch);
  // The direct solver's blocks grow forwards, so the chunks of a window are solved in order before
  // their gradients.
  BackwardChunk<Vec> window[kBlockChunks];
  const int64_t window_size =
      by_blocks(job.in.solver) && job.phase == GkaBackwardJob<S>::both ? kBlockChunks : 1;
  for (int64_t i = 0; i < window_size; ++i) carve_backward<Vec>(window[i], job.in, arena);
  BackwardWork<Vec> work;
  carve_work<Vec>(work, job.in, arena);
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
    load_chunk_for_states<Vec>(window[0].c, job.in, job.begin + i * job.chunk_size, job.chunk_size,
                               true, true);
    advance_h<Vec>(window[0].c, from.h, to.h, work.m);
    advance_u<Vec>(window[0].c, from.u, to.u, work.m);
  }
  const auto place_of = [&](int64_t i) {
    const int64_t t0 = job.begin + i * job.chunk_size;
    const int64_t n = job.end - t0 < job.chunk_size ? job.end - t0 : job.chunk_size;
    return ChunkPlace{t0, n, kBlockChunks - i % kBlockChunks, job.h_is_zero && i == 0};
  };
  if (job.phase == GkaBackwardJob<S>::solve_only) {
    for (int64_t i = 0; i < chunks; ++i) {
      backward_solve<Vec>(window[0], work, job, state_of(i), place_of(i));
    }
    return;
  }
  // Then the gradients, last chunk first.
  for (int64_t end = chunks; end > 0;) {
    const int64_t begin = (end - 1) / window_size * window_size;
    for (int64_t i = begin; i < end; ++i) {
      backward_solve<Vec>(window[i - begin], work, job, state_of(i), place_of(i));
    }
    for (int64_t i = end - 1; i >= begin; --i) {
      backward_gradients<Vec>(window[i - begin], work, job, state_of(i), job.h_is_zero && i == 0);
    }
    end = begin;
  }
}

}  // namespace kalmanet::cpu
