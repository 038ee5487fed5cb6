// The kernel of a sequence's first tokens, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/first_body.hpp"
#include "cuda/launch.hpp"

namespace kalmanet::cuda {
namespace {

__global__ void __launch_bounds__(FirstLayout::kThreads)
    gka_first_tokens(const __grid_constant__ GkaJob job, int64_t from) {
  __shared__ FirstShared shared;
  DeviceGroup<FirstRegisters> group;
  run_first(group, shared, job, from + blockIdx.x, blockIdx.y);
}

}  // namespace

void launch_first_tokens(const GkaJob& job, int64_t num_pieces, Stream stream) {
  if (num_pieces == job.num_pieces) return;
  const dim3 grid(static_cast<unsigned>(num_pieces - job.num_pieces), static_cast<unsigned>(job.H));
  gka_first_tokens<<<grid, FirstLayout::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      job, job.num_pieces);
  check(cudaGetLastError(), "launch of gka_first_tokens");
}

}  // namespace kalmanet::cuda
