// The norms' kernels, generic over a vector type: a row at a time, vectors along the row.
//
// S is float, or double for float64 tensors. The job structs hold plain data, so that this header
// can be read without any vector type.
#pragma once

#include <cstdint>

#include "cpu/vec_math.hpp"

namespace kalmanet::cpu {

// `rows` rows of `dim` adjacent elements. `gate` null: the factor silu(gate) is left out.
template <class S>
struct NormRows {
  const S* o = nullptr;
  int64_t o_stride = 0;
  const S* gate = nullptr;
  int64_t gate_stride = 0;
  const S* weight = nullptr;  // [dim]
  int64_t rows = 0, dim = 0;
  double eps = 0;
};

template <class S>
struct NormForwardJob {
  NormRows<S> in;
  S* y = nullptr;
  int64_t y_stride = 0;
};

// d_o, d_gate and d_weight may be null. d_weight [dim] is added to.
template <class S>
struct NormBackwardJob {
  NormRows<S> in;
  const S* dy = nullptr;
  int64_t dy_stride = 0;
  S* d_o = nullptr;
  int64_t d_o_stride = 0;
  S* d_gate = nullptr;
  int64_t d_gate_stride = 0;
  S* d_weight = nullptr;
};

// The unit norm. `fla`: QkNorm::fla. With dy null: y = x / s into `to`; otherwise dx.
template <class S>
struct UnitNormJob {
  const S* x = nullptr;
  int64_t x_stride = 0;
  const S* dy = nullptr;
  int64_t dy_stride = 0;
  S* to = nullptr;
  int64_t to_stride = 0;
  int64_t rows = 0, dim = 0;
  double eps = 0;
  bool fla = false;
};

template <class S>
struct NormKernels {
  void (*forward)(const NormForwardJob<S>&);
  void (*backward)(const NormBackwardJob<S>&);
  void (*unit_norm)(const UnitNormJob<S>&);
  VecMathKernels<S> math;
};

// Calls f(c, load, store) for each vector of a row: load and store reach its elements only, what
// lies beyond the row loads as 0.
template <class Vec, class F>
[[gnu::always_inline]] inline void each_vector(int64_t dim, F&& f) {
  using Reg = typename Vec::Reg;
  using S = typename Vec::Elem;
  int64_t c = 0;
  for (; c + Vec::kWidth <= dim; c += Vec::kWidth) {
    f([c](const S* p) __attribute__((always_inline)) { return Vec::load(p + c); },
      [c](S* p, Reg a) __attribute__((always_inline)) { Vec::store(p + c, a); });
  }
  if (c < dim) {
    const int64_t lanes = dim - c;
    f([c, lanes](const S* p) __attribute__((always_inline)) { return Vec::load_n(p + c, lanes); },
      [c, lanes](S* p, Reg a) __attribute__((always_inline)) { Vec::store_n(p + c, a, lanes); });
  }
}

// 1 / sqrt(mean(o^2) + eps), the sum over the row lane by lane in the rows' precision, the rest in
// float64.
template <class Vec>
[[gnu::always_inline]] inline typename Vec::Elem inverse_rms(const typename Vec::Elem* o,
                                                             int64_t dim, double eps) {
  using Reg = typename Vec::Reg;
  using S = typename Vec::Elem;
  Reg sum = Vec::zero();
  each_vector<Vec>(dim, [&](auto load, auto) __attribute__((always_inline)) {
    const Reg x = load(o);
    sum = Vec::fma(x, x, sum);
  });
  const double mean = static_cast<double>(Vec::sum(sum)) / static_cast<double>(dim);
  return static_cast<S>(1.0 / __builtin_sqrt(mean + eps));
}

template <class Vec, bool kGate>
void norm_forward_rows(const NormForwardJob<typename Vec::Elem>& job) {
  using Reg = typename Vec::Reg;
  using S = typename Vec::Elem;
  const NormRows<S>& in = job.in;
  for (int64_t i = 0; i < in.rows; ++i) {
    const S* o = in.o + i * in.o_stride;
    const S* gate = kGate ? in.gate + i * in.gate_stride : nullptr;
    S* y = job.y + i * job.y_stride;
    const Reg r = Vec::set1(inverse_rms<Vec>(o, in.dim, in.eps));
    each_vector<Vec>(in.dim, [&](auto load, auto store) __attribute__((always_inline)) {
      Reg a = Vec::mul(load(in.weight), Vec::mul(load(o), r));
      if constexpr (kGate) a = Vec::mul(a, vec_silu<Vec>(load(gate)));
      store(y, a);
    });
  }
}

// With n = o r, s = silu(gate), z = weight s dy:
//   d_weight += dy n s     d_gate = dy weight n silu'(gate)     d_o = r (z - n mean(z n))
// z waits in d_o until its mean is known.
template <class Vec, bool kGate>
void norm_backward_rows(const NormBackwardJob<typename Vec::Elem>& job) {
  using Reg = typename Vec::Reg;
  using S = typename Vec::Elem;
  const NormRows<S>& in = job.in;
  for (int64_t i = 0; i < in.rows; ++i) {
    const S* o = in.o + i * in.o_stride;
    const S* gate = kGate ? in.gate + i * in.gate_stride : nullptr;
    const S* dy = job.dy + i * job.dy_stride;
    S* d_o = job.d_o == nullptr ? nullptr : job.d_o + i * job.d_o_stride;
    S* d_gate = job.d_gate == nullptr ? nullptr : job.d_gate + i * job.d_gate_stride;
    const Reg r = Vec::set1(inverse_rms<Vec>(o, in.dim, in.eps));
    Reg dot = Vec::zero();
    each_vector<Vec>(in.dim, [&](auto load, auto store) __attribute__((always_inline)) {
      const Reg n = Vec::mul(load(o), r);
      const Reg w = load(in.weight);
      Reg d = load(dy);
      if constexpr (kGate) {
        const Reg g = load(gate);
        const SigmoidPair<Vec> s = vec_sigmoid_pair<Vec>(g);
        if (d_gate != nullptr) {
          store(d_gate, Vec::mul(Vec::mul(Vec::mul(d, w), n), silu_derivative<Vec>(g, s)));
        }
        d = Vec::mul(d, Vec::mul(g, s.sigmoid));
      }
      if (job.d_weight != nullptr) store(job.d_weight, Vec::fma(d, n, load(job.d_weight)));
      if (d_o != nullptr) {
        const Reg z = Vec::mul(w, d);
        dot = Vec::fma(z, n, dot);
        store(d_o, z);
      }
    });
    if (d_o == nullptr) continue;
    const Reg mean = Vec::set1(Vec::sum(dot) / static_cast<S>(in.dim));
    each_vector<Vec>(in.dim, [&](auto load, auto store) __attribute__((always_inline)) {
      const Reg n = Vec::mul(load(o), r);
      store(d_o, Vec::mul(r, Vec::fnma(n, mean, load(d_o))));
    });
  }
}

template <class Vec>
void norm_forward(const NormForwardJob<typename Vec::Elem>& job) {
  if (job.in.gate != nullptr) {
    norm_forward_rows<Vec, true>(job);
  } else {
    norm_forward_rows<Vec, false>(job);
  }
}

template <class Vec>
void norm_backward(const NormBackwardJob<typename Vec::Elem>& job) {
  if (job.in.gate != nullptr) {
    norm_backward_rows<Vec, true>(job);
  } else {
    norm_backward_rows<Vec, false>(job);
  }
}

// a . b: lane by lane in the rows' precision.
template <class Vec>
[[gnu::always_inline]] inline double row_dot(const typename Vec::Elem* a,
                                             const typename Vec::Elem* b, int64_t dim) {
  using Reg = typename Vec::Reg;
  Reg sum = Vec::zero();
  each_vector<Vec>(dim, [&](auto load, auto) __attribute__((always_inline)) {
    sum = Vec::fma(load(a), load(b), sum);
  });
  return static_cast<double>(Vec::sum(sum));
}

// y = x / s, or dx = dy / s - x along, along = (x . dy) / (|x| s^2); fla: (x . dy) / s^3. The
// scalars of a row are float64: |x| s^2 of a small x is no float32.
template <class Vec, bool kBackward>
void unit_norm_rows(const UnitNormJob<typename Vec::Elem>& job) {
  using Reg = typename Vec::Reg;
  using S = typename Vec::Elem;
  for (int64_t i = 0; i < job.rows; ++i) {
    const S* x = job.x + i * job.x_stride;
    const S* dy = kBackward ? job.dy + i * job.dy_stride : nullptr;
    S* to = job.to + i * job.to_stride;
    const double square = row_dot<Vec>(x, x, job.dim);
    const double norm = __builtin_sqrt(square);
    const double s = job.fla ? __builtin_sqrt(square + job.eps) : norm + job.eps;
    const Reg inverse = Vec::set1(static_cast<S>(1.0 / s));
    if constexpr (kBackward) {
      const double cube = (job.fla ? s : norm) * s * s;
      const double along = norm > 0 ? row_dot<Vec>(x, dy, job.dim) / cube : 0.0;
      const Reg minus = Vec::set1(static_cast<S>(along));
      each_vector<Vec>(job.dim, [&](auto load, auto store) __attribute__((always_inline)) {
        store(to, Vec::fnma(load(x), minus, Vec::mul(load(dy), inverse)));
      });
    } else {
      each_vector<Vec>(job.dim, [&](auto load, auto store) __attribute__((always_inline)) {
        store(to, Vec::mul(load(x), inverse));
      });
    }
  }
}

template <class Vec>
void unit_norm(const UnitNormJob<typename Vec::Elem>& job) {
  if (job.dy != nullptr) {
    unit_norm_rows<Vec, true>(job);
  } else {
    unit_norm_rows<Vec, false>(job);
  }
}

template <class Vec>
constexpr NormKernels<typename Vec::Elem> norm_kernels() {
  return {
      .forward = &norm_forward<Vec>,
      .backward = &norm_backward<Vec>,
      .unit_norm = &unit_norm<Vec>,
      .math = vec_math_kernels<Vec>(),
  };
}

}  // namespace kalmanet::cpu
