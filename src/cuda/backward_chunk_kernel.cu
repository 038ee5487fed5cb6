// The backward's matrix-unit kernel, compiled and launched.
#include "cuda/backward_chunk_body.hpp"
#include "cuda/backward_launch.hpp"
#include "cuda/check.hpp"

namespace kalmanet::cuda {
namespace {

__global__ void __launch_bounds__(ChunkLayout::kThreads, 1)
    gka_backward_chunks(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<ChunkRegisters> group;
  run_backward_chunks(group, *reinterpret_cast<BackwardChunkShared*>(shared_memory), job,
                      blockIdx.x, blockIdx.y);
}

}  // namespace

int64_t backward_chunk_shared_bytes() {
  return static_cast<int64_t>(sizeof(BackwardChunkShared));
}

void launch_backward_chunks(const BackwardJob& job, Stream stream) {
  const int shared = static_cast<int>(backward_chunk_shared_bytes());
  const dim3 grid(static_cast<unsigned>(job.in.num_pieces), static_cast<unsigned>(job.in.H));
  check(cudaFuncSetAttribute(gka_backward_chunks, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared),
        "cudaFuncSetAttribute");
  gka_backward_chunks<<<grid, ChunkLayout::kThreads, shared, static_cast<cudaStream_t>(stream)>>>(
      job);
  check(cudaGetLastError(), "launch of gka_backward_chunks");
}

}  // namespace kalmanet::cuda
