// The kernels of the causal convolution and the gated RMS norm, compiled and launched.
#include <type_traits>

#include "cuda/conv_vectors.hpp"
#include "cuda/dependent_launch.hpp"
#include "cuda/layer_launch.hpp"
#include "cuda/norm_vectors.hpp"

namespace kalmanet::cuda {
namespace {

constexpr int kThreads = 128;
enum class NormKind { gated, gated_backward, unit, unit_backward };

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

template <DType kType>
__global__ void __launch_bounds__(kConvThreads, 4)
    conv_vectors(const __grid_constant__ ConvJob job) {
  const ConvBlock block = conv_block(job, 32 * kConvChannels<kType, false>, blockIdx.x);
  run_conv_vectors<kType>(job, block.spans, block.channels, static_cast<int>(threadIdx.x));
}

template <DType kType>
__global__ void __launch_bounds__(kConvThreads, 4)
    conv_vectors_backward(const __grid_constant__ ConvJob job) {
  __shared__ ConvShared<kConvChannels<kType, true>> shared;
  DeviceGroup<ConvRegisters<kConvChannels<kType, true>>> group;
  const ConvBlock block = conv_block(job, 32 * kConvChannels<kType, true>, blockIdx.x);
  run_conv_vectors_backward<kType>(group, shared, job, block.spans, block.channels);
}

template <DType kType, int kLoads, NormKind kKind>
__global__ void __launch_bounds__(kNormThreads) norm_vectors(const __grid_constant__ NormJob job) {
  if constexpr (kKind == NormKind::gated) wait_for_kernel_before(job);  // (in decode, a step)
  DeviceGroup<NormVectorRegisters<kType, kLoads>> group;
  NormVectors<kType, kLoads, decltype(group)> rows{group, job};
  if constexpr (kKind == NormKind::gated) rows.forward(blockIdx.x);
  if constexpr (kKind == NormKind::unit) rows.template unit<false>(blockIdx.x);
  if constexpr (kKind == NormKind::unit_backward) rows.template unit<true>(blockIdx.x);
  if constexpr (kKind == NormKind::gated_backward) {
    __shared__ NormVectorShared shared;
    rows.backward(shared, blockIdx.x);
  }
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

// f(Constant<dtype>()) of the dtypes that are computed with in float32.
template <DType kType>
using Constant = std::integral_constant<DType, kType>;
template <class F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::float32) return f(Constant<DType::float32>());
  if (dtype == DType::bfloat16) return f(Constant<DType::bfloat16>());
  f(Constant<DType::float16>());
}

void launch_conv_vectors(const ConvJob& job, bool backward, cudaStream_t stream) {
  with_type(job.x.dtype, [&]<DType kType>(Constant<kType>) {
    const int64_t width =
        32 * (backward ? kConvChannels<kType, true> : kConvChannels<kType, false>);
    const auto grid = static_cast<unsigned>((job.num_spans + kConvSpans - 1) / kConvSpans *
                                            ((job.D + width - 1) / width));
    if (backward) {
      conv_vectors_backward<kType><<<grid, kConvThreads, 0, stream>>>(job);
    } else {
      conv_vectors<kType><<<grid, kConvThreads, 0, stream>>>(job);
    }
  });
  check(cudaGetLastError(), "launch of conv_vectors");
}

template <DType kType, int kLoads>
void launch_norm_vectors(const NormJob& job, bool backward, cudaStream_t stream) {
  const bool unit = job.unit != UnitNorm::none;
  const int64_t at_once = !unit && backward ? kNormVectorRows : kNormThreads / job.lanes;
  const auto blocks = static_cast<unsigned>((job.R + at_once - 1) / at_once);
  if (!unit && !backward) {
    return launch_dependent(norm_vectors<kType, kLoads, NormKind::gated>, blocks, kNormThreads, job,
                            stream, "launch of norm_vectors");
  }
  auto kernel = norm_vectors<kType, kLoads, NormKind::gated_backward>;
  if (unit) {
    kernel = backward ? norm_vectors<kType, kLoads, NormKind::unit_backward>
                      : norm_vectors<kType, kLoads, NormKind::unit>;
  }
  kernel<<<blocks, kNormThreads, 0, stream>>>(job);
  check(cudaGetLastError(), "launch of norm_vectors");
}

}  // namespace

void launch_conv(const ConvJob& job, bool backward, bool float64, Stream stream) {
  if (job.num_spans == 0 || job.D == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  if (job.vectors) return launch_conv_vectors(job, backward, s);
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
  if (job.lanes != 0) {
    if (job.loads == 2) return launch_norm_vectors<DType::float32, 2>(job, backward, s);
    return with_type(job.o.dtype, [&]<DType kType>(Constant<kType>) {
      launch_norm_vectors<kType, 1>(job, backward, s);
    });
  }
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
