// The layer's two norms, a row at a time: of each head's output and of its queries and keys.
#pragma once

#include "kalmanet/export.hpp"
#include "kalmanet/placement.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet {

// Gated RMS norm of each head's output: y = weight * o / sqrt(mean(o^2) + eps) * silu(gate).
//
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

// Queries and keys to unit length, a head.
enum class QkNorm {
  official,  // x / (|x| + eps)
  fla,       // x / sqrt(|x|^2 + eps)
};

// y = x / s with s by `kind`, |x| the Euclidean norm of the row. A row of zeros stays one, and its
// norm counts as a constant to the gradient: dx = dy / s. Otherwise
//
//   dx = dy / s - x (x . dy) / (|x| s^2)     (fla: x (x . dy) / s^3)
//
// dtypes: x, y and their gradients share one of float32, float64, bfloat16 and float16; 16-bit
// numbers are computed with in float32 and rounded once where they are written.
struct UnitNormInputs {
  ConstView x;  // [R,K], any strides: R rows (B*T*heads of them in the layer)
  QkNorm kind = QkNorm::official;
  double eps = 1e-6;  // > 0, a normal float32
};

KALMANET_API void unit_norm_forward(const UnitNormInputs& inputs, View y,
                                    const Placement& where = {});
KALMANET_API void unit_norm_backward(const UnitNormInputs& inputs, ConstView dy, View dx,
                                     const Placement& where = {});

}  // namespace kalmanet
