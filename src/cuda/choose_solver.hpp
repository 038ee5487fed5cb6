// What Solver::automatic is on the GPU, by a written rule: nothing is measured at run time.
#pragma once

#include "core/problem.hpp"

namespace kalmanet::cuda {

// Chebyshev steps that take as long as one direct solve, by the token kernels: one token of 128
// sequences and 32 heads takes 5.10 ms by direct and 0.653 by chebyshev(30) (docs/gpu.md), and
// 5.10 / 0.653 * 30 = 234.
inline constexpr int kStepsOfADirectSolve = 234;

// f(problem), with Solver::automatic replaced:
//  - one ridge ratio for all tokens that meets the tolerance within kStepsOfADirectSolve steps:
//    chebyshev with as many steps as it needs;
//  - a smaller one, or one for each token (which the host does not see): direct.
template <class F>
auto with_solver(const core::GkaProblem& problem, const F& f) {
  if (problem.options.solver != Solver::automatic) return f(problem);
  core::GkaProblem chosen = problem;
  chosen.options.solver = Solver::direct;
  if (!problem.inputs.ridge_ratio.defined()) {
    const double tolerance = problem.options.tolerance > 0 ? problem.options.tolerance
                                                           : core::dtype_tolerance(problem.dtype);
    const int steps = chebyshev_num_iter(problem.options.ridge_ratio, tolerance);
    if (steps <= kStepsOfADirectSolve) {
      chosen.options.solver = Solver::chebyshev;
      chosen.options.num_iter = steps;
    }
  }
  return f(chosen);
}

}  // namespace kalmanet::cuda
