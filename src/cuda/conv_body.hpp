// The causal convolution: one thread a channel and span of tokens, the window in its registers.
// Neighbours in a warp take neighbouring channels, so that loads and stores run together.
#pragma once

#include "cuda/layer_job.hpp"

namespace kalmanet::cuda {

KALMANET_KERNEL ConvSpan span_of(const ConvJob& job, int64_t i) {
  if (job.spans != nullptr) return job.spans[i];
  // (Spans are a grid's first dimension, and so less than 2^31: 64-bit divisions are long.)
  const uint32_t n = static_cast<uint32_t>(i), a_row = static_cast<uint32_t>(job.spans_a_row);
  const int64_t row = n / a_row, begin = n % a_row * job.tokens;
  const int64_t end = begin + job.tokens;
  return {row, begin, end < job.T ? end : job.T, 0, job.T, row};
}

KALMANET_KERNEL double exponential(double x) {
  return exp(x);
}
KALMANET_KERNEL float exponential(float x) {
  return expf(x);
}

template <class S>
KALMANET_KERNEL S sigmoid(S x) {
  return S(1) / (S(1) + exponential(-x));
}
// For float32 sums that are rounded to kType: to 4 units of float32 in the last place, or, where 16
// bits are all that is kept, (2 + |x|) 2^-22.
template <DType kType>
KALMANET_KERNEL float quick_sigmoid(float x) {
#ifdef __CUDACC__
  float e, s;
  if constexpr (kType == DType::float32) {
    e = expf(-x);
  } else {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  }
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
#else
  return sigmoid(x);
#endif
}

// A window of kW taps holds the job's W <= kW: those in front of them are never read.
template <class S, int kW>
struct ConvThread {
  const ConvJob& job;
  ConvSpan span;
  int64_t channel;
  S weight[kW];

  KALMANET_KERNEL ConvThread(const ConvJob& j, const ConvSpan& s, int64_t c)
      : job(j), span(s), channel(c) {
    KALMANET_UNROLL
    for (int t = 0; t < kW; ++t) {
      const int64_t tap = t - (kW - job.W);
      weight[t] = tap < 0 ? S(0)
                          : load_element<S>(job.weight, channel * job.weight.stride[0] +
                                                            tap * job.weight.stride[1]);
    }
  }

  // Whether place i of the window is a tap: elsewhere is what must not be multiplied by its zero.
  KALMANET_KERNEL bool used(int i) const { return i >= kW - job.W; }
  KALMANET_KERNEL S at(const Array& a, int64_t t) const {
    return load_element<S>(a, span.row * a.stride[0] + t * a.stride[1] + channel * a.stride[2]);
  }
  KALMANET_KERNEL int64_t in_state(const Array& a, int64_t tap) const {
    return span.sequence * a.stride[0] + channel * a.stride[1] + tap * a.stride[2];
  }
  // Input of token t, which may lie before the sequence: in its state, or nowhere.
  KALMANET_KERNEL S input(int64_t t) const {
    if (t >= span.first) return at(job.x, t);
    const int64_t tap = t - span.first + job.W;
    if (job.state.data == nullptr || tap < 0) return S(0);
    return load_element<S>(job.state, in_state(job.state, tap));
  }
  // The inputs in front of token t into all places of the window but the last.
  KALMANET_KERNEL void fill(S (&window)[kW], int64_t t) const {
    KALMANET_UNROLL
    for (int i = 0; i + 1 < kW; ++i) {
      window[i] = used(i) ? input(t - (kW - 1) + i) : S(0);
    }
  }
  static KALMANET_KERNEL void push(S (&window)[kW], S value) {
    KALMANET_UNROLL
    for (int i = 0; i + 1 < kW; ++i) window[i] = window[i + 1];
    window[kW - 1] = value;
  }
  KALMANET_KERNEL S dot(const S (&window)[kW]) const {
    S sum = S(0);
    KALMANET_UNROLL
    for (int i = 0; i < kW; ++i) sum += used(i) ? weight[i] * window[i] : S(0);
    return sum;
  }

  KALMANET_KERNEL void forward() const {
    S window[kW];
    fill(window, span.begin);
    window[kW - 1] = S(0);
    for (int64_t t = span.begin; t < span.end; ++t) {
      if (t > span.begin) push(window, S(0));
      window[kW - 1] = at(job.x, t);
      const S sum = dot(window);
      store_element<S>(job.y,
                       span.row * job.y.stride[0] + t * job.y.stride[1] + channel * job.y.stride[2],
                       job.silu ? sum * sigmoid(sum) : sum);
    }
    // Only this thread read the channel's old state, which the new one may be written over: from
    // the left, where it is read no more.
    if (span.begin != span.first || job.final_state.data == nullptr) return;
    for (int64_t tap = 0; tap < job.W; ++tap) {
      store_element<S>(job.final_state, in_state(job.final_state, tap),
                       input(span.last - job.W + tap));
    }
  }

