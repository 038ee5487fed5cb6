// Entries of the CUDA room for the layer's small operations: validated arguments (core/validate)
// in, work put on the stream.
#pragma once

#include <vector>

#include "core/problem.hpp"
#include "kalmanet/conv.hpp"
#include "kalmanet/layer_step.hpp"
#include "kalmanet/norm.hpp"

namespace kalmanet::cuda {

// The arguments of include/kalmanet/conv.hpp; `sequences` are the batch rows or the packed ones.
void causal_conv_forward(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                         const View& y, const View& final_state, bool silu, void* stream);
void causal_conv_backward(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                          const ConstView& dy, const ConstView& d_final_state, const View& dx,
                          const View& dweight, const View& dstate, bool silu, void* stream);
void causal_conv_step(const ConstView& x, const ConstView& weight, const View& state, const View& y,
                      bool silu, void* stream);

void gated_rms_norm_forward(const NormInputs& inputs, const View& y, void* stream);
void gated_rms_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                             const View& d_gate, const View& d_weight, void* stream);

void unit_norm_forward(const UnitNormInputs& inputs, const View& y, void* stream);
void unit_norm_backward(const UnitNormInputs& inputs, const ConstView& dy, const View& dx,
                        void* stream);

// The arguments of include/kalmanet/layer_step.hpp, validated; the stream is that of options.gka.
GkaReport layer_step(const core::GkaProblem& problem, const LayerStepInputs& inputs,
                     const LayerStepStates& states, const View& o, const View& residual,
                     const LayerStepOptions& options);

}  // namespace kalmanet::cuda
