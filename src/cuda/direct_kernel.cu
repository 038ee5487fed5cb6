// The direct chunk kernel, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/direct_body.hpp"
#include "cuda/launch.hpp"
#include "cuda/short_plan.hpp"

namespace kalmanet::cuda {
namespace {

// Two blocks a multiprocessor: while one inverts, the other multiplies.
template <bool kAny>
__global__ void __launch_bounds__(DirectLayout::kThreads, 2)
    gka_direct([[maybe_unused]] const __grid_constant__ GkaJob job) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL  // (that chip has a kernel of its own: hopper_kernel.cu)
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<DirectRegisters>> group;
  run_direct(group, *reinterpret_cast<DirectShared*>(shared_memory), job, blockIdx.x,
             head_of_block(job, blockIdx.y));
#endif
}

}  // namespace

int64_t direct_shared_bytes() {
  return static_cast<int64_t>(sizeof(DirectShared));
}

void launch_direct(const GkaJob& job, Stream stream) {
  const int shared = static_cast<int>(direct_shared_bytes());
  with_rows(job, [&](auto any) {
    const auto kernel = gka_direct<any>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    kernel<<<dim3(static_cast<unsigned>(job.num_pieces), static_cast<unsigned>(job.H)),
             DirectLayout::kThreads, shared, static_cast<cudaStream_t>(stream)>>>(job);
  });
  check(cudaGetLastError(), "launch of gka_direct");
}

}  // namespace kalmanet::cuda
