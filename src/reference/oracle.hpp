// The oracles on whole problems: every sequence and head of a validated problem through the token
// loop.
//
// forward<double> and backward<double> are the float64 oracles (`exact` = Solver::direct,
// chebyshev(r), cg(r)), whatever the dtype of the tensors: inputs are
// converted, results rounded once. With Real = float the same loop runs in float32 from end to end:
// the naive same-precision version that the bounds of docs/numerics.md compare the fast kernels
// with.
#pragma once

#include "core/problem.hpp"

namespace kalmanet::reference {

// Chunks by which num_iter = auto chooses where options.chunk_size is 0.
inline constexpr int64_t kDefaultChunkSize = 64;

template <class Real>
GkaReport forward(const core::GkaProblem& problem, const GkaOutputs& outputs);

// The same with slots and drafts (gka_step).
template <class Real>
GkaReport step(const core::GkaProblem& problem, const GkaOutputs& outputs);

// Without saved_x the forward's solutions are computed again.
template <class Real>
GkaReport backward(const core::GkaProblem& problem, const ConstView& saved_x,
                   const GkaOutputGrads& output_grads, const GkaInputGrads& grads);

}  // namespace kalmanet::reference
