// Causal depthwise convolution over time, with SiLU: the short convolution in front of q, k and v.
#pragma once

#include <cstdint>
#include <span>

#include "kalmanet/export.hpp"
#include "kalmanet/placement.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet {

inline constexpr int64_t kMaxConvWidth = 16;

// y_t = act( sum_{j<W} weight[d, j] * x_{t-W+1+j} ), x before a sequence's start read from `state`.
//
// dtypes: x, y, the states and all their gradients share one of float32, float64, bfloat16 and
// float16; weight and dweight are of it too, or float32 beside 16-bit x. 16-bit numbers are
// computed with in float32 and rounded once where they are written; a state holds inputs as they
// were.
struct ConvInputs {
  ConstView x;       // [B,T,D]
  ConstView weight;  // [D,W], W in 1..kMaxConvWidth
  ConstView state;   // [N,D,W], optional: the last W inputs before the first token, oldest first
                     // (its column 0 is never read: a causal window of W needs W-1 past inputs)
  std::span<const int64_t> cu_seqlens;  // packed sequences, as in GkaInputs
};

// `final_state` [N,D,W] (optional) receives the last W inputs, of the state too where a sequence is
// shorter than W, zeros where there were none; it may be the very memory of `state`.
KALMANET_API void causal_conv_forward(const ConvInputs& inputs, View y, View final_state, bool silu,
                                      const Placement& where = {});

// dx [B,T,D], dweight [D,W], dstate [N,D,W]: each optional. d_final_state [N,D,W] optional.
KALMANET_API void causal_conv_backward(const ConvInputs& inputs, ConstView dy,
                                       ConstView d_final_state, View dx, View dweight, View dstate,
                                       bool silu, const Placement& where = {});

// One token a sequence: x and y [N,D], state [N,D,W] updated in place.
KALMANET_API void causal_conv_step(ConstView x, ConstView weight, View state, View y, bool silu,
                                   const Placement& where = {});

}  // namespace kalmanet
