// The matrix-unit kernels, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/chunk_body.hpp"
#include "cuda/launch.hpp"
#include "cuda/state_body.hpp"

namespace kalmanet::cuda {
namespace {

template <bool kAny>
__global__ void __launch_bounds__(ChunkLayout::kThreads, 1)
    gka_chunks(const __grid_constant__ GkaJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  WithRows<kAny, DeviceGroup<ChunkRegisters>> group;
  run_chunks(group, *reinterpret_cast<ChunkShared*>(shared_memory), job, blockIdx.x, blockIdx.y);
}

template <bool kAny>
__global__ void __launch_bounds__(StateLayout::kThreads, 2)
    gka_states(const __grid_constant__ GkaJob job) {
  __shared__ StateShared shared;
  WithRows<kAny, DeviceGroup<StateRegisters>> group;
  run_states(group, shared, job, blockIdx.x, blockIdx.y, blockIdx.z == 1);
}

__global__ void __launch_bounds__(256) gka_sums(const __grid_constant__ GkaJob job) {
  const int64_t e = (static_cast<int64_t>(blockIdx.z) * 256 + threadIdx.x) * 4;
  if (e < job.K * (job.K + job.V)) run_segment_sums<float, 4>(job, blockIdx.x, blockIdx.y, e);
}

// A block a piece and head, with its shared memory.
template <class Kernel>
dim3 grid_with(Kernel kernel, const GkaJob& job) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(chunk_shared_bytes())),
        "cudaFuncSetAttribute");
  return {static_cast<unsigned>(job.num_pieces), static_cast<unsigned>(job.H)};
}

}  // namespace

int64_t chunk_shared_bytes() {
  return static_cast<int64_t>(sizeof(ChunkShared));
}

void launch_chunk_states(const GkaJob& job, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(job.num_pieces), static_cast<unsigned>(job.H));
  if (device_info().major == 9) {
    launch_hopper_states(job, stream);
  } else {
    with_rows(job, [&](auto any) {
      gka_states<any><<<dim3(grid.x, grid.y, 2), StateLayout::kThreads, 0, s>>>(job);
    });
  }
  const int64_t elements = job.K * (job.K + job.V);
  gka_sums<<<dim3(grid.x, grid.y, static_cast<unsigned>((elements + 1023) / 1024)), 256, 0, s>>>(
      job);
  check(cudaGetLastError(), "launch of gka_states");
}

void launch_chunks(const GkaJob& job, bool segmented, Stream stream) {
  if (segmented) launch_chunk_states(job, stream);
  if (job.short_plans != nullptr) launch_short(job, stream);
  if (job.direct) {
    return device_info().major == 9 ? launch_hopper_direct(job, stream)
                                    : launch_direct(job, stream);
  }
  with_rows(job, [&](auto any) {
    const auto kernel = gka_chunks<any>;
    const dim3 grid = grid_with(kernel, job);
    kernel<<<grid, ChunkLayout::kThreads, chunk_shared_bytes(),
             static_cast<cudaStream_t>(stream)>>>(job);
  });
  check(cudaGetLastError(), "launch of gka_chunks");
}

}  // namespace kalmanet::cuda
