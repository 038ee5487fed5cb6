// Programmatic dependent launch (Hopper): a kernel launched so may be brought to the
// multiprocessors while the one before it is at work, and waits there for its end before it reads
// anything but its job. (For .cu files.)
#pragma once

#include "cuda/check.hpp"
#include "cuda/launch.hpp"

namespace kalmanet::cuda {

// The kernel after this one may come; this one's job, whose 64-byte lines are in its constant cache
// by then, is read meanwhile.
template <class Job>
__device__ __forceinline__ void launch_the_kernel_after([[maybe_unused]] const Job& job) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  const auto* const words = reinterpret_cast<const uint32_t*>(&job);
  uint32_t all = 0;
#pragma unroll
  for (size_t i = 0; i < sizeof(Job) / 4; i += 16) all ^= words[i];
  if (all == 1) asm volatile("nanosleep.u32 0;");  // (so that it is read: this does nothing)
#endif
}
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Both: the first thing that most such kernels do.
template <class Job>
__device__ __forceinline__ void wait_for_kernel_before(const Job& job) {
  launch_the_kernel_after(job);
  wait_for_the_kernel_before();
}

template <class Job>
void launch_dependent(void (*kernel)(Job), dim3 grid, int threads, const Job& job, Stream stream,
                      const char* what, int64_t shared = 0) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  // (Code for other chips, translated from PTX of sm_80, does not know how to wait.)
  config.numAttrs = device_info().major == 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, job), what);
}

}  // namespace kalmanet::cuda
