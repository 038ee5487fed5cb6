// Checks of the fused decode step of a layer.
#pragma once

#include "core/problem.hpp"
#include "kalmanet/layer_step.hpp"

namespace kalmanet::core {

// The problem that is left for the recurrence: sizes, head groups, sequences, options; its states
// are h and u, and it has no gates, which the step makes itself.
GkaProblem validate_layer_step(const LayerStepInputs& inputs, const LayerStepStates& states,
                               const View& o, const View& residual,
                               const LayerStepOptions& options);

}  // namespace kalmanet::core
