// The kernels of the causal convolution and the gated RMS norm, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/conv_body.hpp"
#include "cuda/layer_launch.hpp"
#include "cuda/norm_body.hpp"

namespace kalmanet::cuda {
namespace {

constexpr int kThreads = 128;

// A grid's x counts to 2^31 - 1, its other dimensions to 65535: the long one is x.
dim3 grid_of(int64_t x, int64_t width) {
  return {static_cast<unsigned>(x), static_cast<unsigned>((width + kThreads - 1) / kThreads), 1};
}

__device__ int64_t column() {
  return static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
}

template <class S, bool kBackward>
__global__ void __launch_bounds__(kThreads) conv(const __grid_constant__ ConvJob job) {
  if (column() < job.D) run_conv<S>(job, blockIdx.x, column(), kBackward);
}

template <class S, bool kBackward>
__global__ void __launch_bounds__(kNormThreads) norm(const __grid_constant__ NormJob job) {
  DeviceGroup<NormRegisters<S>> group;
  if (job.unit != UnitNorm::none) {
    run_unit_norm<S>(group, job, blockIdx.x);
  } else if constexpr (kBackward) {
    run_norm_backward<S>(group, job, blockIdx.x);
  } else {
    run_norm<S>(group, job, blockIdx.x);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) norm_weight(const __grid_constant__ NormJob job) {
  if (column() < job.V) run_norm_weight<S>(job, blockIdx.x, column());
}

__global__ void __launch_bounds__(kThreads) sum_parts(const __grid_constant__ SumJob job) {
  if (column() < job.width) run_sum(job, blockIdx.x, column());
}

// f(S()) of the dtype that is computed in.
template <class F>
void with_dtype(bool float64, F&& f) {
  if (float64) return f(double());
  return f(float());
}

}  // namespace

void launch_conv(const ConvJob& job, bool backward, bool float64, Stream stream) {
  if (job.num_spans == 0 || job.D == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid = grid_of(job.num_spans, job.D);
  with_dtype(float64, [&]<class S>(S) {
    if (backward) {
      conv<S, true><<<grid, kThreads, 0, s>>>(job);
    } else {
      conv<S, false><<<grid, kThreads, 0, s>>>(job);
    }
  });
  check(cudaGetLastError(), "launch of conv");
}

void launch_norm(const NormJob& job, bool backward, bool float64, Stream stream) {
  if (job.R == 0 || job.V == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>((job.R + kNormRows - 1) / kNormRows);
  with_dtype(float64, [&]<class S>(S) {
    if (backward) {
      norm<S, true><<<blocks, kNormThreads, 0, s>>>(job);
    } else {
      norm<S, false><<<blocks, kNormThreads, 0, s>>>(job);
    }
  });
  check(cudaGetLastError(), "launch of norm");
}

void launch_norm_weight(const NormJob& job, bool float64, Stream stream) {
  if (job.R == 0 || job.V == 0) return;
  const dim3 grid = grid_of((job.R + kNormRowsAPart - 1) / kNormRowsAPart, job.V);
  with_dtype(float64, [&]<class S>(S) {
    norm_weight<S><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(job);
  });
  check(cudaGetLastError(), "launch of norm_weight");
}

void launch_sum(const SumJob& job, Stream stream) {
  // (One group of none gives zeros.)
  const int64_t groups = job.count == 0 ? 1 : (job.count + kPartsAThread - 1) / kPartsAThread;
  const dim3 grid = grid_of(groups, job.width);
  sum_parts<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError(), "launch of sum_parts");
}

}  // namespace kalmanet::cuda
