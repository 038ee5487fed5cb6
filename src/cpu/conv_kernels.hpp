// The causal convolution's kernels, generic over a vector type: channels are vector lanes, four
// tokens at a time share the loads of the weights and of each other's past.
//
// S is float, or double for float64 tensors. The job structs hold plain data, so that this header
// can be read without any vector type.
#pragma once

#include <cstdint>

#include "cpu/vec_math.hpp"

namespace kalmanet::cpu {

// `rows` tokens of `channels` adjacent channels; row r of the input is x + r * x_stride, and the
// width - 1 rows before row 0 are past + i * past_stride, oldest first (16 >= width >= 1).
template <class S>
struct ConvWindow {
  const S* past = nullptr;
  int64_t past_stride = 0;
  const S* x = nullptr;
  int64_t x_stride = 0;
  int64_t rows = 0, channels = 0, width = 0;
  const S* weight = nullptr;  // tap j of channel c: weight[j * weight_stride + c]
  int64_t weight_stride = 0;
};

// y_r = act(pre_r), pre_r = sum_j weight_j x_{r-width+1+j}.
template <class S>
struct ConvForwardJob {
  ConvWindow<S> in;
  S* y = nullptr;
  int64_t y_stride = 0;
  bool silu = false;
};

// dpre_r = act'(pre_r) dy_r; dweight_j += sum_r dpre_r x_{r-width+1+j} (left out where null; laid
// out as the weight).
template <class S>
struct ConvGradJob {
  ConvWindow<S> in;
  const S* dy = nullptr;
  int64_t dy_stride = 0;
  S* dpre = nullptr;
  int64_t dpre_stride = 0;
  S* dweight = nullptr;
  bool silu = false;
};

template <class S>
struct ConvKernels {
  void (*forward)(const ConvForwardJob<S>&);
  void (*grad)(const ConvGradJob<S>&);
};

// One vector of channels, kTile tokens, kTaps taps (0: as many as `width` says).
template <class Vec, int kTile, int kTaps, bool kPartial>
struct ConvTile {
  using Reg = typename Vec::Reg;
  using S = typename Vec::Elem;

  const S* const* rows;  // kTile + width - 1 of them, from the oldest
  int64_t channel;
  int64_t lanes;  // of the last, partial vector
  int64_t width;

  [[gnu::always_inline]] Reg load(const S* p) const {
    return kPartial ? Vec::load_n(p + channel, lanes) : Vec::load(p + channel);
  }
  [[gnu::always_inline]] void store(S* p, Reg a) const {
    if (kPartial) {
      Vec::store_n(p + channel, a, lanes);
    } else {
      Vec::store(p + channel, a);
    }
  }

  // pre[r] = sum_j w_j rows[r + j], always from the oldest tap to the newest.
  [[gnu::always_inline]] void convolve(const ConvWindow<S>& in, Reg (&pre)[kTile]) const {
    if constexpr (kTaps > 0) {
      Reg x[kTile + kTaps - 1];
#pragma GCC unroll 16
      for (int i = 0; i < kTile + kTaps - 1; ++i) x[i] = load(rows[i]);
#pragma GCC unroll 16
      for (int j = 0; j < kTaps; ++j) {
        const Reg w = load(in.weight + j * in.weight_stride);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; ++r) {
          pre[r] = j == 0 ? Vec::mul(w, x[r]) : Vec::fma(w, x[r + j], pre[r]);
        }
      }
    } else {
      const Reg first = load(in.weight);
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) pre[r] = Vec::mul(first, load(rows[r]));
      for (int64_t j = 1; j < width; ++j) {
        const Reg w = load(in.weight + j * in.weight_stride);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; ++r) pre[r] = Vec::fma(w, load(rows[r + j]), pre[r]);
      }
    }
  }

  [[gnu::always_inline]] void add_weight_grad(const Reg (&dpre)[kTile], S* dweight,
                                              int64_t stride) const {
    const int64_t taps = kTaps > 0 ? kTaps : width;
    for (int64_t j = 0; j < taps; ++j) {
      Reg sum = Vec::mul(dpre[0], load(rows[j]));
#pragma GCC unroll 4
      for (int r = 1; r < kTile; ++r) sum = Vec::fma(dpre[r], load(rows[r + j]), sum);
      store(dweight + j * stride, Vec::add(sum, load(dweight + j * stride)));
    }
  }

  [[gnu::always_inline]] void forward(const ConvForwardJob<S>& job, S* y) const {
    Reg pre[kTile];
    convolve(job.in, pre);
    if (job.silu) {
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) pre[r] = vec_silu<Vec>(pre[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) store(y + r * job.y_stride, pre[r]);
  }

  [[gnu::always_inline]] void grad(const ConvGradJob<S>& job, const S* dy, S* dpre) const {
    Reg d[kTile];
    if (job.silu) {
      Reg pre[kTile];
      convolve(job.in, pre);
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) {
        d[r] = Vec::mul(load(dy + r * job.dy_stride), vec_silu_derivative<Vec>(pre[r]));
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) d[r] = load(dy + r * job.dy_stride);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) store(dpre + r * job.dpre_stride, d[r]);
    if (job.dweight != nullptr) add_weight_grad(d, job.dweight, job.in.weight_stride);
  }
};

