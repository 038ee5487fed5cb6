// The backward's kernels for any shape, compiled and launched.
#include <algorithm>

#include "cuda/backward_first_body.hpp"
#include "cuda/backward_gradient_body.hpp"
#include "cuda/backward_launch.hpp"
#include "cuda/backward_solve_body.hpp"
#include "cuda/check.hpp"
#include "cuda/token_variants.hpp"

namespace kalmanet::cuda {
namespace {

template <class S, int KP>
__global__ void __launch_bounds__(TokenLayout<S, KP>::kThreads, kBlocksAMultiprocessor<S, KP>)
    gka_backward_solve(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<TokenRegisters<S, KP>> group;
  run_backward_solve<S, KP>(group, shared_memory, job, blockIdx.x, blockIdx.y);
}

__global__ void __launch_bounds__(BackwardFirstLayout::kThreads)
    gka_backward_first(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<BackwardFirstRegisters> group;
  run_backward_first(group, shared_memory, job, blockIdx.x, blockIdx.y, job.in.direct);
}

template <class S>
__global__ void __launch_bounds__(AdjointLayout::kThreads)
    gka_adjoint_segments(const __grid_constant__ BackwardJob job) {
  __shared__ AdjointShared<S> shared;
  DeviceGroup<AdjointRegisters<S>> group;
  run_adjoint_segment<S>(group, shared, job, blockIdx.x, blockIdx.y, blockIdx.z);
}

template <class S, int kWide>
__global__ void __launch_bounds__(256) gka_adjoint_sums(const __grid_constant__ BackwardJob job) {
  const int64_t e = (static_cast<int64_t>(blockIdx.z) * 256 + threadIdx.x) * kWide;
  if (e < job.in.K * (job.in.K + job.in.V)) {
    run_adjoint_sums<S, kWide>(job, blockIdx.x, blockIdx.y, e);
  }
}

template <class S>
__global__ void __launch_bounds__(GradientLayout<S>::kThreads)
    gka_gradients(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<GradientRegisters<S>> group;
  run_gradients<S>(group, shared_memory, job, blockIdx.x, gridDim.x);
}

// A thread an element, block by block over all of them.
template <class S>
__global__ void __launch_bounds__(256)
    gka_head_sums(const __grid_constant__ BackwardJob job, const Array gradient, const void* parts,
                  int64_t group, int64_t width, int64_t elements) {
  const int64_t heads = job.in.H / group;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; e < elements;
       e += static_cast<int64_t>(gridDim.x) * 256) {
    const int64_t head = e / width % heads, token = e / width / heads;
    run_head_sum<S>(job, gradient, parts, group, width, token / job.in.T, token % job.in.T, head,
                    e % width);
  }
}

dim3 grid_of(const BackwardJob& job, int64_t z) {
  return {static_cast<unsigned>(job.in.num_pieces), static_cast<unsigned>(job.in.H),
          static_cast<unsigned>(z)};
}

// f(S()).
template <class F>
void with_dtype(bool float64, F&& f) {
  if (float64) {
    f(double());
  } else {
    f(float());
  }
}

}  // namespace

int64_t gradient_block_bytes(bool float64, int64_t K, int64_t V) {
  return float64 ? GradientLayout<double>::block_bytes(K, V)
                 : GradientLayout<float>::block_bytes(K, V);
}

void launch_backward_solve(const BackwardJob& job, bool float64, Stream stream) {
  const GkaJob& in = job.in;
  with_variant(float64, in.K, [&]<class S, int KP>(S, std::integral_constant<int, KP>) {
    const auto kernel = gka_backward_solve<S, KP>;
    const int shared = static_cast<int>(token_shared_bytes<S, KP>(in.direct, in.spill_is_shared));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    kernel<<<grid_of(job, 1), TokenLayout<S, KP>::kThreads, shared,
             static_cast<cudaStream_t>(stream)>>>(job);
    check(cudaGetLastError(), "launch of gka_backward_solve");
  });
}

void launch_backward_first(const BackwardJob& job, Stream stream) {
  const int shared = static_cast<int>(backward_first_bytes(job.in.K, job.in.V));
  check(
      cudaFuncSetAttribute(gka_backward_first, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
      "cudaFuncSetAttribute");
  gka_backward_first<<<grid_of(job, 1), BackwardFirstLayout::kThreads, shared,
                       static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError(), "launch of gka_backward_first");
}

void launch_adjoints(const BackwardJob& job, bool float64, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t K = job.in.K, V = job.in.V;
  const dim3 tiles = grid_of(job, AdjointLayout::tiles(K, V));
  const int64_t wide = K % 4 == 0 && V % 4 == 0 ? 4 : 1;
  const dim3 sums = grid_of(job, (K * (K + V) + 256 * wide - 1) / (256 * wide));
  with_dtype(float64, [&]<class S>(S) {
    gka_adjoint_segments<S><<<tiles, AdjointLayout::kThreads, 0, s>>>(job);
    (wide == 4 ? gka_adjoint_sums<S, 4> : gka_adjoint_sums<S, 1>)<<<sums, 256, 0, s>>>(job);
  });
  check(cudaGetLastError(), "launch of gka_adjoints");
}

void launch_gradients(const BackwardJob& job, bool float64, int64_t blocks, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_dtype(float64, [&]<class S>(S) {
    const auto kernel = gka_gradients<S>;
    const int shared = static_cast<int>(GradientLanes<S>::shared_bytes(job.in.K, job.in.V));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    kernel<<<static_cast<unsigned>(blocks), GradientLayout<S>::kThreads, shared, s>>>(job);
  });
  check(cudaGetLastError(), "launch of gka_gradients");
}

void launch_head_sums(const BackwardJob& job, int64_t B, bool float64, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const auto launch = [&](const Array& gradient, const void* parts, int64_t group, int64_t width) {
    const int64_t elements = B * job.in.T * (job.in.H / group) * width;
    if (parts == nullptr || elements == 0) return;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((elements + 255) / 256, 4096));
    with_dtype(float64, [&]<class S>(S) {
      gka_head_sums<S><<<blocks, 256, 0, s>>>(job, gradient, parts, group, width, elements);
    });
    check(cudaGetLastError(), "launch of gka_head_sums");
  };
  launch(job.dq, job.dq_parts, job.in.q_group, job.in.K);
  launch(job.dk, job.dk_parts, job.in.k_group, job.in.K);
  launch(job.dv, job.dv_parts, job.in.v_group, job.in.V);
}

}  // namespace kalmanet::cuda
