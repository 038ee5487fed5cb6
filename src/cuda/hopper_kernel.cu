// The kernels for Hopper alone, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/hopper_direct_body.hpp"
#include "cuda/hopper_state_body.hpp"
#include "cuda/launch.hpp"
#include "cuda/short_plan.hpp"

namespace kalmanet::cuda {
namespace {

template <bool kAny>
__global__ void __launch_bounds__(HopperLayout::kThreads, 2)
    gka_hopper_direct([[maybe_unused]] const __grid_constant__ GkaJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // (elsewhere it is never launched)
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<HopperRegisters>> group;
  run_hopper_direct(group, *reinterpret_cast<HopperShared*>(shared_memory), job, blockIdx.x,
                    head_of_block(job, blockIdx.y));
#endif
}

template <bool kAny>
__global__ void __launch_bounds__(StateLayout::kThreads, 2)
    gka_hopper_states([[maybe_unused]] const __grid_constant__ GkaJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<HopperStateRegisters>> group;
  run_hopper_states(group, *reinterpret_cast<HopperStateShared*>(shared_memory), job, blockIdx.x,
                    blockIdx.y, blockIdx.z == 1);
#endif
}

}  // namespace

void launch_hopper_states(const GkaJob& job, Stream stream) {
  constexpr int kShared = static_cast<int>(sizeof(HopperStateShared));
  with_rows(job, [&](auto any) {
    const auto kernel = gka_hopper_states<any>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
          "cudaFuncSetAttribute");
    kernel<<<dim3(static_cast<unsigned>(job.num_pieces), static_cast<unsigned>(job.H), 2),
             StateLayout::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(job);
  });
  check(cudaGetLastError(), "launch of gka_hopper_states");
}

void launch_hopper_direct(const GkaJob& job, Stream stream) {
  constexpr int kShared = static_cast<int>(sizeof(HopperShared));
  with_rows(job, [&](auto any) {
    const auto kernel = gka_hopper_direct<any>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
          "cudaFuncSetAttribute");
    kernel<<<dim3(static_cast<unsigned>(job.num_pieces), static_cast<unsigned>(job.H)),
             HopperLayout::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(job);
  });
  check(cudaGetLastError(), "launch of gka_hopper_direct");
}

}  // namespace kalmanet::cuda
