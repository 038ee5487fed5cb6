// A layer's decode step in the three parts that the GPU does one after the other.
#pragma once

#include "core/problem.hpp"
#include "cuda/layer_job.hpp"
#include "cuda/layer_step_job.hpp"
#include "kalmanet/layer_step.hpp"

namespace kalmanet::cuda {

struct LayerStepPlan {
  LayerBeforeJob before;
  core::GkaProblem problem;  // the recurrence, for GkaBackend::step
  GkaOutputs outputs;
  LayerAfterJob after;
  NormJob norm;  // the same by norm_vectors.hpp, where norm.lanes says so
};

// Bytes of memory between the parts.
int64_t layer_step_bytes(const core::GkaProblem& problem, const LayerStepInputs& inputs);

// `memory`: so many bytes of the GPU's.
//
// Between the parts q, k, v and the gates are float32 (float64 beside float64): 16-bit projections
// are not rounded once more. Two things are of 16 bits there: o, because that is how the
// recurrence's kernels know how accurate it has to be (token_body.hpp, largest_amplification); and
// q, k, v where a few tokens go through matrix units at once (few_kernel.hpp), which take no other.
LayerStepPlan plan_layer_step(const core::GkaProblem& problem, const LayerStepInputs& inputs,
                              const LayerStepStates& states, const View& o, const View& residual,
                              const LayerStepOptions& options, void* memory);

}  // namespace kalmanet::cuda
