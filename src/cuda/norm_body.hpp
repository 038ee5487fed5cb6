// The norms: one warp a row. The gated RMS norm, with r = 1 / sqrt(mean(o^2) + eps), n = o r, s =
// silu(gate):
//
//   y = w n s        d_gate = dy w n silu'(gate)        d_weight = sum over rows of dy n s
//   d_o = r (e - n mean(e n)),  e = dy w s
#pragma once

#include "cuda/conv_body.hpp"
#include "cuda/layer_job.hpp"

namespace kalmanet::cuda {

inline constexpr int kNormThreads = 256;
inline constexpr int kNormRows = kNormThreads / 32;  // a block

template <class S>
struct NormRegisters {
  S square, along, inverse;
};

template <class S>
KALMANET_KERNEL S element(const Array& a, int64_t row, int64_t column) {
  return load_element<S>(a, row * a.stride[0] + column * a.stride[1]);
}
template <class S>
KALMANET_KERNEL void set(const Array& a, int64_t row, int64_t column, S value) {
  store_element<S>(a, row * a.stride[0] + column * a.stride[1], value);
}
template <class S>
KALMANET_KERNEL S weight_at(const NormJob& job, int64_t column) {
  return load_element<S>(job.weight, column * job.weight.stride[0]);
}

// silu(gate) and its derivative; 1 and 0 without a gate.
template <class S>
struct Silu {
  S value = S(1), slope = S(0);
};
template <class S>
KALMANET_KERNEL Silu<S> silu_at(const NormJob& job, int64_t row, int64_t column) {
  if (job.gate.data == nullptr) return {};
  const S g = element<S>(job.gate, row, column), s = sigmoid(g);
  return {g * s, s * (S(1) + g * (S(1) - s))};
}

// f(row, column, registers) for the columns of each thread's row.
template <class S, class Group, class F>
KALMANET_KERNEL void for_columns(Group& group, const NormJob& job, int64_t block, F&& f) {
  group.each([&](int thread, NormRegisters<S>& r) {
    const int64_t row = block * kNormRows + thread / 32;
    if (row >= job.R) return;
    for (int64_t c = thread % 32; c < job.V; c += 32) f(row, c, r);
  });
}

template <class S, class Group>
KALMANET_KERNEL void sum_squares(Group& group, const NormJob& job, int64_t block) {
  group.each([](int, NormRegisters<S>& r) { r.square = r.along = S(0); });
  for_columns<S>(group, job, block, [&](int64_t row, int64_t c, NormRegisters<S>& r) {
    const S value = element<S>(job.o, row, c);
    r.square += value * value;
  });
  group.template sum_lanes<32>([](NormRegisters<S>& r) -> S& { return r.square; });
  group.each([&](int, NormRegisters<S>& r) {
    r.inverse = S(1) / sqrt(r.square / static_cast<S>(job.V) + static_cast<S>(job.eps));
  });
}

template <class S, class Group>
KALMANET_KERNEL void run_norm(Group& group, const NormJob& job, int64_t block) {
  sum_squares<S>(group, job, block);
  for_columns<S>(group, job, block, [&](int64_t row, int64_t c, NormRegisters<S>& r) {
    set<S>(job.y, row, c,
           element<S>(job.o, row, c) * r.inverse * weight_at<S>(job, c) *
               silu_at<S>(job, row, c).value);
  });
}

template <class S, class Group>
KALMANET_KERNEL void run_norm_backward(Group& group, const NormJob& job, int64_t block) {
  sum_squares<S>(group, job, block);
  const auto e = [&](int64_t row, int64_t c, S silu) {
    return element<S>(job.dy, row, c) * weight_at<S>(job, c) * silu;
  };
  for_columns<S>(group, job, block, [&](int64_t row, int64_t c, NormRegisters<S>& r) {
    r.along += e(row, c, silu_at<S>(job, row, c).value) * element<S>(job.o, row, c) * r.inverse;
  });
  group.template sum_lanes<32>([](NormRegisters<S>& r) -> S& { return r.along; });
  for_columns<S>(group, job, block, [&](int64_t row, int64_t c, NormRegisters<S>& r) {
    const Silu<S> silu = silu_at<S>(job, row, c);
    const S n = element<S>(job.o, row, c) * r.inverse;
    const S d_o = r.inverse * (e(row, c, silu.value) - n * r.along / static_cast<S>(job.V));
    const S d_gate = element<S>(job.dy, row, c) * weight_at<S>(job, c) * n * silu.slope;
    if (job.d_o.data != nullptr) set<S>(job.d_o, row, c, d_o);
    if (job.d_gate.data != nullptr) set<S>(job.d_gate, row, c, d_gate);
    if (c == 0 && job.inverse != nullptr) job.inverse[row] = static_cast<double>(r.inverse);
  });
}

// From |x|^2 and x . dy what the unit norm's formulas below need: 1 / s and (x . dy) / (|x| s^2).
template <class S, class Registers>
KALMANET_KERNEL void set_unit_norm(bool fla, S eps, Registers& r) {
  const S norm = sqrt(r.square);
  r.inverse = S(1) / (fla ? sqrt(r.square + eps) : norm + eps);
  r.along *= r.inverse * r.inverse * (fla ? r.inverse : norm > S(0) ? S(1) / norm : S(0));
}

// y = x / s, s = |x| + eps or sqrt(|x|^2 + eps);
// dx = dy / s - x (x . dy) / (|x| s^2), or / s^3. A row of zeros has no direction: dx = dy / s.
template <class S, class Group>
KALMANET_KERNEL void run_unit_norm(Group& group, const NormJob& job, int64_t block) {
  const bool fla = job.unit == UnitNorm::fla, backward = job.dy.data != nullptr;
  group.each([](int, NormRegisters<S>& r) { r.square = r.along = S(0); });
  for_columns<S>(group, job, block, [&](int64_t row, int64_t c, NormRegisters<S>& r) {
    const S value = element<S>(job.o, row, c);
    r.square += value * value;
    if (backward) r.along += value * element<S>(job.dy, row, c);
  });
  group.template sum_lanes<32>([](NormRegisters<S>& r) -> S& { return r.square; });
  group.template sum_lanes<32>([](NormRegisters<S>& r) -> S& { return r.along; });
  group.each([&](int, NormRegisters<S>& r) { set_unit_norm(fla, static_cast<S>(job.eps), r); });
  for_columns<S>(group, job, block, [&](int64_t row, int64_t c, NormRegisters<S>& r) {
    const S x = element<S>(job.o, row, c);
    if (backward) {
      set<S>(job.d_o, row, c, element<S>(job.dy, row, c) * r.inverse - x * r.along);
    } else {
      set<S>(job.y, row, c, x * r.inverse);
    }
  });
}

// Column c of rows [group * kNormRowsAPart, ...).
template <class S>
KALMANET_KERNEL void run_norm_weight(const NormJob& job, int64_t group, int64_t c) {
  const int64_t begin = group * kNormRowsAPart;
  const int64_t end = begin + kNormRowsAPart < job.R ? begin + kNormRowsAPart : job.R;
  double sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    sum += static_cast<double>(element<S>(job.dy, row, c) * element<S>(job.o, row, c) *
                               static_cast<S>(job.inverse[row]) * silu_at<S>(job, row, c).value);
  }
  job.parts[group * job.V + c] = sum;
}

}  // namespace kalmanet::cuda
