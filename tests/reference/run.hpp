// Runs the oracles on a test Case, float64 or (Real = float) as the naive float32 version.
#pragma once

#include <vector>

#include "core/problem.hpp"
#include "reference/oracle.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

template <class Real, class T, class G>
GkaReport run_forward(Case<T, G>& c, const GkaOptions& options) {
  const GkaOutputs outputs = c.outputs();
  return reference::forward<Real>(core::validate_forward(c.inputs(), outputs, options), outputs);
}

// Solves for x again unless `with_saved_x`.
template <class Real, class T, class G>
GkaReport run_backward(Case<T, G>& c, const GkaOptions& options, bool with_saved_x = false) {
  const ConstView x = with_saved_x ? ConstView(c.x.view()) : ConstView();
  const GkaOutputGrads output_grads = c.output_grads();
  const GkaInputGrads grads = c.grads();
  return reference::backward<Real>(
      core::validate_backward(c.inputs(), x, output_grads, grads, options), x, output_grads, grads);
}

inline GkaOptions with(Solver solver, double ridge_ratio = 0.02, int num_iter = 30) {
  GkaOptions options;
  options.solver = solver;
  options.ridge_ratio = ridge_ratio;
  options.num_iter = num_iter;
  return options;
}

inline CaseSpec everything() {
  CaseSpec spec;
  spec.T = 23;
  spec.H = 2;
  spec.K = 6;
  spec.V = 5;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.ridge_tensor = spec.h0 = spec.u0 = true;
  return spec;
}

// The words of one tensor that belong to token t of batch row 0: [H, D] values.
inline std::vector<double> token(const ConstView& view, int64_t t) {
  ConstView v = view;
  const int64_t offset = t * view.stride[1];
  v.data = view.dtype == DType::float64
               ? static_cast<const void*>(static_cast<const double*>(view.data) + offset)
               : static_cast<const void*>(static_cast<const float*>(view.data) + offset);
  v.size[1] = 1;
  return values(v);
}

}  // namespace kalmanet::testing
