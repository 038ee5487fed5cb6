// The step kernel, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/dependent_launch.hpp"
#include "cuda/doubled_group.hpp"
#include "cuda/few_body.hpp"
#include "cuda/launch.hpp"
#include "cuda/step_wide.hpp"

namespace kalmanet::cuda {
namespace {

// Two blocks a multiprocessor: 80 KB of shared memory each, and 128 registers a thread.
template <bool kOne>
__global__ void __launch_bounds__(StepLayout::kThreads, 2)
    gka_step_tokens(const __grid_constant__ GkaJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  launch_the_kernel_after(job);
  wait_for_the_kernel_before();
  DeviceGroup<StepRegisters> group;
  run_step<kOne>(group, *reinterpret_cast<StepShared*>(shared_memory), job, blockIdx.y, blockIdx.x);
}

// One block a multiprocessor: 128 registers for each of its threads, and two states' shared memory.
__global__ void __launch_bounds__(StepWideLayout::kThreads, 1)
    gka_step_wide([[maybe_unused]] const __grid_constant__ GkaJob job) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared_memory[];
  auto& shared = *reinterpret_cast<StepWideShared*>(shared_memory);
  launch_the_kernel_after(job);
  const auto barrier = [] { __syncthreads(); };
  const auto wait = [] { wait_for_the_kernel_before(); };
  if (uniform(static_cast<int>(threadIdx.x) / StepLayout::kThreads) == 0) {
    DevicePart<StepRegisters, StepLayout::kThreads, 0> group;
    run_step_wide<StepRole::solver>(group, group, shared, job, blockIdx.y, blockIdx.x, barrier,
                                    wait);
  } else {
    DevicePart<StepRegisters, StepLayout::kThreads, 1> group;
    run_step_wide<StepRole::reader>(group, group, shared, job, blockIdx.y, blockIdx.x, barrier,
                                    wait);
  }
#endif
}

constexpr size_t kFewShared = sizeof(FewShared) > sizeof(StepShared) ? sizeof(FewShared)
                                                                     : sizeof(StepShared);

// Two blocks again: 102 KB, and twice as many registers for half as many threads.
template <bool kLong>
__global__ void __launch_bounds__(FewLayout::kThreads, 2)
    gka_step_few(const __grid_constant__ GkaJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  launch_the_kernel_after(job);
  wait_for_the_kernel_before();
  const int64_t sequence = blockIdx.y, head = blockIdx.x;
  {
    DeviceGroup<FewRegisters> group;
    auto& shared = *reinterpret_cast<FewShared*>(shared_memory);
    if (!run_few<kLong>(group, shared, job, sequence, head)) return;
  }
  wait_copies();
  __syncthreads();
  DoubledGroup<StepRegisters, FewLayout::kThreads> group;
  static_assert(StepLayout::kThreads == 2 * FewLayout::kThreads);
  run_step<false>(group, *reinterpret_cast<StepShared*>(shared_memory), job, sequence, head,
                  job.is_draft);
}

template <class Kernel>
void launch(Kernel kernel, int threads, int64_t shared, const GkaJob& job, Stream stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(job.H), static_cast<unsigned>(job.num_pieces));
  launch_dependent(kernel, grid, threads, job, stream, "launch of a step kernel", shared);
}

}  // namespace

int64_t step_shared_bytes() {
  return kFewShared;
}

void launch_step(const GkaJob& job, bool few, Stream stream) {
  if (few) {
    launch(is_long(job) ? gka_step_few<true> : gka_step_few<false>, FewLayout::kThreads, kFewShared,
           job, stream);
  } else if (device_info().major == 9 && is_wide(job, device_info().multiprocessors)) {
    launch(gka_step_wide, StepWideLayout::kThreads, sizeof(StepWideShared), job, stream);
  } else if (is_one_token(job)) {
    launch(gka_step_tokens<true>, StepLayout::kThreads, sizeof(StepShared), job, stream);
  } else {
    launch(gka_step_tokens<false>, StepLayout::kThreads, sizeof(StepShared), job, stream);
  }
}

}  // namespace kalmanet::cuda
