// The backward's kernel of short memory, compiled and launched.
#include "cuda/backward_launch.hpp"
#include "cuda/backward_short_body.hpp"
#include "cuda/check.hpp"

namespace kalmanet::cuda {
namespace {

template <int kRows>
__global__ void __launch_bounds__(ShortLayout::kThreads, 1)
    gka_backward_short(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<ShortRegisters<kRows, 2>> group;
  run_backward_short<kRows>(group, *reinterpret_cast<BackwardShortShared*>(shared_memory), job,
                            blockIdx.x, gridDim.x);
}

template <int kRows>
void launch(const BackwardJob& job, cudaStream_t stream) {
  constexpr int kShared = sizeof(BackwardShortShared);
  const auto kernel = gka_backward_short<kRows>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
        "cudaFuncSetAttribute");
  kernel<<<short_blocks(job.in, kBackwardTokens / ShortPlan::kTokens, 1), ShortLayout::kThreads,
           kShared, stream>>>(job);
}

}  // namespace

void launch_backward_short(const BackwardJob& job, Stream stream) {
  launch_short_plan(job.in, true, stream);
  launch<1>(job, static_cast<cudaStream_t>(stream));
  launch<2>(job, static_cast<cudaStream_t>(stream));
  check(cudaGetLastError(), "launch of gka_backward_short");
}

}  // namespace kalmanet::cuda
