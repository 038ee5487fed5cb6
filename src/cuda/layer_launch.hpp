// From the host to the layer's kernels (launch.hpp has GKA's).
#pragma once

#include "cuda/launch.hpp"
#include "cuda/layer_job.hpp"

namespace kalmanet::cuda {

// float64: of x or o; else sums are of float32.
void launch_conv(const ConvJob& job, bool backward, bool float64, Stream stream);
void launch_norm(const NormJob& job, bool backward, bool float64, Stream stream);
// NormJob::parts, behind launch_norm.
void launch_norm_weight(const NormJob& job, bool float64, Stream stream);
void launch_sum(const SumJob& job, Stream stream);

}  // namespace kalmanet::cuda
