// What Solver::automatic is on the GPU, by a written rule: nothing is measured at run time.
#pragma once

#include "core/problem.hpp"

namespace kalmanet::cuda {

// Chebyshev steps that take as long as one direct solve, by the token kernels: one token of 128
// sequences and 32 heads takes 5.10 ms by direct and 0.653 by chebyshev(30) (docs/gpu.md), and
// 5.10 / 0.653 * 30 = 234.
inline constexpr int kStepsOfADirectSolve = 234;
// The same by chunks on matrix units: B1 T8192 H32 takes 2.4 ms by direct and 4.0 by chebyshev(30).
// Counted as if all of the latter were its steps, 18: a little in chebyshev's favour.
inline constexpr int kStepsOfADirectChunk = 18;

// f(problem), with Solver::automatic replaced:
//  - one ridge ratio for all tokens that meets the tolerance within `most_steps`: chebyshev with as
//    many steps as it needs;
//  - a smaller one, or one for each token (which the host does not see): direct.
template <class F>
auto with_solver(const core::GkaProblem& problem, int most_steps, const F& f) {
  if (problem.options.solver != Solver::automatic) return f(problem);
  core::GkaProblem chosen = problem;
  chosen.options.solver = Solver::direct;
  if (!problem.inputs.ridge_ratio.defined()) {
    const double tolerance = problem.options.tolerance > 0 ? problem.options.tolerance
                                                           : core::dtype_tolerance(problem.dtype);
    const int steps = chebyshev_num_iter(problem.options.ridge_ratio, tolerance);
    if (steps <= most_steps) {
      chosen.options.solver = Solver::chebyshev;
      chosen.options.num_iter = steps;
    }
  }
  return f(chosen);
}

}  // namespace kalmanet::cuda
