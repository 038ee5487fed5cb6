// The backward's matrix-unit kernels, compiled and launched.
#include <algorithm>

#include "cuda/backward_adjoint_chunk.hpp"
#include "cuda/backward_chunk_body.hpp"
#include "cuda/backward_launch.hpp"
#include "cuda/backward_tile_values.hpp"
#include "cuda/check.hpp"

namespace kalmanet::cuda {
namespace {

template <bool kAny>
__global__ void __launch_bounds__(ChunkLayout::kThreads, 1)
    gka_backward_chunks(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<ChunkRegisters>> group;
  run_backward_chunks(group, *reinterpret_cast<BackwardChunkShared*>(shared_memory), job,
                      blockIdx.x, blockIdx.y);
}

template <bool kAny>
__global__ void __launch_bounds__(TileLayout::kThreads, 1)
    gka_adjoint_chunks(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<TileRegisters>> group;
  run_tile_adjoints(group, *reinterpret_cast<TileShared*>(shared_memory), job, blockIdx.x,
                    blockIdx.y);
}

template <bool kAny>
__global__ void __launch_bounds__(TileLayout::kThreads, 1)
    gka_gradient_keys(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<TileRegisters>> group;
  run_tile_gradients<TileKeys>(group, *reinterpret_cast<TileShared*>(shared_memory), job,
                               blockIdx.x, gridDim.x);
}

template <bool kAny>
__global__ void __launch_bounds__(TileLayout::kThreads, 1)
    gka_gradient_values(const __grid_constant__ BackwardJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<TileRegisters>> group;
  run_tile_gradients<TileValues>(group, *reinterpret_cast<TileShared*>(shared_memory), job,
                                 blockIdx.x, gridDim.x);
}

template <class Kernel>
void launch(Kernel kernel, dim3 grid, size_t shared, const BackwardJob& job, Stream stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        "cudaFuncSetAttribute");
  kernel<<<grid, ChunkLayout::kThreads, shared, static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError(), "launch of the backward's chunks");
}

unsigned size_of_grid(int64_t n) {
  return static_cast<unsigned>(n);
}

}  // namespace

int64_t backward_chunk_shared_bytes() {
  return static_cast<int64_t>(std::max(sizeof(BackwardChunkShared), sizeof(TileShared)));
}
int64_t gradient_chunk_block_bytes() {
  return TileLayout::kScratchFloats * static_cast<int64_t>(sizeof(float));
}

void launch_backward_chunks(const BackwardJob& job, Stream stream) {
  with_rows(job.in, [&](auto any) {
    launch(gka_backward_chunks<any>, {size_of_grid(job.in.num_pieces), size_of_grid(job.in.H)},
           sizeof(BackwardChunkShared), job, stream);
  });
}
void launch_adjoint_chunks(const BackwardJob& job, Stream stream) {
  with_rows(job.in, [&](auto any) {
    launch(gka_adjoint_chunks<any>, {size_of_grid(job.in.num_pieces), size_of_grid(job.in.H)},
           sizeof(TileShared), job, stream);
  });
}
void launch_gradient_chunks(const BackwardJob& job, int64_t blocks, Stream stream) {
  with_rows(job.in, [&](auto any) {
    launch(gka_gradient_keys<any>, {size_of_grid(blocks)}, sizeof(TileShared), job, stream);
    launch(gka_gradient_values<any>, {size_of_grid(blocks)}, sizeof(TileShared), job, stream);
  });
}

}  // namespace kalmanet::cuda
