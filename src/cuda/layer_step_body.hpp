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

// A number as it lies in memory, on its way while other loads are begun; and the number.
template <class S>
using Raw = std::conditional_t<sizeof(S) == 8, double, uint32_t>;
template <class S>
KALMANET_KERNEL Raw<S> load_raw(const Array& a, int64_t at) {
  if constexpr (sizeof(S) == 8) {
    return load_element<double>(a, at);
  } else {
    return load_bits(a, at);
  }
}
KALMANET_KERNEL float number_of(DType dtype, uint32_t bits) {
  return from_bits(dtype, bits);
}
KALMANET_KERNEL double number_of(DType, double x) {
  return x;
}

template <class S>
struct LayerBeforeShared {
  S squares[2][kMostLayerThreads / 32];  // of each warp's channels, of two tokens by turns
};
template <class S, int kTaps>
struct LayerBeforeRegisters {
  S weight[kTaps], window[kTaps], value, square;
  Raw<S> x;  // of the next token
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

// The W taps of a channel, right-aligned: the first kTaps - W places are zeros. kOwn: a state's,
// which has the dtype that is computed in.
template <int kTaps, bool kOwn, class S>
KALMANET_KERNEL void load_taps(const Array& a, int64_t at, int64_t stride, int64_t W, bool fours,
                               S (&out)[kTaps]) {
  if constexpr (kTaps == 4) {
    if (fours) {
      if constexpr (kOwn || sizeof(S) == 8) {
        return load4(static_cast<const S*>(a.data) + at, out);
      } else {
        return load_neighbours(a, at, out);
      }
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
  const auto load_x = [&](int thread, int64_t t) {
    return load_raw<S>(conv.x, offset_of(conv.x, n, t, head) + thread * conv.x.stride[3]);
  };
  group.each([&](int thread, Registers& r) {
    if (thread >= width) return;
    r.x = load_x(thread, 0);
    if (!convolves) return;
    load_taps<kTaps, true>(conv.state, state_at(thread), conv.state.stride[2], job.W,
                           conv.state_fours, r.window);
    load_taps<kTaps, false>(conv.weight, channel(thread) * conv.weight.stride[0],
                            conv.weight.stride[1], job.W, conv.weight_fours, r.weight);
  });
  KALMANET_LOOP
  for (int64_t t = 0; t < job.T; ++t) {
    group.each([&](int thread, Registers& r) {
      r.square = S(0);
      if (thread >= width) return;
      const S x = number_of(conv.x.dtype, r.x);
      if (t + 1 < job.T) r.x = load_x(thread, t + 1);
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
  Raw<S> o[kColumns], gate[kColumns], weight[kColumns];
  S square;
};

// The columns lane, lane + 32, ... of a row, all on their way at once.
template <class S, int kColumns>
KALMANET_KERNEL void load_columns(const Array& a, int64_t at, int64_t stride, int lane, int V,
                                  Raw<S> (&out)[kColumns]) {
  const auto load = [&](const auto* from) {
    KALMANET_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      if (lane + 32 * i < V) out[i] = from[(lane + 32 * i) * stride];
    }
  };
  if constexpr (sizeof(S) == 8) {
    load(static_cast<const double*>(a.data) + at);
  } else if (a.dtype == DType::float32) {
    load(static_cast<const uint32_t*>(a.data) + at);
  } else {
    load(static_cast<const uint16_t*>(a.data) + at);
  }
}

// The heads of block `block` of sequence n; where all rows are dense, norm_vectors.hpp does it.
template <class S, class Group>
KALMANET_KERNEL void run_layer_after(Group& group, const LayerAfterJob& job, int64_t block,
                                     int64_t n) {
  using Registers = LayerAfterRegisters<S>;
  constexpr int kColumns = Registers::kColumns;
  const int V = static_cast<int>(job.V);
  const bool gated = job.gate.data != nullptr;
  const auto head_of = [&](int thread) { return block * kLayerAfterHeads + thread / 32; };
  KALMANET_LOOP
  for (int64_t t = 0; t < job.T; ++t) {
    group.each([&](int thread, Registers& r) {
      const int lane = thread % 32;
      const int64_t head = head_of(thread);
      r.square = S(0);
      if (head >= job.H) return;
      load_columns<S>(job.o, offset_of(job.o, n, t, head), 1, lane, V, r.o);
      load_columns<S>(job.weight, 0, job.weight.stride[0], lane, V, r.weight);
      if (gated) {
        load_columns<S>(job.gate, offset_of(job.gate, n, t, head), job.gate.stride[3], lane, V,
                        r.gate);
      }
      KALMANET_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const S o = lane + 32 * i < V ? number_of(job.o.dtype, r.o[i]) : S(0);
        r.square += o * o;
      }
    });
    group.template sum_lanes<32>([](Registers& r) -> S& { return r.square; });
    group.each([&](int thread, Registers& r) {
      const int lane = thread % 32;
      const int64_t head = head_of(thread);
      if (head >= job.H) return;
      const S inverse = S(1) / sqrt(r.square / static_cast<S>(V) + static_cast<S>(job.eps));
      const int64_t at = offset_of(job.y, n, t, head);
      KALMANET_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const int column = lane + 32 * i;
        if (column >= V) continue;
        const S gate = gated ? number_of(job.gate.dtype, r.gate[i]) : S(0);
        const S silu = gated ? gate * sigmoid(gate) : S(1);
        store_element<S>(job.y, at + column * job.y.stride[3],
                         number_of(job.o.dtype, r.o[i]) * inverse *
                             number_of(job.weight.dtype, r.weight[i]) * silu);
      }
    });
  }
}

}  // namespace kalmanet::cuda
