// The convolution and the norm in plain LibTorch: float64, and what the operators are tested
// against.
#pragma once

#include "layers/ops.hpp"

namespace kalmanet::layers {

// As causal_conv() and gated_rms_norm(), in the dtype of the arguments; differentiable any number
// of times.
ConvResult plain_causal_conv(const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                             bool silu, bool want_final_state);
at::Tensor plain_gated_rms_norm(const at::Tensor& o, const OptionalTensor& gate,
                                const at::Tensor& weight, double eps);

}  // namespace kalmanet::layers
