// Decode of one head, token by token: update the states, solve, read out. Every token touches each
// state once for the update and H once an iteration; both live in the second-level cache meanwhile.
#pragma once

#include <cmath>

#include "cpu/chunk.hpp"
#include "cpu/gka_forward.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"
#include "cpu/step_solver.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

// H <- decay H + k k^T; returns |H|_F^2.
template <class Vec, class S>
double update_h(S* h, int64_t ld, int64_t K, int64_t Kp, S decay, const S* k) {
  using Reg = typename Vec::Reg;
  const Reg d = Vec::set1(decay);
  double norm2 = 0.0;
  for (int64_t c = 0; c < K; ++c) {
    const Reg kc = Vec::set1(k[c]);
    S* row = h + c * ld;
    for (int64_t n = 0; n < Kp; n += Vec::kWidth) {
      Vec::store(row + n, Vec::fma(kc, Vec::load(k + n), Vec::mul(d, Vec::load(row + n))));
    }
  }
  norm2 = squared_norm<Vec>(h, ld, K, Kp);
  return norm2;
}

// U <- decay U + k v^T
template <class Vec, class S>
void update_u(S* u, int64_t ld, int64_t K, int64_t Vp, S decay, const S* k, const S* v) {
  using Reg = typename Vec::Reg;
  const Reg d = Vec::set1(decay);
  for (int64_t c = 0; c < K; ++c) {
    const Reg kc = Vec::set1(k[c]);
    S* row = u + c * ld;
    for (int64_t n = 0; n < Vp; n += Vec::kWidth) {
      Vec::store(row + n, Vec::fma(kc, Vec::load(v + n), Vec::mul(d, Vec::load(row + n))));
    }
  }
}

template <class Vec, class S>
void load_vector(const Rows& src, int64_t t, int64_t width, S gain, S* out) {
  S room[kMaxHeadDim];
  const RowOf<S> p = read_row<Vec>(src, t, width, room);
  for (int64_t c = 0; c < width; ++c) out[c] = gain * p.data[c * p.stride];
  for (int64_t c = width; c < padded(width); ++c) out[c] = 0;
}
template <class Vec, class S>
void store_vector(const S* in, const OutRows& dst, int64_t t, int64_t width) {
  if (!holds<S>(dst)) {
    write_row<Vec>(dst, t, width, in);
    return;
  }
  S* p = row_of<S>(dst, t);
  for (int64_t c = 0; c < width; ++c) p[c * dst.stride] = in[c];
}
template <class Vec>
double gate_at(const Column& gate, int64_t t) {
  using S = typename Vec::Elem;
  return gate.data == nullptr ? 1.0 : std::exp(static_cast<double>(value_at<S>(gate, t, 0)));
}

// x of one token and o = scale U^T (q + alpha (x - q)); x is all zeros where f counts as zero.
template <class Vec, class S>
void solve_and_read_step(const StepToken<S>& token, const GkaStepJob<S>& job,
                         const SolveBuffers<typename Vec::Elem>& buffers,
                         const StepWork<typename Vec::Elem>& work, S* x_out, S* o) {
  using Elem = typename Vec::Elem;
  const int64_t K = job.in.K, Kp = padded(K), Vp = padded(job.in.V);
  const Elem* x = buffers.a;
  if (token.f == 0.0) {
    for (int64_t c = 0; c < Kp; ++c) buffers.a[c] = 0;
  } else {
    x = solve_step<Vec>(token, job.state.h, job.h_stride, K, Kp, work, buffers.a, buffers.b);
  }
  for (int64_t c = 0; c < Kp; ++c) {
    const Elem q = token.q[c];
    buffers.m[c] =
        static_cast<Elem>(token.scale) * (q + static_cast<Elem>(token.alpha) * (x[c] - q));
    x_out[c] = static_cast<S>(x[c]);
  }
  row_combination<Vec>(job.state.u, job.u_stride, K, Vp, buffers.m,
                       [&](int64_t n, typename Vec::Reg a) { store_as<Vec>(o + n, a); });
}

// amplification() of gka_forward.hpp for one token. The step's states are rounded every token and
// its first tokens have none with them that would average the errors: with 5, outputs stay within
// 1e-5 down to ridge 0.005 from the first token on, and of 2000 tokens (K = 64 and 128, keys with
// correlations 0 to 0.9) the first 15 to 51 are computed in float64 at ridge 0.02, the first 36 to
// 119 at 0.005.
inline constexpr double kLargestStepAmplification = 5.0;

template <class Vec, class S>
double step_amplification(const StepToken<S>& token, const GkaStepJob<S>& job, double u_norm2,
                          const S* x, const S* o) {
  double x2 = 0.0, o2 = 0.0;
  for (int64_t c = 0; c < job.in.K; ++c) x2 += static_cast<double>(x[c]) * x[c];
  for (int64_t c = 0; c < job.in.V; ++c) o2 += static_cast<double>(o[c]) * o[c];
  const double weight = token.alpha * token.scale;
  const double scaled = weight * weight * x2 * u_norm2 / static_cast<double>(job.in.K);
  return o2 > 0.0 ? std::sqrt(scaled / o2) : 0.0;
}

