// Checks of the layer's small operations: causal convolution, gated RMS norm, unit norm. They throw
// Error before anything is written; what passes needs no further check.
#pragma once

#include <vector>

#include "core/problem.hpp"
#include "kalmanet/conv.hpp"
#include "kalmanet/norm.hpp"

namespace kalmanet::core {

// The sequences of the batch: its rows, or the packed ones.
std::vector<Sequence> validate_conv_forward(const ConvInputs& inputs, const View& y,
                                            const View& final_state);
std::vector<Sequence> validate_conv_backward(const ConvInputs& inputs, const ConstView& dy,
                                             const ConstView& d_final_state, const View& dx,
                                             const View& dweight, const View& dstate);
void validate_conv_step(const ConstView& x, const ConstView& weight, const View& state,
                        const View& y);

void validate_norm_forward(const NormInputs& inputs, const View& y);
void validate_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                            const View& d_gate, const View& d_weight);

void validate_unit_norm_forward(const UnitNormInputs& inputs, const View& y);
void validate_unit_norm_backward(const UnitNormInputs& inputs, const ConstView& dy, const View& dx);

}  // namespace kalmanet::core
