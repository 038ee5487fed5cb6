// The backward's direct solver on matrix units, compiled and launched.
#include "cuda/backward_direct_body.hpp"
#include "cuda/backward_launch.hpp"
#include "cuda/check.hpp"

namespace kalmanet::cuda {
namespace {

// Two blocks a multiprocessor: while one inverts, the other multiplies.
template <bool kAny>
__global__ void __launch_bounds__(direct32::DirectLayout::kThreads, 2)
    gka_backward_direct(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  if (blockIdx.z == 1) {  // a sequence's first tokens, meanwhile
    DeviceGroup<BackwardFirstRegisters> group;
    run_backward_first(group, shared_memory, job, blockIdx.x, blockIdx.y, false);
    return;
  }
  WithRows<kAny, DeviceGroup<direct32::BackwardDirectRegisters>> group;
  direct32::run_backward_direct(group,
                                *reinterpret_cast<direct32::BackwardDirectShared*>(shared_memory),
                                job, blockIdx.x, head_of_block(job.in, blockIdx.y));
}

}  // namespace

void launch_backward_direct(const BackwardJob& job, Stream stream) {
  constexpr int kShared = sizeof(direct32::BackwardDirectShared);
  static_assert(kShared >=
                backward_first_bytes(direct32::DirectLayout::kDim, direct32::DirectLayout::kDim));
  with_rows(job.in, [&](auto any) {
    const auto kernel = gka_backward_direct<any>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
          "cudaFuncSetAttribute");
    kernel<<<dim3(static_cast<unsigned>(job.in.num_pieces), static_cast<unsigned>(job.in.H),
                  job.in.h0.data == nullptr ? 2 : 1),
             direct32::DirectLayout::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(job);
  });
  check(cudaGetLastError(), "launch of gka_backward_direct");
}

}  // namespace kalmanet::cuda