template <class Vec, int kTile, int kTaps, class S>
void conv_tile(const ConvForwardJob<S>& job, const S* const* rows, int64_t r) {
  S* y = job.y + r * job.y_stride;
  int64_t c = 0;
  for (; c + Vec::kWidth <= job.in.channels; c += Vec::kWidth) {
    ConvTile<Vec, kTile, kTaps, false>{rows, c, Vec::kWidth, job.in.width}.forward(job, y);
  }
  if (c < job.in.channels) {
    ConvTile<Vec, kTile, kTaps, true>{rows, c, job.in.channels - c, job.in.width}.forward(job, y);
  }
}

template <class Vec, int kTile, int kTaps, class S>
void conv_tile(const ConvGradJob<S>& job, const S* const* rows, int64_t r) {
  const S* dy = job.dy + r * job.dy_stride;
  S* dpre = job.dpre + r * job.dpre_stride;
  int64_t c = 0;
  for (; c + Vec::kWidth <= job.in.channels; c += Vec::kWidth) {
    ConvTile<Vec, kTile, kTaps, false>{rows, c, Vec::kWidth, job.in.width}.grad(job, dy, dpre);
  }
  if (c < job.in.channels) {
    ConvTile<Vec, kTile, kTaps, true>{rows, c, job.in.channels - c, job.in.width}.grad(job, dy,
                                                                                       dpre);
  }
}

template <class Vec, int kTaps, class Job>
void conv_rows(const Job& job) {
  // Tokens at a time: their inputs and results, the weights and what SiLU needs have to fit the
  // registers.
  constexpr int kTile = 4;
  constexpr int kMaxWidth = 16;
  using S = typename Vec::Elem;
  const ConvWindow<S>& in = job.in;
  const S* rows[kTile + kMaxWidth - 1];
  const auto fill = [&](int64_t r, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from_past = r + i;  // counted from the oldest row of the past
      const int64_t from_x = from_past - (in.width - 1);
      rows[i] = from_x < 0 ? in.past + from_past * in.past_stride : in.x + from_x * in.x_stride;
    }
  };
  int64_t r = 0;
  for (; r + kTile <= in.rows; r += kTile) {
    fill(r, kTile + in.width - 1);
    conv_tile<Vec, kTile, kTaps>(job, rows, r);
  }
  for (; r < in.rows; ++r) {
    fill(r, in.width);
    conv_tile<Vec, 1, kTaps>(job, rows, r);
  }
}

template <class Vec, class Job>
void conv_kernel(const Job& job) {
  if (job.in.width == 4) {
    conv_rows<Vec, 4>(job);
  } else {
    conv_rows<Vec, 0>(job);
  }
}

template <class Vec>
constexpr ConvKernels<typename Vec::Elem> conv_kernels() {
  return {
      .forward = &conv_kernel<Vec, ConvForwardJob<typename Vec::Elem>>,
      .grad = &conv_kernel<Vec, ConvGradJob<typename Vec::Elem>>,
  };
}

}  // namespace kalmanet::cpu
