// The causal convolution of four taps where its rows are dense and aligned: a thread takes
// neighbouring channels, 16 bytes a load (8 backward, of 16-bit numbers: registers), and the tokens
// of one span, four at once, so that their loads are under way together. A block is 32 such threads
// side by side and four spans; conv_body.hpp is the plain twin, for everything else.
#pragma once

#include "cuda/conv_body.hpp"
#include "cuda/vectors.hpp"

namespace kalmanet::cuda {

template <DType kType, int kCount>
struct ConvVectors {
  static constexpr int kTaps = 4, kPast = kTaps - 1, kGroup = 4;  // tokens at once
  using Numbers = Pack<kType, kCount>;

  const ConvJob& job;
  ConvSpan span;
  int64_t channel;  // the first
  float weight[kTaps][kCount];

  KALMANET_KERNEL ConvVectors(const ConvJob& j, int64_t number, int64_t c)
      : job(j), span(span_of(j, number)), channel(c) {
    KALMANET_UNROLL
    for (int v = 0; v < kCount; ++v) {
      float taps[kTaps];
      const int64_t at = (channel + v) * job.weight.stride[0];
      if (job.weight_fours) {
        load_neighbours(job.weight, at, taps);
      } else {
        KALMANET_UNROLL
        for (int i = 0; i < kTaps; ++i) {
          taps[i] = load_element<float>(job.weight, at + i * job.weight.stride[1]);
        }
      }
      KALMANET_UNROLL
      for (int i = 0; i < kTaps; ++i) weight[i][v] = taps[i];
    }
  }

