// Programmatic dependent launch (Hopper): a kernel launched so may be brought to the
// multiprocessors while the one before it is at work, and waits there for its end before it reads
// anything but its job. (For .cu files.)
#pragma once

#include "cuda/check.hpp"
#include "cuda/launch.hpp"

namespace kalmanet::cuda {

// The first thing such a kernel does. Its job's 64-byte lines are in its constant cache by then.
template <class Job>
__device__ __forceinline__ void wait_for_kernel_before([[maybe_unused]] const Job& job) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  const auto* const words = reinterpret_cast<const uint32_t*>(&job);
  uint32_t all = 0;
#pragma unroll
  for (size_t i = 0; i < sizeof(Job) / 4; i += 16) all ^= words[i];
  if (all == 1) asm volatile("nanosleep.u32 0;");  // (so that it is read: this does nothing)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class Job>
void launch_dependent(void (*kernel)(Job), dim3 grid, int threads, const Job& job, Stream stream,
                      const char* what) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
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
