// Gated RMS norm of each head's output: y = weight * o / sqrt(mean(o^2) + eps) * silu(gate).
#pragma once

#include "kalmanet/executor.hpp"
#include "kalmanet/export.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet {

struct NormInputs {
  ConstView o;       // [R,V] float32, any strides: R rows (B*T*H of them in the layer)
  ConstView gate;    // [R,V], optional: absent means no gate
  ConstView weight;  // [V]
  double eps = 1e-6;
};

KALMANET_API void gated_rms_norm_forward(const NormInputs& inputs, View y,
                                         Executor* executor = nullptr);
// d_o, d_gate [R,V], d_weight [V]: each optional.
KALMANET_API void gated_rms_norm_backward(const NormInputs& inputs, ConstView dy, View d_o,
                                          View d_gate, View d_weight, Executor* executor = nullptr);

}  // namespace kalmanet
