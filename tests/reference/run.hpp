// Runs the oracles on a test Case, float64 or (Real = float) as the naive float32 version.
#pragma once

#include "core/problem.hpp"
#include "reference/oracle.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

template <class Real, class T>
GkaReport run_forward(Case<T>& c, const GkaOptions& options) {
  const GkaOutputs outputs = c.outputs();
  return reference::forward<Real>(core::validate_forward(c.inputs(), outputs, options), outputs);
}

// Solves for x again unless `with_saved_x`.
template <class Real, class T>
GkaReport run_backward(Case<T>& c, const GkaOptions& options, bool with_saved_x = false) {
  const ConstView x = with_saved_x ? ConstView(c.x.view()) : ConstView();
  const GkaOutputGrads output_grads = c.output_grads();
  const GkaInputGrads grads = c.grads();
  return reference::backward<Real>(
      core::validate_backward(c.inputs(), x, output_grads, grads, options), x, output_grads, grads);
}

}  // namespace kalmanet::testing
