// Entries of the CPU room for the norms: validated arguments in, work spread by the executor.
#pragma once

#include "kalmanet/norm.hpp"

namespace kalmanet::cpu {

void gated_rms_norm_forward(const NormInputs& inputs, const View& y, Executor& executor);
void gated_rms_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                             const View& d_gate, const View& d_weight, Executor& executor);

void unit_norm_forward(const UnitNormInputs& inputs, const View& y, Executor& executor);
void unit_norm_backward(const UnitNormInputs& inputs, const ConstView& dy, const View& dx,
                        Executor& executor);

}  // namespace kalmanet::cpu
