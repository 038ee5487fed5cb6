// Decode of one head, token by token: update the states, solve, read out. Every token touches each
// state in one pass: H's updates it, packs it for the solver (packed_symmetric.hpp) and sums its
// norm; U's, after the solve, updates it, reads it out and sums its norm. So where the states of
// all sequences exceed the last-level cache, each is read from memory and written to it once.
#pragma once

#include <cmath>

#include "cpu/chunk.hpp"
#include "cpu/gka_forward.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"
#include "cpu/step_solver.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

// sum of the squares of m[0, n) added to `sum`, in float64 (squared_norm of lanes.hpp says why). n
// is a multiple of two registers of float64 lanes.
template <class Vec, class S>
KALMANET_INLINE void add_squares(const S* m, int64_t n, typename Vec::Wide::Reg (&sum)[2]) {
  using Wide = typename Vec::Wide;
  for (int64_t i = 0; i < n; i += 2 * Wide::kWidth) {
    const auto a = load_as<Wide>(m + i), b = load_as<Wide>(m + i + Wide::kWidth);
    sum[0] = Wide::fma(a, a, sum[0]);
    sum[1] = Wide::fma(b, b, sum[1]);
  }
}

// H <- decay H + k k^T in one pass, which also packs the new H where `packed` is not null (Kp rows
// of it: those from K on are zeros). Returns |H|_F^2, for which the lower triangle's blocks of
// kLanes do: the others are the same numbers.
template <class Vec, class S>
double update_h(S* h, int64_t ld, int64_t K, int64_t Kp, S decay, const S* k, S* packed) {
  using Reg = typename Vec::Reg;
  using Wide = typename Vec::Wide;
  constexpr int64_t W = Vec::kWidth;
  const Reg d = Vec::set1(decay);
  typename Wide::Reg below[2] = {Wide::zero(), Wide::zero()};
  typename Wide::Reg diagonal[2] = {Wide::zero(), Wide::zero()};
  for (int64_t c = 0; c < K; ++c) {
    const Reg kc = Vec::set1(k[c]);
    S* row = h + c * ld;
    const auto updated = [&](int64_t n) __attribute__((always_inline)) {
      const Reg a = Vec::fma(kc, Vec::load(k + n), Vec::mul(d, Vec::load(row + n)));
      Vec::store(row + n, a);
      return a;
    };
    int64_t n = 0;
    if (packed != nullptr) {
      const int64_t i = c / W;
      S* to = packed + packed_row_begin<Vec>(i) + c % W * W;
      for (; n <= i * W; n += W, to += W * W) Vec::store(to, updated(n));
    }
    for (; n < Kp; n += W) updated(n);
    const int64_t block = c / kLanes * kLanes;
    add_squares<Vec>(row, block, below);
    add_squares<Vec>(row + block, kLanes, diagonal);
  }
  if (packed != nullptr) {
    for (int64_t c = K; c < Kp; ++c) {
      S* to = packed + packed_row_begin<Vec>(c / W) + c % W * W;
      for (int64_t n = 0; n <= c / W * W; n += W, to += W * W) Vec::store(to, Vec::zero());
    }
  }
  return 2.0 * Wide::sum(Wide::add(below[0], below[1])) +
         Wide::sum(Wide::add(diagonal[0], diagonal[1]));
}

// U <- decay U + k v^T and o = U^T m in one pass, four rows at a time; returns |U|_F^2, or 0 for
// float64 storage, where nobody asks (kHasWider).
template <class Vec, int kRows, class S>
KALMANET_INLINE void update_and_read_rows(S* u, int64_t ld, int64_t Vp, typename Vec::Reg decay,
                                          const S* k, const S* v, const S* m, S* o) {
  using Reg = typename Vec::Reg;
  Reg kc[kRows], mc[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    kc[r] = Vec::set1(k[r]);
    mc[r] = Vec::set1(m[r]);
  }
  for (int64_t n = 0; n < Vp; n += Vec::kWidth) {
    const Reg vn = Vec::load(v + n);
    Reg sum = Vec::load(o + n);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      S* at = u + r * ld + n;
      const Reg a = Vec::fma(kc[r], vn, Vec::mul(decay, Vec::load(at)));
      Vec::store(at, a);
      sum = Vec::fma(mc[r], a, sum);
    }
    Vec::store(o + n, sum);
  }
}