  // With p_t the gradient of the sum before the activation:
  //   dx_s = sum_j weight_j p_{s + W - 1 - j},   dweight_j = sum_t p_t x_{t - W + 1 + j}
  // (with W = kW: the taps that the job lacks come first, as in the window).
  // A sequence's first span goes on to the W places in front of it, which are its state's.
  KALMANET_KERNEL void backward(int64_t index) const {
    const bool first = span.begin == span.first;
    constexpr int64_t kPast = kW - 1;
    S window[kW], p[kW];
    double part[kW];
    fill(window, span.begin);
    window[kW - 1] = S(0);
    KALMANET_UNROLL
    for (int i = 0; i < kW; ++i) p[i] = S(0), part[i] = 0;
    for (int64_t t = first ? span.begin - 1 : span.begin; t - kPast < span.end; ++t) {
      S gradient = S(0);
      if (t >= span.begin && t < span.last) {
        if (t > span.begin) push(window, S(0));
        window[kW - 1] = at(job.x, t);
        gradient = at(job.dy, t) * slope(window);
        if (t < span.end) {
          KALMANET_UNROLL
          for (int i = 0; i < kW; ++i) part[i] += static_cast<double>(gradient * window[i]);
        }
      }
      push(p, gradient);
      store_input_gradient(t - kPast, p);
    }
    if (job.parts == nullptr) return;
    KALMANET_UNROLL
    for (int i = 0; i < kW; ++i) {
      const int64_t tap = i - (kW - job.W);
      if (tap >= 0) job.parts[(index * job.D + channel) * job.W + tap] = part[i];
    }
  }

  // The gradients of the span's inputs [from, to) alone, or of its sequence's state in front of it.
  KALMANET_KERNEL void input_gradients(int64_t from, int64_t to) const {
    const int64_t first = from < span.first ? span.first : from;
    S window[kW], p[kW];
    fill(window, first);
    window[kW - 1] = S(0);
    KALMANET_UNROLL
    for (int i = 0; i < kW; ++i) p[i] = S(0);
    KALMANET_LOOP
    for (int64_t t = from; t - (kW - 1) < to; ++t) {
      S gradient = S(0);
      if (t >= first && t < span.last) {
        if (t > first) push(window, S(0));
        window[kW - 1] = at(job.x, t);
        gradient = at(job.dy, t) * slope(window);
      }
      push(p, gradient);
      if (t - (kW - 1) >= from) store_input_gradient(t - (kW - 1), p);
    }
  }

  // d y / d sum of a window.
  KALMANET_KERNEL S slope(const S (&window)[kW]) const {
    if (!job.silu) return S(1);
    const S sum = dot(window), s = sigmoid(sum);
    return s * (S(1) + sum * (S(1) - s));
  }

  // p: of the kW tokens from s on.
  KALMANET_KERNEL void store_input_gradient(int64_t s, const S (&p)[kW]) const {
    const bool inside = s >= span.first;
    const Array& to = inside ? job.dx : job.dstate;
    // (Tokens of the span alone: the first one's own are those of the state, too.)
    if (to.data == nullptr || s >= span.end || (inside && s < span.begin)) return;
    S sum = S(0);
    KALMANET_UNROLL
    for (int i = 0; i < kW; ++i) sum += used(i) ? weight[i] * p[kW - 1 - i] : S(0);
    const int64_t kept = s - (span.last - job.W);  // its place in the final state
    if (job.d_final.data != nullptr && kept >= 0) {
      sum += load_element<S>(job.d_final, in_state(job.d_final, kept));
    }
    const int64_t place = inside ? s : s - span.first + job.W;
    if (place < 0) return;
    store_element<S>(to,
                     inside
                         ? span.row * to.stride[0] + place * to.stride[1] + channel * to.stride[2]
                         : in_state(to, place),
                     sum);
  }
};

template <class S>
KALMANET_KERNEL void run_conv(const ConvJob& job, int64_t span, int64_t channel, bool backward) {
  const auto run = [&](const auto& thread) {
    if (backward) {
      thread.backward(span);
    } else {
      thread.forward();
    }
  };
  if (job.W <= 4) {
    run(ConvThread<S, 4>(job, span_of(job, span), channel));
  } else {
    run(ConvThread<S, 16>(job, span_of(job, span), channel));
  }
}

// Element e of `width`, rows [group * kPartsAThread, ...) of the parts.
KALMANET_KERNEL void run_sum(const SumJob& job, int64_t group, int64_t e) {
  const int64_t begin = group * kPartsAThread;
  const int64_t end = begin + kPartsAThread < job.count ? begin + kPartsAThread : job.count;
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += job.parts[i * job.width + e];
  if (job.result.data == nullptr) {
    job.out[group * job.width + e] = sum;
    return;
  }
  const int64_t at =
      e / job.columns * job.result.stride[0] + e % job.columns * job.result.stride[1];
  if (job.result.dtype == DType::float64) {
    store_element<double>(job.result, at, sum);
  } else {
    store_element<float>(job.result, at, static_cast<float>(sum));
  }
}

}  // namespace kalmanet::cuda
