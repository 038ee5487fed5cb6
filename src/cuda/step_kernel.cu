// The step kernel, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/launch.hpp"
#include "cuda/step_body.hpp"

namespace kalmanet::cuda {
namespace {

// Two blocks a multiprocessor: 80 KB of shared memory each, and 128 registers a thread.
__global__ void __launch_bounds__(StepLayout::kThreads, 2)
    gka_step_tokens(const __grid_constant__ GkaJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<StepRegisters> group;
  run_step(group, *reinterpret_cast<StepShared*>(shared_memory), job,
           blockIdx.x / static_cast<unsigned>(job.H), blockIdx.x % static_cast<unsigned>(job.H));
}

}  // namespace

int64_t step_shared_bytes() {
  return sizeof(StepShared);
}

void launch_step(const GkaJob& job, Stream stream) {
  const int shared = static_cast<int>(step_shared_bytes());
  check(cudaFuncSetAttribute(gka_step_tokens, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  gka_step_tokens<<<static_cast<unsigned>(job.num_pieces * job.H), StepLayout::kThreads, shared, static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError(), "launch of gka_step_tokens");
}

}  // namespace kalmanet::cuda
