// From the host to the layer's kernels (launch.hpp has GKA's).
#pragma once

#include "cuda/launch.hpp"
#include "cuda/layer_job.hpp"
#include "cuda/layer_step_job.hpp"

namespace kalmanet::cuda {

// float64: of x or o; else sums are of float32.
void launch_conv(const ConvJob& job, bool backward, bool float64, Stream stream);
void launch_norm(const NormJob& job, bool backward, bool float64, Stream stream);
// NormJob::parts, behind launch_norm.
void launch_norm_weight(const NormJob& job, bool float64, Stream stream);
void launch_sum(const SumJob& job, Stream stream);

// A layer's decode step, before and after the recurrence's; float64: of q, k, v.
void launch_layer_before(const LayerBeforeJob& job, bool float64, Stream stream);
void launch_layer_after(const LayerAfterJob& job, bool float64, Stream stream);

}  // namespace kalmanet::cuda
