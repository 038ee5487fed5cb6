// Entry of the CPU room for the causal convolution: validated arguments in, work spread by the
// executor.
#pragma once

#include <vector>

#include "core/problem.hpp"
#include "kalmanet/conv.hpp"

namespace kalmanet::cpu {

// The arguments of include/kalmanet/conv.hpp, already validated (core/validate): `sequences` are
// the batch rows or the packed sequences.
void causal_conv_forward(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                         const View& y, const View& final_state, bool silu, Executor& executor);
void causal_conv_backward(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                          const ConstView& dy, const ConstView& d_final_state, const View& dx,
                          const View& dweight, const View& dstate, bool silu, Executor& executor);
void causal_conv_step(const ConstView& x, const ConstView& weight, const View& state, const View& y,
                      bool silu, Executor& executor);

}  // namespace kalmanet::cpu
