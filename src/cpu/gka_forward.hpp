// The chunked forward of one head, and the scan that carries its states alone.
#pragma once

#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"
#include "cpu/solver.hpp"

namespace kalmanet::cpu {

// m_t = q_t + alpha_t (x_t - q_t), in lanes.
template <class Vec>
void mix(const Chunk& c, const typename Vec::Elem* x, typename Vec::Elem* m) {
  using Reg = typename Vec::Reg;
  for (int64_t i = 0; i < c.Kp; ++i) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
      const int64_t at = i * kLanes + lane;
      const Reg q = Vec::load_f32(c.q_lanes + at);
      const Reg alpha = Vec::load_f32(c.alpha + lane);
      Vec::store(m + at, Vec::fma(alpha, Vec::sub(Vec::load(x + at), q), q));
    }
  }
}

// o_t = scale ( e^{Gamma_t} U_0^T m_t + sum_{j<=t} N_tj v_j (k_j . m_t) ), in lanes [Vp][t].
template <class Vec>
void read_out(const Chunk& c, const float* u, const typename Vec::Elem* m, double scale, float* o) {
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
      Vec::store_f32(o + n * kLanes + offset, Vec::mul(gain, acc));
    });
  }
}

// Buffers of the solver and of what is made of its solution, in one precision.
template <class Elem>
struct SolveBuffers {
  Elem *a, *b, *m;
};

template <class Elem>
SolveBuffers<Elem> take_solve_buffers(Arena& arena, int64_t Kp) {
  constexpr int64_t kFloats = sizeof(Elem) / sizeof(float);
  const auto take = [&] { return reinterpret_cast<Elem*>(arena.take(kFloats * Kp * kLanes)); };
  return {take(), take(), take()};
}

// x (float32 lanes [Kp][t]) and o (lanes [Vp][t]) of a chunk; returns x.
template <class Vec>
const float* solve_and_read(const Chunk& c, const HeadInputs& in, const StateBuffers& state,
                            bool h_is_zero, const ChunkSolver<Vec>& solver,
                            const SolveBuffers<typename Vec::Elem>& buffers, float* x_narrow,
                            float* o) {
  using Elem = typename Vec::Elem;
  const Elem* x = solve_chunk_system<Vec>(solver, c, state.h, h_is_zero, c.q_lanes, buffers.a,
                                          buffers.b, false);
  mix<Vec>(c, x, buffers.m);
  read_out<Vec>(c, state.u, buffers.m, in.scale, o);
  if constexpr (sizeof(Elem) == sizeof(float)) {
    return x;
  } else {
    for (int64_t i = 0; i < c.Kp * kLanes; ++i) x_narrow[i] = static_cast<float>(x[i]);
    return x_narrow;
  }
}

// How much larger than its own rounding float32 makes the error of o. While few keys have been seen
// x is large (up to q / lambda) where H and U are nearly zero, and the small part of x that U reads
// is lost beside it: the error of o is about eps |x| |U|_F / sqrt(K), in units of |o|. So a
// sequence's first chunk is computed in float64 (without a state before it that costs less than a
// later chunk in float32), and so is any other in which this amplification is above
// kLargestAmplification. Measured with 20: errors of o below 1e-5 at ridges from 0.005 up, for
// random keys and for correlations up to 0.99.
inline constexpr double kLargestAmplification = 20.0;

template <class Vec>
double amplification(const Chunk& c, const HeadInputs& in, const float* u, const float* x,
                     const float* o) {
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
void gka_forward_segment(const GkaForwardJob& job) {
  using Wide = typename Vec::Wide;
  const HeadInputs& in = job.in;
  Arena arena(job.scratch);
  Chunk c;
  carve_chunk<Vec>(c, in, arena);
  const auto narrow = take_solve_buffers<float>(arena, c.Kp);
  const auto wide = take_solve_buffers<double>(arena, c.Kp);
  float* const o = arena.take(c.Vp * kLanes);
  ChunkSolver<Vec> solver;
  ChunkSolver<Wide> wide_solver;
  carve_solver<Vec>(solver, in, kBlockChunks, arena);
  carve_solver<Wide>(wide_solver, in, 1, arena);
  int64_t window_chunks = kBlockChunks;  // from this chunk to its window's end
  bool h_is_zero = job.h_is_zero;
  for (int64_t t0 = job.begin; t0 < job.end; t0 += job.chunk_size) {
    const int64_t n = job.end - t0 < job.chunk_size ? job.end - t0 : job.chunk_size;
    load_chunk<Vec>(c, in, t0, n);
    bool ill = job.starts_sequence && t0 == job.begin;
    const float* x = nullptr;
    SolverCount* count = job.count;
    if (!ill) {
      ridge_norms<Vec>(c, job.state.h, h_is_zero, narrow.m);
      prepare_solver<Vec>(solver, c, in, job.state.h, h_is_zero, window_chunks, count);
      count = nullptr;
      x = solve_and_read<Vec>(c, in, job.state, h_is_zero, solver, narrow, nullptr, o);
      ill = amplification<Vec>(c, in, job.state.u, x, o) > kLargestAmplification;
    }
    if (ill) {
      ridge_norms<Wide>(c, job.state.h, h_is_zero, narrow.m);
      prepare_solver<Wide>(wide_solver, c, in, job.state.h, h_is_zero, 1, count);
      x = solve_and_read<Wide>(c, in, job.state, h_is_zero, wide_solver, wide, narrow.a, o);
    }
    window_chunks = window_chunks == 1 ? kBlockChunks : window_chunks - 1;
    if (job.residual.data != nullptr) {
      float r[kLanes];
      relative_residual<Vec>(c, job.state.h, h_is_zero, c.q_lanes, x, r);
      for (int64_t t = 0; t < n; ++t) job.residual.data[(t0 + t) * job.residual.stride] = r[t];
    }
    if (job.x.data != nullptr) store_lanes<Vec>(x, nullptr, job.x, t0, n, c.K);
    store_lanes<Vec>(o, nullptr, job.o, t0, n, c.V);
    advance_h<Vec>(c, job.state.h, narrow.m);
    advance_u<Vec>(c, job.state.u, narrow.m);
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