  KALMANET_KERNEL int64_t row(const Array& a) const { return span.row * a.stride[0] + channel; }
  KALMANET_KERNEL int64_t in_state(const Array& a, int64_t tap, int v) const {
    return span.sequence * a.stride[0] + (channel + v) * a.stride[1] + tap * a.stride[2];
  }
  // Input of token t < span.first, or of one of the sequence.
  KALMANET_KERNEL float input(int64_t t, int v) const {
    if (t >= span.first) return load_element<float>(job.x, row(job.x) + t * job.x.stride[1] + v);
    const int64_t tap = t - span.first + kTaps;
    if (job.state.data == nullptr || tap < 0) return 0;
    return load_element<float>(job.state, in_state(job.state, tap, v));
  }
  // The three inputs in front of the span.
  KALMANET_KERNEL void fill(float (&window)[kPast + kGroup][kCount]) const {
    KALMANET_UNROLL
    for (int i = 0; i < kPast; ++i) {
      const int64_t t = span.begin - kPast + i;
      Numbers x;
      if (t >= span.first) {
        x.load(job.x.data, row(job.x) + t * job.x.stride[1]);
        KALMANET_UNROLL
        for (int v = 0; v < kCount; ++v) window[i][v] = x[v];
      } else {
        KALMANET_UNROLL
        for (int v = 0; v < kCount; ++v) window[i][v] = input(t, v);
      }
    }
  }
  KALMANET_KERNEL float dot(const float (&window)[kPast + kGroup][kCount], int i, int v) const {
    float sum = 0;
    KALMANET_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) sum += weight[tap][v] * window[i + tap][v];
    return sum;
  }
  KALMANET_KERNEL static void shift(float (&window)[kPast + kGroup][kCount]) {
    KALMANET_UNROLL
    for (int i = 0; i < kPast; ++i) {
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) window[i][v] = window[i + kGroup][v];
    }
  }

  KALMANET_KERNEL void forward() const {
    float window[kPast + kGroup][kCount];
    fill(window);
    int64_t from = row(job.x) + span.begin * job.x.stride[1];
    int64_t to = row(job.y) + span.begin * job.y.stride[1];
    const int tokens = static_cast<int>(span.end - span.begin);
    Numbers x[kGroup];
    const auto load = [&](int t) {
      KALMANET_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        if (t + i < tokens) {
          x[i].load(job.x.data, from + i * job.x.stride[1]);
        } else {
          x[i].clear();
        }
      }
      from += kGroup * job.x.stride[1];
    };
    load(0);
    KALMANET_LOOP
    for (int t = 0; t < tokens; t += kGroup) {
      KALMANET_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        KALMANET_UNROLL
        for (int v = 0; v < kCount; ++v) window[kPast + i][v] = x[i][v];
      }
      load(t + kGroup);  // on their way while these are computed with
      KALMANET_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        float y[kCount];
        KALMANET_UNROLL
        for (int v = 0; v < kCount; ++v) y[v] = dot(window, i, v);
        if (job.silu) {
          KALMANET_UNROLL
          for (int v = 0; v < kCount; ++v) y[v] *= quick_sigmoid<kType>(y[v]);
        }
        if (t + i >= tokens) continue;
        Numbers out;
        out.set(y);
        out.store(job.y.data, to + i * job.y.stride[1]);
      }
      shift(window);
      to += kGroup * job.y.stride[1];
    }
    // (As in conv_body.hpp: this thread alone read the channels' old state.)
    if (span.begin != span.first || job.final_state.data == nullptr) return;
    KALMANET_LOOP
    for (int v = 0; v < kCount; ++v) {
      KALMANET_LOOP
      for (int tap = 0; tap < kTaps; ++tap) {
        store_element<float>(job.final_state, in_state(job.final_state, tap, v),
                             input(span.last - kTaps + tap, v));
      }
    }
  }

  // The formulas are those of conv_body.hpp. `part`: what the span adds to the weight's gradient.
  KALMANET_KERNEL void backward(float (&part)[kTaps][kCount]) const {
    Backward b = {};
    fill(b.window);
    b.tokens = static_cast<int>(span.end - span.begin);
    // Tokens whose gradient the span needs: three more than it has, where there are.
    const int64_t left = span.last - span.begin;
    b.needed = left < b.tokens + kPast ? static_cast<int>(left) : b.tokens + kPast;
    b.x = row(job.x) + span.begin * job.x.stride[1];
    b.dy = row(job.dy) + span.begin * job.dy.stride[1];
    b.dx = row(job.dx) + (span.begin - kPast) * job.dx.stride[1];
    int t = 0;
    KALMANET_LOOP
    for (; t + kGroup <= b.tokens; t += kGroup) group<true>(b, t, part);
    KALMANET_LOOP
    for (; t < b.tokens + kPast; t += kGroup) group<false>(b, t, part);
    // What is seldom is left to the plain twin: the inputs that the final state holds as well, and
    // those of the state before.
    const int64_t kept = span.last - kTaps > span.begin ? span.last - kTaps : span.begin;
    const bool final = job.d_final.data != nullptr && job.dx.data != nullptr && kept < span.end;
    const bool state = job.dstate.data != nullptr && span.begin == span.first;
    if (!final && !state) return;
    KALMANET_LOOP
    for (int v = 0; v < kCount; ++v) {
      const ConvThread<float, kTaps> plain(job, span, channel + v);
      if (state) plain.input_gradients(span.first - kTaps, span.first);
      if (final) plain.input_gradients(kept, span.end);
    }
  }

 private:
  struct Backward {
    float window[kPast + kGroup][kCount], p[kPast + kGroup][kCount];
    int tokens, needed;
    int64_t x, dy, dx;  // where the next token's lie, and those of three tokens before it
  };

  // Tokens t .. t + 3 of the span. kFull: they are all its own.
  template <bool kFull>
  KALMANET_KERNEL void group(Backward& b, int t, float (&part)[kTaps][kCount]) const {
    Numbers x[kGroup], dy[kGroup];
    KALMANET_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      if (kFull || t + i < b.needed) {
        x[i].load(job.x.data, b.x);
        dy[i].load(job.dy.data, b.dy);
      } else {
        x[i].clear(), dy[i].clear();
      }
      b.x += job.x.stride[1];
      b.dy += job.dy.stride[1];
    }
    float added[kTaps][kCount];  // four tokens' first, so that a sum has few roundings
    KALMANET_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      float slope[kCount];
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) {
        b.window[kPast + i][v] = x[i][v];
        slope[v] = 1;
      }
      if (job.silu) {
        KALMANET_UNROLL
        for (int v = 0; v < kCount; ++v) {
          const float sum = dot(b.window, i, v), s = quick_sigmoid<kType>(sum);
          slope[v] = s * (1 + sum * (1 - s));
        }
      }
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) {
        const float gradient = dy[i][v] * slope[v];
        // (What is behind the sequence is no zero where its window has a NaN.)
        b.p[kPast + i][v] = kFull || t + i < b.needed ? gradient : 0;
        KALMANET_UNROLL
        for (int tap = 0; tap < kTaps; ++tap) {
          const float before = i == 0 ? 0 : added[tap][v];
          const float after = gradient * b.window[i + tap][v] + before;
          added[tap][v] = kFull || t + i < b.tokens ? after : before;
        }
      }
      const int s = t + i - kPast;
      if (s >= 0 && (kFull || s < b.tokens) && job.dx.data != nullptr) {
        float dx[kCount];
        KALMANET_UNROLL
        for (int v = 0; v < kCount; ++v) {
          dx[v] = 0;
          KALMANET_UNROLL
          for (int tap = 0; tap < kTaps; ++tap) {
            dx[v] += weight[tap][v] * b.p[i + kPast - tap][v];
          }
        }
        Numbers out;
        out.set(dx);
        out.store(job.dx.data, b.dx);
      }
      b.dx += job.dx.stride[1];
    }
    KALMANET_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) {
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) part[tap][v] += added[tap][v];
    }
    shift(b.window), shift(b.p);
  }
};

