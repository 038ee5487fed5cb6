// Gated RMS norm of each head's output: y = weight * o / sqrt(mean(o^2) + eps) * silu(gate).
#pragma once

#include "kalmanet/export.hpp"
#include "kalmanet/placement.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet {

// dtypes: o, gate, y and their gradients share one of float32, float64, bfloat16 and float16;
// weight and d_weight are of it too, or float32 beside 16-bit o. 16-bit numbers are computed with
// in float32 and rounded once where they are written.
struct NormInputs {
  ConstView o;       // [R,V], any strides: R rows (B*T*H of them in the layer)
  ConstView gate;    // [R,V], optional: absent means no gate
  ConstView weight;  // [V]
  double eps = 1e-6;
};

KALMANET_API void gated_rms_norm_forward(const NormInputs& inputs, View y,
                                         const Placement& where = {});
// d_o, d_gate [R,V], d_weight [V]: each optional.
KALMANET_API void gated_rms_norm_backward(const NormInputs& inputs, ConstView dy, View d_o,
                                          View d_gate, View d_weight, const Placement& where = {});

}  // namespace kalmanet
