// Entry of the CPU room for the layer's fused decode step: validated arguments in.
#pragma once

#include "core/problem.hpp"
#include "kalmanet/layer_step.hpp"

namespace kalmanet::cpu {

GkaReport layer_step(const core::GkaProblem& problem, const LayerStepInputs& inputs,
                     const LayerStepStates& states, const View& o, const View& residual,
                     const LayerStepOptions& options);

}  // namespace kalmanet::cpu