// A block: its spans and channels, whose number is the grid's shorter way: neighbouring blocks
// read neighbouring memory.
struct ConvBlock {
  int64_t spans, channels;
};
KALMANET_KERNEL ConvBlock conv_block(const ConvJob& job, int width, uint32_t block) {
  const uint32_t across = (static_cast<uint32_t>(job.D) + width - 1) / width;
  return {block / across, block % across};
}

template <int kCount>
struct ConvRegisters {
  float part[4][kCount];
};
template <int kCount>
struct ConvShared {
  alignas(16) float part[kConvSpans][4 * kCount][32];
};

template <DType kType>
KALMANET_KERNEL void run_conv_vectors(const ConvJob& job, int64_t spans, int64_t channels,
                                      int thread) {
  constexpr int kCount = kConvChannels<kType, false>;
  const int64_t span = spans * kConvSpans + thread / 32;
  const int64_t channel = (channels * 32 + thread % 32) * kCount;
  if (span >= job.num_spans || channel >= job.D) return;
  ConvVectors<kType, kCount>(job, span, channel).forward();
}

template <DType kType, class Group>
KALMANET_KERNEL void run_conv_vectors_backward(Group& group,
                                               ConvShared<kConvChannels<kType, true>>& shared,
                                               const ConvJob& job, int64_t spans,
                                               int64_t channels) {
  constexpr int kCount = kConvChannels<kType, true>;
  using Registers = ConvRegisters<kCount>;
  group.each([&](int thread, Registers& r) {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) r.part[i][v] = 0;
    }
    const int64_t span = spans * kConvSpans + thread / 32;
    const int64_t channel = (channels * 32 + thread % 32) * kCount;
    if (span >= job.num_spans || channel >= job.D) return;
    ConvVectors<kType, kCount>(job, span, channel).backward(r.part);
  });
  if (job.parts == nullptr) return;
  group.each([&](int thread, Registers& r) {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) {
        shared.part[thread / 32][v * 4 + i][thread % 32] = r.part[i][v];
      }
    }
  });
  group.barrier();
  // A thread one channel; its four spans in their order.
  group.each([&](int thread, Registers&) {
    const int64_t channel = channels * 32 * kCount + thread;
    if (channel >= job.D) return;
    KALMANET_UNROLL
    for (int tap = 0; tap < 4; ++tap) {
      double sum = 0;
      KALMANET_UNROLL
      for (int s = 0; s < kConvSpans; ++s) {
        sum += static_cast<double>(shared.part[s][thread % kCount * 4 + tap][thread / kCount]);
      }
      job.parts[(spans * job.D + channel) * 4 + tap] = sum;
    }
  });
}

}  // namespace kalmanet::cuda
