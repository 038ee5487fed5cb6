// The chunked forward of one head, and the scan that carries its states alone.
#pragma once

#include <type_traits>

#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"
#include "cpu/solver.hpp"

namespace kalmanet::cpu {

// m_t = q_t + alpha_t (x_t - q_t), in lanes.
template <class Vec, class S>
void mix(const Chunk<S>& c, const typename Vec::Elem* x, typename Vec::Elem* m) {
  using Reg = typename Vec::Reg;
  for (int64_t i = 0; i < c.Kp; ++i) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
      const int64_t at = i * kLanes + lane;
      const Reg q = load_as<Vec>(c.q_lanes + at);
      const Reg alpha = load_as<Vec>(c.alpha + lane);
      Vec::store(m + at, Vec::fma(alpha, Vec::sub(Vec::load(x + at), q), q));
    }
  }
}

// o_t = scale ( e^{Gamma_t} U_0^T m_t + sum_{j<=t} N_tj v_j (k_j . m_t) ), in lanes [Vp][t].
template <class Vec, class S>
void read_out(const Chunk<S>& c, const S* u, const typename Vec::Elem* m, double scale, S* o) {
  using T = Tile<Vec>;
  using Reg = typename Vec::Reg;
  using Elem = typename Vec::Elem;
  alignas(64) Elem s[kLanes * kLanes];
  gained_product<Vec>(c.k_lanes, c.K, m, c.u_decay->lanes, s);
  const Reg gain = Vec::set1(static_cast<Elem>(scale));
  for (int64_t n = 0; n < c.Vp; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(u + n, c.Vp, c.K, m);
    tile.scale_lanes(c.u_decay->since_start);
    tile.accumulate(c.v_rows + n, c.Vp, c.n, s);
    tile.each([&](int64_t offset, int, Reg acc) {
      store_as<Vec>(o + n * kLanes + offset, Vec::mul(gain, acc));
    });
  }
}

// Buffers of the solver and of what is made of its solution, in one precision.
template <class Elem>
struct SolveBuffers {
  Elem *a, *b, *m;
};

template <class Elem, class S>
KALMANET_INLINE SolveBuffers<Elem> take_solve_buffers(Arena<S>& arena, int64_t count) {
  constexpr int64_t kEach = sizeof(Elem) / sizeof(S);
  const auto take = [&] { return reinterpret_cast<Elem*>(arena.take(kEach * count)); };
  return {take(), take(), take()};
}

// x (lanes [Kp][t] in the storage type) and o (lanes [Vp][t]) of a chunk; returns x.
template <class Vec, class S>
const S* solve_and_read(const Chunk<S>& c, const HeadInputs& in, const StateBuffers<S>& state,
                        bool h_is_zero, const ChunkSolver<Vec>& solver,
                        const SolveBuffers<typename Vec::Elem>& buffers,
                        std::type_identity_t<S>* x_narrow, S* o) {
  using Elem = typename Vec::Elem;
  const Elem* x = solve_chunk_system<Vec>(solver, c, state.h, h_is_zero, c.q_lanes, buffers.a,
                                          buffers.b, false);
  mix<Vec>(c, x, buffers.m);
  read_out<Vec>(c, state.u, buffers.m, in.scale, o);
  if constexpr (sizeof(Elem) == sizeof(S)) {
    return x;
  } else {
    for (int64_t i = 0; i < c.Kp * kLanes; ++i) x_narrow[i] = static_cast<S>(x[i]);
    return x_narrow;
  }
}

// How much larger than its own rounding float32 makes the error of o. While few keys have been seen
// x is large (up to q / lambda) where H and U are nearly zero, and the small part of x that U reads
// is lost beside it: the error of o is about eps |x| |U|_F / sqrt(K), in units of |o|. So a
// sequence's first chunk is computed in float64 (without a state before it that costs less than a
// later chunk in float32), and so is any other in which this amplification is above
// kLargestAmplification. The float64 kernels have nothing wider and
// need nothing. Measured with 20: errors of o below 1e-5 at ridges from 0.005 up, for
// random keys and for correlations up to 0.99.
inline constexpr double kLargestAmplification = 20.0;

template <class Vec, class S>
double amplification(const Chunk<S>& c, const HeadInputs& in, const S* u, const S* x, const S* o) {
  double x2[kLanes], o2[kLanes];
  lanes_dot<Vec>(x, x, c.K, x2);
  lanes_dot<Vec>(o, o, c.V, o2);
  double x_sum = 0.0, o_sum = 0.0;
  for (int64_t t = 0; t < c.n; ++t) {
    x_sum += static_cast<double>(c.alpha[t]) * c.alpha[t] * x2[t];
    o_sum += o2[t];
  }
  const double u_norm2 = squared_norm<Vec>(u, c.Vp, c.K, c.Vp);
  const double scaled = in.scale * in.scale * x_sum * u_norm2 / static_cast<double>(c.K);
  return o_sum > 0.0 ? std::sqrt(scaled / o_sum) : 0.0;
}

