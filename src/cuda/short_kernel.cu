// The kernels of short memory, compiled and launched: which pieces they do, and the forward's.
#include "cuda/check.hpp"
#include "cuda/launch.hpp"
#include "cuda/short_body.hpp"

namespace kalmanet::cuda {
namespace {

__global__ void __launch_bounds__(ShortPlanLayout::kThreads)
    gka_short_plan(const __grid_constant__ GkaJob job, bool backward) {
  __shared__ ShortPlanShared shared;
  DeviceGroup<ShortPlanRegisters> group;
  run_short_plan(group, shared, job, blockIdx.x, blockIdx.y, backward);
}

__global__ void __launch_bounds__(ShortPlanLayout::kThreads)
    gka_head_order(const __grid_constant__ GkaJob job) {
  __shared__ HeadOrderShared shared;
  DeviceGroup<HeadOrderRegisters> group;
  run_head_order(group, shared, job);
}

// Of up to 32 keys a token two blocks share a multiprocessor.
template <int kRows>
__global__ void __launch_bounds__(ShortLayout::kThreads, kRows == 1 ? 2 : 1)
    gka_short(const __grid_constant__ GkaJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<ShortRegisters<kRows, 1>> group;
  run_short<kRows>(group, *reinterpret_cast<ShortShared<1>*>(shared_memory), job, blockIdx.x,
                   gridDim.x);
}

template <int kRows>
void launch(const GkaJob& job, cudaStream_t stream) {
  constexpr int kShared = sizeof(ShortShared<1>);
  static_assert(2 * (kShared + 1024) <= 228 * 1024, "two blocks a multiprocessor");
  const auto kernel = gka_short<kRows>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
        "cudaFuncSetAttribute");
  kernel<<<short_blocks(job, ShortPlan::kBlocks, kRows == 1 ? 2 : 1), ShortLayout::kThreads,
           kShared, stream>>>(job);
}

}  // namespace

unsigned short_blocks(const GkaJob& job, int64_t parts, int64_t a_multiprocessor) {
  const int64_t items = job.num_pieces * job.H * parts;
  // (An odd number of them, so that every block meets every head.)
  const int64_t most = (a_multiprocessor * device_info().multiprocessors - 1) | 1;
  return static_cast<unsigned>(items < most ? items : most);
}

void launch_short_plan(const GkaJob& job, bool backward, Stream stream) {
  const dim3 grid(static_cast<unsigned>(job.num_pieces), static_cast<unsigned>(job.H));
  gka_short_plan<<<grid, ShortPlanLayout::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      job, backward);
  if (job.direct) {
    gka_head_order<<<1, ShortPlanLayout::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(job);
  }
  check(cudaGetLastError(), "launch of gka_short_plan");
}

void launch_short(const GkaJob& job, Stream stream) {
  launch_short_plan(job, false, stream);
  launch<1>(job, static_cast<cudaStream_t>(stream));
  launch<2>(job, static_cast<cudaStream_t>(stream));
  check(cudaGetLastError(), "launch of gka_short");
}

}  // namespace kalmanet::cuda
