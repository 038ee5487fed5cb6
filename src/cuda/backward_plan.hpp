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

// Whether x and z are solved for on matrix units.
bool fits_backward_chunks(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                          const GkaInputGrads& grads, const DeviceInfo& device);

// A backward on matrix units is done for some heads after others, which share one workspace.
// How many at a time: as few as cost no more rounds of the multiprocessors than all of them.
int64_t heads_at_a_time(const core::GkaProblem& problem, int64_t pieces, const DeviceInfo& device);

// Bytes of a backward's workspace, each array of it.
struct BackwardBytes {
  int64_t pieces, states, decays, adjoints, solve, solutions, weights, since, gradients;
  int64_t dq_parts, dk_parts, dv_parts;
  int64_t chunk_scratch, left_over, short_plans;  // of the matrix-unit kernels
  int64_t blocks;                                 // of the gradients' kernel
  int64_t total() const;
};
// `chunks`: on matrix units, so that the token kernel does what is left over alone.
std::vector<Piece> backward_pieces_of(const core::GkaProblem& problem, bool chunks);
// `all`: as if every gradient were asked for. Plans the job's token kernel; of job.in.H heads.
BackwardBytes backward_bytes(const core::GkaProblem& problem, BackwardJob& job, int64_t pieces,
                             bool chunks, const DeviceInfo& device, bool all);
// The same of a problem that has sizes but no tensors, at most.
int64_t most_backward_bytes(const core::GkaProblem& problem, const DeviceInfo& device);

// Puts the whole backward on the problem's stream; returns whether on matrix units.
bool run_backward(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                  const GkaInputGrads& grads, const DeviceInfo& device);

}  // namespace kalmanet::cuda
