// The CPU backend's three operations on a validated problem.
#pragma once

#include "core/problem.hpp"

namespace kalmanet::cpu {

GkaReport forward(const core::GkaProblem& problem, const GkaOutputs& outputs);
GkaReport backward(const core::GkaProblem& problem, const GkaSaved& saved,
                   const GkaOutputGrads& output_grads, const GkaInputGrads& grads);
GkaReport step(const core::GkaProblem& problem, const GkaOutputs& outputs);

// Bytes that one call allocates at most (kalmanet/workspace.hpp).
int64_t workspace_bytes(GkaOperation operation, const core::GkaProblem& problem,
                        const GkaShape& shape);

// Tokens a chunk: as asked, at most the kernels' lanes.
int64_t chosen_chunk_size(const core::GkaProblem& problem);

}  // namespace kalmanet::cpu