// In float64: the residual of a good solution is the small difference of large numbers.
template <class Vec, class S>
double residual_of_step(const StepToken<S>& token, const GkaStepJob<S>& job, const S* x,
                        double* wide_x) {
  using Wide = typename Vec::Wide;
  using Reg = typename Wide::Reg;
  const int64_t K = job.in.K, Kp = padded(K);
  const Reg lam = Wide::set1(token.ridge * token.f);
  double r2 = 0.0, q2 = 0.0;
  alignas(64) double r[Wide::kWidth];
  for (int64_t c = 0; c < Kp; ++c) wide_x[c] = x[c];
  row_combination<Wide>(job.state.h, job.h_stride, K, Kp, wide_x, [&](int64_t n, Reg hx) {
    Wide::store(r,
                Wide::sub(Wide::fma(lam, Wide::load(wide_x + n), hx), load_as<Wide>(token.q + n)));
    for (int i = 0; i < Wide::kWidth; ++i) r2 += r[i] * r[i];
  });
  for (int64_t c = 0; c < K; ++c) q2 += static_cast<double>(token.q[c]) * token.q[c];
  return token.f == 0.0 || q2 == 0.0 ? 0.0 : std::sqrt(r2 / q2);
}

template <class Vec, class S>
void count_step(const StepToken<S>& token, SolverCount* count) {
  if (count == nullptr) return;
  if (count->chunks == 0 || token.num_iter < count->min) count->min = token.num_iter;
  if (token.num_iter > count->max) count->max = token.num_iter;
  ++count->chunks;
  count->direct_chunks += token.solver == Solver::direct;
  count->factorizations += token.solver == Solver::direct;
}

template <class Vec>
void gka_step_head(const GkaStepJob<typename Vec::Elem>& job) {
  using S = typename Vec::Elem;
  const HeadInputs& in = job.in;
  const int64_t Kp = padded(in.K), Vp = padded(in.V);
  Arena<S> arena(job.scratch);
  S* const q = arena.take(Kp);
  S* const k = arena.take(Kp);
  S* const v = arena.take(Vp);
  S* const o = arena.take(Vp);
  const auto narrow = take_solve_buffers<S>(arena, Kp);
  const auto wide = take_solve_buffers<double>(arena, Kp);
  const auto work = take_step_work<S>(arena, Kp, in.solver);
  StepWork<double> wide_work;
  if constexpr (kHasWider<Vec>) wide_work = take_step_work<double>(arena, Kp, in.solver);
  for (int64_t t = job.begin; t < job.end; ++t) {
    const S beta = value_at<S>(in.beta, t, 1);
    StepToken<S> token;
    token.q = q;
    token.alpha = value_at<S>(in.alpha, t, 1);
    token.ridge = in.ridge.data == nullptr ? in.ridge_ratio
                                           : static_cast<double>(value_at<S>(in.ridge, t, 0));
    token.scale = in.scale;
    choose_step_solver<Vec>(token, in);
    count_step<Vec>(token, job.count);
    load_vector<Vec>(in.q, t, in.K, S{1}, q);
    load_vector<Vec>(in.k, t, in.K, beta, k);
    load_vector<Vec>(in.v, t, in.V, beta, v);
    const auto h_decay = static_cast<S>(gate_at<Vec>(in.gk, t));
    const auto u_decay = static_cast<S>(gate_at<Vec>(in.g, t));
    token.f = std::sqrt(update_h<Vec>(job.state.h, job.h_stride, in.K, Kp, h_decay, k));
    if (token.f <= kVanishedNorm) token.f = 0.0;
    update_u<Vec>(job.state.u, job.u_stride, in.K, Vp, u_decay, k, v);
    S* const x = narrow.b;  // the float64 pass and the stores read x from here
    solve_and_read_step<Vec>(token, job, narrow, work, x, o);
    if constexpr (kHasWider<Vec>) {
      const double u_norm2 = squared_norm<Vec>(job.state.u, job.u_stride, in.K, Vp);
      if (step_amplification<Vec>(token, job, u_norm2, x, o) > kLargestStepAmplification) {
        solve_and_read_step<typename Vec::Wide>(token, job, wide, wide_work, x, o);
      }
    }
    if (job.residual.data != nullptr) {
      set_value<S>(job.residual, t, residual_of_step<Vec>(token, job, x, wide.a));
    }
    if (job.x.data != nullptr) store_vector<Vec>(x, job.x, t, in.K);
    store_vector<Vec>(o, job.o, t, in.V);
  }
}

}  // namespace kalmanet::cpu
