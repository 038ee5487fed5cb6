// A layer's decode step around the recurrence. Before it: one block a head of q, k or v and
// sequence, a thread a channel: the window in registers, its oldest input leaves and the state is
// written back in the same pass; and one block a gate. After it: one warp a head.
#pragma once

#include "cuda/conv_body.hpp"
#include "cuda/layer_step_job.hpp"
#include "cuda/vectors.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cuda {

inline constexpr int kMostLayerThreads = static_cast<int>(kMaxHeadDim);
inline constexpr int kLayerAfterThreads = 128;
inline constexpr int kLayerAfterHeads = kLayerAfterThreads / 32;  // a block

template <class S>
struct LayerBeforeShared {
  S squares[2][kMostLayerThreads / 32];  // of each warp's channels, of two tokens by turns
};
template <class S, int kTaps>
struct LayerBeforeRegisters {
  S weight[kTaps], window[kTaps], value, square;
};

KALMANET_KERNEL float log_of_1_and(float x) {
  return log1pf(x);
}
KALMANET_KERNEL double log_of_1_and(double x) {
  return log1p(x);
}
template <class S>
KALMANET_KERNEL S softplus(S x) {
  return x > S(0) ? x + log_of_1_and(exponential(-x)) : log_of_1_and(exponential(x));
}

// The W taps of a channel, right-aligned: the first kTaps - W places are zeros.
template <int kTaps, class S>
KALMANET_KERNEL void load_taps(const Array& a, int64_t at, int64_t stride, int64_t W, bool fours,
                               S (&out)[kTaps]) {
  if constexpr (kTaps == 4) {
    if (fours) {
      if constexpr (sizeof(S) == 8) return load4(static_cast<const double*>(a.data) + at, out);
      if constexpr (sizeof(S) == 4) return load_neighbours(a, at, out);
    }
  }
  KALMANET_UNROLL
  for (int i = 0; i < kTaps; ++i) {
    const int64_t tap = i - (kTaps - W);
    out[i] = tap < 0 ? S(0) : load_element<S>(a, at + tap * stride);
  }
}

template <class S, int kTaps, class Group>
KALMANET_KERNEL void run_layer_conv(Group& group, LayerBeforeShared<S>& shared,
                                    const LayerBeforeJob& job, const LayerConv& conv, int64_t head,
                                    int64_t n, int threads) {
  using Registers = LayerBeforeRegisters<S, kTaps>;
  const int width = static_cast<int>(conv.width);
  const bool convolves = conv.weight.data != nullptr;
  const auto channel = [&](int thread) { return head * conv.width + thread; };
  const auto state_at = [&](int thread) {
    return n * conv.state.stride[0] + channel(thread) * conv.state.stride[1];
  };
  group.each([&](int thread, Registers& r) {
    if (thread >= width || !convolves) return;
    load_taps<kTaps>(conv.state, state_at(thread), conv.state.stride[2], job.W, conv.state_fours,
                     r.window);
    load_taps<kTaps>(conv.weight, channel(thread) * conv.weight.stride[0], conv.weight.stride[1],
                     job.W, conv.weight_fours, r.weight);
  });
  KALMANET_LOOP
  for (int64_t t = 0; t < job.T; ++t) {
    const int64_t from = offset_of(conv.x, n, t, head);
    group.each([&](int thread, Registers& r) {
      r.square = S(0);
      if (thread >= width) return;
      const S x = load_element<S>(conv.x, from + thread * conv.x.stride[3]);
      r.value = x;
      if (!convolves) return;
      KALMANET_UNROLL
      for (int i = 0; i + 1 < kTaps; ++i) r.window[i] = r.window[i + 1];
      r.window[kTaps - 1] = x;
      S sum = S(0);
      KALMANET_UNROLL
      for (int i = 0; i < kTaps; ++i) {
        // What the window does not reach is not multiplied by zero either.
        sum += i >= kTaps - job.W ? r.weight[i] * r.window[i] : S(0);
      }
      r.value = sum * sigmoid(sum);
      r.square = r.value * r.value;
    });
    if (conv.unit) {
      group.template sum_lanes<32>([](Registers& r) -> S& { return r.square; });
      group.each([&](int thread, Registers& r) {
        if (thread % 32 == 0) shared.squares[t % 2][thread / 32] = r.square;
      });
      group.barrier();
      group.each([&](int, Registers& r) {
        S sum = S(0);
        for (int w = 0; w < threads / 32; ++w) sum += shared.squares[t % 2][w];
        const S eps = static_cast<S>(1e-6);
        r.value *= S(1) / (job.fla_norm ? sqrt(sum + eps) : sqrt(sum) + eps);
      });
    }
    const int64_t to = offset_of(conv.y, n, t, head);
    group.each([&](int thread, Registers& r) {
      if (thread < width) store_element<S>(conv.y, to + thread, r.value);
    });
  }
  group.each([&](int thread, Registers& r) {
    if (thread >= width || !convolves) return;
    const int64_t at = state_at(thread);
    if constexpr (kTaps == 4) {
      if (conv.state_fours) return store4(static_cast<S*>(conv.state.data) + at, r.window);
    }
    KALMANET_UNROLL
    for (int i = 0; i < kTaps; ++i) {
      const int64_t tap = i - (kTaps - job.W);
      if (tap >= 0) store_element<S>(conv.state, at + tap * conv.state.stride[2], r.window[i]);
    }
  });
}