template <class Vec>
void gka_forward_segment(const GkaForwardJob<typename Vec::Elem>& job) {
  using S = typename Vec::Elem;
  using Wide = typename Vec::Wide;
  const HeadInputs& in = job.in;
  Arena<S> arena(job.scratch);
  Chunk<S> c;
  carve_chunk<Vec>(c, in, arena);
  const auto narrow = take_solve_buffers<S>(arena, c.Kp * kLanes);
  SolveBuffers<double> wide{};
  if constexpr (kHasWider<Vec>) wide = take_solve_buffers<double>(arena, c.Kp * kLanes);
  S* const o = arena.take(c.Vp * kLanes);
  ChunkSolver<Vec> solver;
  carve_solver<Vec>(solver, in, kBlockChunks, arena);
  ChunkSolver<Wide> wide_solver;
  if constexpr (kHasWider<Vec>) carve_solver<Wide>(wide_solver, in, 1, arena);
  int64_t window_chunks = kBlockChunks;  // from this chunk to its window's end
  bool h_is_zero = job.h_is_zero;
  for (int64_t t0 = job.begin; t0 < job.end; t0 += job.chunk_size) {
    const int64_t n = job.end - t0 < job.chunk_size ? job.end - t0 : job.chunk_size;
    load_chunk<Vec>(c, in, t0, n);
    bool ill = kHasWider<Vec> && job.starts_sequence && t0 == job.begin;
    SolverCount* count = job.count;
    const S* x = nullptr;
    if (!ill) {
      ridge_norms<Vec>(c, job.state.h, h_is_zero, narrow.m);
      prepare_solver<Vec>(solver, c, in, job.state.h, h_is_zero, window_chunks, count);
      count = nullptr;  // a second solution is not counted
      x = solve_and_read<Vec>(c, in, job.state, h_is_zero, solver, narrow, nullptr, o);
      if constexpr (kHasWider<Vec>) {
        ill = amplification<Vec>(c, in, job.state.u, x, o) > kLargestAmplification;
      }
    }
    if constexpr (kHasWider<Vec>) {
      if (ill) {
        ridge_norms<Wide>(c, job.state.h, h_is_zero, narrow.m);
        if (solver.bf16 != nullptr && count == nullptr && job.count != nullptr) {
          --job.count->bf16_chunks;  // what it solved is discarded
        }
        prepare_solver<Wide>(wide_solver, c, in, job.state.h, h_is_zero, 1, count);
        x = solve_and_read<Wide>(c, in, job.state, h_is_zero, wide_solver, wide, narrow.a, o);
      }
    }
    window_chunks = window_chunks == 1 ? kBlockChunks : window_chunks - 1;
    if (job.residual.data != nullptr) {
      double r[kLanes];
      relative_residual<Vec>(c, job.state.h, h_is_zero, c.q_lanes, x, r);
      for (int64_t t = 0; t < n; ++t) set_value<S>(job.residual, t0 + t, r[t]);
    }
    if (job.x.data != nullptr) store_lanes<Vec>(x, nullptr, job.x, t0, n, c.K);
    store_lanes<Vec>(o, nullptr, job.o, t0, n, c.V);
    advance_h<Vec>(c, job.state.h, job.state.h, narrow.m);
    advance_u<Vec>(c, job.state.u, job.state.u, narrow.m);
    if (job.segment_states.data != nullptr && (t0 + n - job.sequence_begin) % kSegmentTokens == 0) {
      S* const to = job.segment_states.at(t0 + n);
      const int64_t h_floats = c.Kp * c.Kp, u_floats = c.Kp * c.Vp;
      for (int64_t i = 0; i < h_floats; ++i) to[i] = job.state.h[i];
      for (int64_t i = 0; i < u_floats; ++i) to[h_floats + i] = job.state.u[i];
    }
    h_is_zero = false;
  }
}

template <class Vec>
void gka_scan_states(const GkaScanJob<typename Vec::Elem>& job) {
  using S = typename Vec::Elem;
  Arena<S> arena(job.scratch);
  Chunk<S> c;
  carve_chunk<Vec>(c, job.in, arena);
  S* const weighted = arena.take(c.Kp * kLanes);
  const bool h = job.state.h != nullptr;
  const bool u = job.state.u != nullptr;
  for (int64_t t0 = job.begin; t0 < job.end; t0 += job.chunk_size) {
    const int64_t n = job.end - t0 < job.chunk_size ? job.end - t0 : job.chunk_size;
    load_chunk_for_states<Vec>(c, job.in, t0, n, h, u);
    if (h) advance_h<Vec>(c, job.state.h, job.state.h, weighted);
    if (u) advance_u<Vec>(c, job.state.u, job.state.u, weighted);
  }
}

}  // namespace kalmanet::cpu
