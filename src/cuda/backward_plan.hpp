// From a validated problem to the backward's job, and its kernels in their order.
#pragma once

#include <vector>

#include "core/problem.hpp"
#include "cuda/backward_job.hpp"
#include "cuda/launch.hpp"

namespace kalmanet::cuda {

// All but pieces and workspace.
BackwardJob backward_job_of(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                            const GkaInputGrads& grads);

// Bytes of a backward's workspace, each array of it.
struct BackwardBytes {
  int64_t pieces, states, decays, adjoints, solve, solutions, weights, since, gradients;
  int64_t dq_parts, dk_parts, dv_parts;
  int64_t blocks;  // of the gradients' kernel
  int64_t total() const;
};
// `job`: with num_pieces; its plan for the token kernel is made here. `all`: as if every gradient
// were asked for.
BackwardBytes backward_bytes(const core::GkaProblem& problem, BackwardJob& job,
                             const DeviceInfo& device, bool all);

// Puts the whole backward on the problem's stream.
void run_backward(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                  const GkaInputGrads& grads, const DeviceInfo& device);

}  // namespace kalmanet::cuda