template <class Vec, class S>
double update_and_read_u(S* u, int64_t ld, int64_t K, int64_t Vp, S decay, const S* k, const S* v,
                         const S* m, S* o) {
  using Wide = typename Vec::Wide;
  const auto d = Vec::set1(decay);
  typename Wide::Reg norm2[2] = {Wide::zero(), Wide::zero()};
  for (int64_t n = 0; n < Vp; ++n) o[n] = 0;
  const auto add_norms = [&](int64_t begin, int64_t end) {
    if constexpr (kHasWider<Vec>) {
      for (int64_t c = begin; c < end; ++c) add_squares<Vec>(u + c * ld, Vp, norm2);
    }
  };
  int64_t c = 0;
  for (; c + 4 <= K; c += 4) {
    update_and_read_rows<Vec, 4>(u + c * ld, ld, Vp, d, k + c, v, m + c, o);
    add_norms(c, c + 4);
  }
  for (; c < K; ++c) {
    update_and_read_rows<Vec, 1>(u + c * ld, ld, Vp, d, k + c, v, m + c, o);
    add_norms(c, c + 1);
  }
  return Wide::sum(Wide::add(norm2[0], norm2[1]));
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

// x of one token and m = scale (q + alpha (x - q)), into buffers.m; x is all zeros where f counts
// as zero.
template <class Vec, class S>
void solve_and_mix(const StepToken<S>& token, const SystemMatrix<S>& matrix,
                   const SolveBuffers<typename Vec::Elem>& buffers,
                   const StepWork<typename Vec::Elem>& work, S* x_out) {
  using Elem = typename Vec::Elem;
  const Elem* x = buffers.a;
  if (token.f == 0.0) {
    for (int64_t c = 0; c < matrix.Kp; ++c) buffers.a[c] = 0;
  } else {
    x = solve_step<Vec>(token, matrix, work, buffers.a, buffers.b);
  }
  for (int64_t c = 0; c < matrix.Kp; ++c) {
    const Elem q = token.q[c];
    buffers.m[c] =
        static_cast<Elem>(token.scale) * (q + static_cast<Elem>(token.alpha) * (x[c] - q));
    x_out[c] = static_cast<S>(x[c]);
  }
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
  S* const packed = in.solver == Solver::direct ? nullptr : arena.take(packed_elems(Kp));
  SystemMatrix<S> matrix{job.state.h, job.h_stride, in.K, Kp};
  if (packed != nullptr) matrix.product = arena.take(Kp);
  for (int64_t t = job.begin; t < job.end; ++t) {
    const S beta = value_at<S>(in.beta, t, 1);
    StepToken<S> token;
    token.q = q;
    token.alpha = value_at<S>(in.alpha, t, 1);
    token.ridge = in.ridge.data == nullptr ? in.ridge_ratio
                                           : static_cast<double>(value_at<S>(in.ridge, t, 0));
    token.scale = in.scale;
    choose_step_solver<Vec>(token, in);
    if (t == job.begin) token.ahead = job.ahead;
    count_step<Vec>(token, job.count);
    load_vector<Vec>(in.q, t, in.K, S{1}, q);
    load_vector<Vec>(in.k, t, in.K, beta, k);
    load_vector<Vec>(in.v, t, in.V, beta, v);
    const auto h_decay = static_cast<S>(gate_at<Vec>(in.gk, t));
    const auto u_decay = static_cast<S>(gate_at<Vec>(in.g, t));
    matrix.packed = packs_for<Vec>(token, job.matrix, Kp) ? packed : nullptr;
    token.f = std::sqrt(update_h<Vec>(job.state.h, job.h_stride, in.K, Kp, h_decay, k,
                                      matrix.packed == nullptr ? nullptr : packed));
    if (token.f <= kVanishedNorm) token.f = 0.0;
    S* const x = narrow.b;  // the float64 pass and the stores read x from here
    solve_and_mix<Vec>(token, matrix, narrow, work, x);
    const double u_norm2 =
        update_and_read_u<Vec>(job.state.u, job.u_stride, in.K, Vp, u_decay, k, v, narrow.m, o);
    if constexpr (kHasWider<Vec>) {
      if (step_amplification<Vec>(token, job, u_norm2, x, o) > kLargestStepAmplification) {
        using Wide = typename Vec::Wide;
        token.ahead = {};
        solve_and_mix<Wide>(token, matrix, wide, wide_work, x);
        row_combination<Wide>(job.state.u, job.u_stride, in.K, Vp, wide.m,
                              [&](int64_t n, typename Wide::Reg a) { store_as<Wide>(o + n, a); });
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
