// The kernels around the recurrence of a layer's decode step, compiled and launched.
#include <algorithm>

#include "cuda/dependent_launch.hpp"
#include "cuda/layer_launch.hpp"
#include "cuda/layer_step_body.hpp"

namespace kalmanet::cuda {
namespace {

// A grid's second dimension counts to this: longer batches go round.
constexpr int64_t kMostRows = 65535;

template <class S, int kTaps>
__global__ void __launch_bounds__(kMostLayerThreads)
    layer_before(const __grid_constant__ LayerBeforeJob job) {
  __shared__ LayerBeforeShared<S> shared;
  wait_for_kernel_before(job);
  DeviceGroup<LayerBeforeRegisters<S, kTaps>> group;
  for (int64_t n = blockIdx.y; n < job.N; n += gridDim.y) {
    run_layer_before<S, kTaps>(group, shared, job, blockIdx.x, n, static_cast<int>(blockDim.x));
    if (job.N > gridDim.y) group.barrier();  // the next sequence's squares lie where these did
  }
}

template <class S>
__global__ void __launch_bounds__(kLayerAfterThreads)
    layer_after(const __grid_constant__ LayerAfterJob job) {
  wait_for_kernel_before(job);
  DeviceGroup<LayerAfterRegisters<S>> group;
  for (int64_t n = blockIdx.y; n < job.N; n += gridDim.y) {
    run_layer_after<S>(group, job, blockIdx.x, n);
  }
}

dim3 grid_of(int64_t x, int64_t rows) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(std::min(rows, kMostRows)), 1};
}

template <class S>
void launch_before(const LayerBeforeJob& job, Stream stream) {
  const dim3 grid = grid_of(layer_heads(job) + job.num_gates, job.N);
  launch_dependent(job.W <= 4 ? layer_before<S, 4> : layer_before<S, 16>, grid, layer_threads(job),
                   job, stream, "launch of layer_before");
}

}  // namespace

void launch_layer_before(const LayerBeforeJob& job, bool float64, Stream stream) {
  float64 ? launch_before<double>(job, stream) : launch_before<float>(job, stream);
}

void launch_layer_after(const LayerAfterJob& job, bool float64, Stream stream) {
  const dim3 grid = grid_of((job.H + kLayerAfterHeads - 1) / kLayerAfterHeads, job.N);
  launch_dependent(float64 ? layer_after<double> : layer_after<float>, grid, kLayerAfterThreads,
                   job, stream, "launch of layer_after");
}

}  // namespace kalmanet::cuda
