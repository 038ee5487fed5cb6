// Decode of one head, token by token: update the states, solve, read out. Every token touches each
// state once for the update and H once an iteration; both live in the second-level cache meanwhile.
#pragma once

#include <cmath>

#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

// y[n] = sum_{c < rows} x[c] M[c][n] for n < cols (a multiple of kLanes): rows of M are read in
// order, eight accumulators at a time (two multiply-adds a cycle of latency 4), epilogue(n,
// register of y).
template <class Vec, class Epilogue>
KALMANET_INLINE void row_combination(const float* m, int64_t ld, int64_t rows, int64_t cols,
                                     const float* x, Epilogue&& epilogue) {
  using Reg = typename Vec::Reg;
  constexpr int kBlock = 8;
  int64_t n = 0;
  for (; n + kBlock * Vec::kWidth <= cols; n += kBlock * Vec::kWidth) {
    Reg acc[kBlock];
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) acc[i] = Vec::zero();
    for (int64_t c = 0; c < rows; ++c) {
      const Reg xc = Vec::set1(x[c]);
      const float* row = m + c * ld + n;
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) {
        acc[i] = Vec::fma(xc, Vec::load(row + i * Vec::kWidth), acc[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) epilogue(n + i * Vec::kWidth, acc[i]);
  }
  // Four registers at a time, split over even and odd rows to keep eight sums in flight.
  constexpr int kSmall = Vec::kWidth == 16 ? 1 : 16 / Vec::kWidth;
  for (; n < cols; n += kSmall * Vec::kWidth) {
    Reg acc[4][kSmall];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 4
      for (int i = 0; i < kSmall; ++i) acc[p][i] = Vec::zero();
    }
    int64_t c = 0;
    for (; c + 4 <= rows; c += 4) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const Reg xc = Vec::set1(x[c + p]);
#pragma GCC unroll 4
        for (int i = 0; i < kSmall; ++i) {
          acc[p][i] = Vec::fma(xc, Vec::load(m + (c + p) * ld + n + i * Vec::kWidth), acc[p][i]);
        }
      }
    }
    for (; c < rows; ++c) {
      const Reg xc = Vec::set1(x[c]);
#pragma GCC unroll 4
      for (int i = 0; i < kSmall; ++i) {
        acc[0][i] = Vec::fma(xc, Vec::load(m + c * ld + n + i * Vec::kWidth), acc[0][i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSmall; ++i) {
      epilogue(n + i * Vec::kWidth,
               Vec::add(Vec::add(acc[0][i], acc[1][i]), Vec::add(acc[2][i], acc[3][i])));
    }
  }
}

// H <- decay H + k k^T; returns |H|_F^2.
template <class Vec>
double update_h(float* h, int64_t ld, int64_t K, int64_t Kp, float decay, const float* k) {
  using Reg = typename Vec::Reg;
  const Reg d = Vec::set1(decay);
  double norm2 = 0.0;
  for (int64_t c = 0; c < K; ++c) {
    const Reg kc = Vec::set1(k[c]);
    float* row = h + c * ld;
    for (int64_t n = 0; n < Kp; n += Vec::kWidth) {
      Vec::store(row + n, Vec::fma(kc, Vec::load(k + n), Vec::mul(d, Vec::load(row + n))));
    }
  }
  norm2 = squared_norm<Vec>(h, ld, K, Kp);
  return norm2;
}

// U <- decay U + k v^T and o = U^T m, in one pass over U.
template <class Vec>
void update_and_read_u(float* u, int64_t ld, int64_t K, int64_t Vp, float decay, const float* k,
                       const float* v, const float* m, float* o) {
  using Reg = typename Vec::Reg;
  const Reg d = Vec::set1(decay);
  for (int64_t n = 0; n < Vp; n += Vec::kWidth) Vec::store(o + n, Vec::zero());
  for (int64_t c = 0; c < K; ++c) {
    const Reg kc = Vec::set1(k[c]);
    const Reg mc = Vec::set1(m[c]);
    float* row = u + c * ld;
    for (int64_t n = 0; n < Vp; n += Vec::kWidth) {
      const Reg e = Vec::fma(kc, Vec::load(v + n), Vec::mul(d, Vec::load(row + n)));
      Vec::store(row + n, e);
      Vec::store(o + n, Vec::fma(mc, e, Vec::load(o + n)));
    }
  }
}

template <class Vec>
void load_vector(const Rows& src, int64_t t, int64_t width, float gain, float* out) {
  const float* p = src.data + t * src.token_stride;
  for (int64_t c = 0; c < width; ++c) out[c] = gain * p[c * src.stride];
  for (int64_t c = width; c < padded(width); ++c) out[c] = 0.0f;
}
template <class Vec>
void store_vector(const float* in, const OutRows& dst, int64_t t, int64_t width) {
  float* p = dst.data + t * dst.token_stride;
  for (int64_t c = 0; c < width; ++c) p[c * dst.stride] = in[c];
}
template <class Vec>
double gate_at(const Column& gate, int64_t t) {
  return gate.data == nullptr ? 1.0 : std::exp(static_cast<double>(gate.data[t * gate.stride]));
}

// The Chebyshev iteration (chebyshev.hpp) for one token; returns which of x and other has the
// solution.
template <class Vec>
float* chebyshev_step(const float* h, int64_t ld, int64_t K, int64_t Kp, const float* q, double f,
                      double ridge, int num_iter, float* x, float* other) {
  using Reg = typename Vec::Reg;
  const double lambda = ridge * f;
  const double step = 2.0 / (2.0 * lambda + f);
  const double rho = 0.5 / (2.0 * ridge + 1.0);
  for (int64_t n = 0; n < Kp; ++n) {
    x[n] = static_cast<float>(step) * q[n];
    other[n] = 0.0f;
  }
  const Reg lam = Vec::set1(static_cast<float>(lambda));
  double w = 2.0;
  for (int iteration = 0; iteration < num_iter; ++iteration) {
    w = 1.0 / (1.0 - static_cast<double>(static_cast<float>(rho * rho)) * w);
    const Reg momentum = Vec::set1(static_cast<float>(w - 1.0));
    const Reg gain = Vec::set1(static_cast<float>(step * w));
    row_combination<Vec>(h, ld, K, Kp, x, [&](int64_t n, Reg hx) {
      const Reg xn = Vec::load(x + n);
      const Reg residual = Vec::sub(Vec::fma(lam, xn, hx), Vec::load(q + n));
      const Reg moved = Vec::fma(momentum, Vec::sub(xn, Vec::load(other + n)), xn);
      Vec::store(other + n, Vec::fnma(gain, residual, moved));
    });
    float* next = other;
    other = x;
    x = next;
  }
  return x;
}

template <class Vec>
float residual_of_step(const float* h, int64_t ld, int64_t K, int64_t Kp, const float* q, double f,
                       double ridge, const float* x) {
  using Reg = typename Vec::Reg;
  const Reg lam = Vec::set1(static_cast<float>(ridge * f));
  double r2 = 0.0, q2 = 0.0;
  alignas(64) float r[Vec::kWidth];
  row_combination<Vec>(h, ld, K, Kp, x, [&](int64_t n, Reg hx) {
    Vec::store(r, Vec::sub(Vec::fma(lam, Vec::load(x + n), hx), Vec::load(q + n)));
    for (int i = 0; i < Vec::kWidth; ++i) r2 += static_cast<double>(r[i]) * r[i];
  });
  for (int64_t c = 0; c < K; ++c) q2 += static_cast<double>(q[c]) * q[c];
  return f == 0.0 || q2 == 0.0 ? 0.0f : static_cast<float>(std::sqrt(r2 / q2));
}

template <class Vec>
void gka_step_head(const GkaStepJob& job) {
  const HeadInputs& in = job.in;
  const int64_t Kp = padded(in.K), Vp = padded(in.V);
  Arena arena(job.scratch);
  float* const q = arena.take(Kp);
  float* const k = arena.take(Kp);
  float* const xa = arena.take(Kp);
  float* const xb = arena.take(Kp);
  float* const m = arena.take(Kp);
  float* const v = arena.take(Vp);
  float* const o = arena.take(Vp);
  for (int64_t t = job.begin; t < job.end; ++t) {
    const float beta = in.beta.data == nullptr ? 1.0f : in.beta.data[t * in.beta.stride];
    const float alpha = in.alpha.data == nullptr ? 1.0f : in.alpha.data[t * in.alpha.stride];
    const double ridge = in.ridge.data == nullptr
                             ? in.ridge_ratio
                             : static_cast<double>(in.ridge.data[t * in.ridge.stride]);
    load_vector<Vec>(in.q, t, in.K, 1.0f, q);
    load_vector<Vec>(in.k, t, in.K, beta, k);
    load_vector<Vec>(in.v, t, in.V, beta, v);
    const float h_decay = static_cast<float>(gate_at<Vec>(in.gk, t));
    const float u_decay = static_cast<float>(gate_at<Vec>(in.g, t));
    double f = std::sqrt(update_h<Vec>(job.state.h, job.h_stride, in.K, Kp, h_decay, k));
    int num_iter = in.num_iter != 0 ? in.num_iter : chebyshev_num_iter(ridge, in.tolerance);
    if (job.iterations != nullptr) {
      IterationRange& range = *job.iterations;
      if (range.max == 0 || num_iter < range.min) range.min = num_iter;
      if (num_iter > range.max) range.max = num_iter;
    }
    float* x = xa;
    if (f <= kVanishedNorm64) {
      f = 0.0;
      for (int64_t c = 0; c < Kp; ++c) x[c] = 0.0f;
    } else {
      x = chebyshev_step<Vec>(job.state.h, job.h_stride, in.K, Kp, q, f, ridge, num_iter, xa, xb);
    }
    if (job.residual.data != nullptr) {
      job.residual.data[t * job.residual.stride] =
          residual_of_step<Vec>(job.state.h, job.h_stride, in.K, Kp, q, f, ridge, x);
    }
    if (job.x.data != nullptr) store_vector<Vec>(x, job.x, t, in.K);
    const float scale = static_cast<float>(in.scale);
    for (int64_t c = 0; c < Kp; ++c) m[c] = scale * (q[c] + alpha * (x[c] - q[c]));
    update_and_read_u<Vec>(job.state.u, job.u_stride, in.K, Vp, u_decay, k, v, m, o);
    store_vector<Vec>(o, job.o, t, in.V);
  }
}

}  // namespace kalmanet::cpu