// Gate `which` of token t of a sequence and head.
template <class S>
KALMANET_KERNEL void run_layer_gate(const LayerBeforeJob& job, int which, int64_t n, int64_t t,
                                    int64_t head) {
  const Array& logit = job.logit[which];
  const S x = scalar_at<S>(logit, n, t, head, 0.0);
  S y;
  if (which == kLayerBeta) {
    y = sigmoid(x) + static_cast<S>(1e-6);
  } else if (which == kLayerAlpha) {
    y = logit.data == nullptr ? static_cast<S>(job.fixed_alpha) : sigmoid(x);
  } else if (which == kLayerDecay) {
    const S rate = exponential(load_element<S>(job.A_log, head * job.A_log.stride[0]));
    y = -rate * softplus(x + load_element<S>(job.dt_bias, head * job.dt_bias.stride[0]));
  } else {  // (NaN stays NaN: nobody has looked for one)
    const S low = static_cast<S>(job.min_log_ridge), high = static_cast<S>(job.max_log_ridge);
    y = exponential(x < low ? low : x > high ? high : x);
  }
  store_element<S>(job.gate[which], offset_of(job.gate[which], n, t, head), y);
}

inline KALMANET_BOTH int64_t layer_heads(const LayerBeforeJob& job) {
  return job.conv[0].heads + job.conv[1].heads + job.conv[2].heads;
}

// Block `unit` of sequence n: the heads of q, k and v, then the gates.
template <class S, int kTaps, class Group>
KALMANET_KERNEL void run_layer_before(Group& group, LayerBeforeShared<S>& shared,
                                      const LayerBeforeJob& job, int64_t unit, int64_t n,
                                      int threads) {
  using Registers = LayerBeforeRegisters<S, kTaps>;
  if (unit >= layer_heads(job)) {
    const int which = job.gates[unit - layer_heads(job)];
    group.each([&](int thread, Registers&) {
      KALMANET_LOOP
      for (int64_t t = 0; t < job.T; ++t) {
        KALMANET_LOOP
        for (int64_t head = thread; head < job.H; head += threads) {
          run_layer_gate<S>(job, which, n, t, head);
        }
      }
    });
    return;
  }
  int part = 0;
  int64_t head = unit;
  while (head >= job.conv[part].heads) head -= job.conv[part++].heads;
  run_layer_conv<S, kTaps>(group, shared, job, job.conv[part], head, n, threads);
}

template <class S>
struct LayerAfterRegisters {
  static constexpr int kColumns = static_cast<int>(kMaxHeadDim) / 32;  // a lane
  S o[kColumns], gate[kColumns], weight[kColumns], square;
};

// The heads of block `block` of sequence n.
template <class S, class Group>
KALMANET_KERNEL void run_layer_after(Group& group, const LayerAfterJob& job, int64_t block,
                                     int64_t n) {
  using Registers = LayerAfterRegisters<S>;
  const int V = static_cast<int>(job.V);
  const auto head_of = [&](int thread) { return block * kLayerAfterHeads + thread / 32; };
  // f(column, place) for a lane's columns.
  const auto columns = [&](int thread, auto&& f) {
    if (head_of(thread) >= job.H) return;
    KALMANET_UNROLL
    for (int i = 0; i < Registers::kColumns; ++i) {
      const int column = thread % 32 + 32 * i;
      if (column < V) f(column, i);
    }
  };
  KALMANET_LOOP
  for (int64_t t = 0; t < job.T; ++t) {
    group.each([&](int thread, Registers& r) {
      // (All of a lane's loads are on their way before the first number is needed.)
      const int64_t head = head_of(thread);
      const int64_t o_at = offset_of(job.o, n, t, head), g_at = offset_of(job.gate, n, t, head);
      columns(thread, [&](int column, int i) {
        r.o[i] = load_element<S>(job.o, o_at + column);
        r.gate[i] = job.gate.data == nullptr
                        ? S(0)
                        : load_element<S>(job.gate, g_at + column * job.gate.stride[3]);
        r.weight[i] = load_element<S>(job.weight, column * job.weight.stride[0]);
      });
      r.square = S(0);
      columns(thread, [&](int, int i) { r.square += r.o[i] * r.o[i]; });
    });
    group.template sum_lanes<32>([](Registers& r) -> S& { return r.square; });
    group.each([&](int thread, Registers& r) {
      const S inverse = S(1) / sqrt(r.square / static_cast<S>(V) + static_cast<S>(job.eps));
      const int64_t at = offset_of(job.y, n, t, head_of(thread));
      columns(thread, [&](int column, int i) {
        const S silu = job.gate.data == nullptr ? S(1) : r.gate[i] * sigmoid(r.gate[i]);
        store_element<S>(job.y, at + column * job.y.stride[3],
                         r.o[i] * inverse * r.weight[i] * silu);
      });
    });
  }
}

}  // namespace kalmanet::cuda
