// The token kernel and the states before segments, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/launch.hpp"
#include "cuda/segment_body.hpp"
#include "cuda/token_run.hpp"
#include "cuda/token_variants.hpp"

namespace kalmanet::cuda {
namespace {

template <class S, int KP, bool kDrafts>
__global__ void __launch_bounds__(TokenLayout<S, KP>::kThreads, kBlocksAMultiprocessor<S, KP>)
    gka_tokens(const __grid_constant__ GkaJob job) {
  extern __shared__ __align__(128) char shared_memory[];
  DeviceGroup<TokenRegisters<S, KP>> group;
  run_tokens<S, KP, kDrafts>(group, shared_memory, job, blockIdx.x, blockIdx.y);
}

template <class S>
__global__ void __launch_bounds__(SegmentLayout::kThreads)
    gka_segments(const __grid_constant__ GkaJob job) {
  __shared__ SegmentShared<S> shared;
  DeviceGroup<SegmentRegisters<S>> group;
  run_segment<S>(group, shared, job, blockIdx.x, blockIdx.y, blockIdx.z);
}

template <class S>
__global__ void __launch_bounds__(256) gka_segment_sums(const __grid_constant__ GkaJob job) {
  const int64_t e = static_cast<int64_t>(blockIdx.z) * 256 + threadIdx.x;
  if (e < job.K * (job.K + job.V)) run_segment_sums<S>(job, blockIdx.x, blockIdx.y, e);
}

dim3 grid_of(const GkaJob& job, int64_t z) {
  return {static_cast<unsigned>(job.num_pieces), static_cast<unsigned>(job.H),
          static_cast<unsigned>(z)};
}

}  // namespace

int64_t plan_tokens(GkaJob& job, bool float64, bool rows, int64_t max_shared) {
  with_variant(float64, job.K, [&]<class S, int KP>(S, std::integral_constant<int, KP>) {
    job.spill_is_shared = TokenLayout<S, KP>::kSpilled > 0 &&
                          token_shared_bytes<S, KP>(job.direct, true) <= max_shared;
    job.scratch_bytes = token_scratch_bytes<S, KP>(job.K, job.V, job.direct, job.spill_is_shared);
    // One piece a sequence and a place for every final state: U needs no other.
    const bool u_has_place = rows && job.u_final.data != nullptr;
    const bool rest = TokenLayout<S, KP>::kSpilled > 0 || job.direct;
    if (u_has_place && !rest && !job.is_draft) job.scratch_bytes = 0;
  });
  return job.scratch_bytes * job.num_pieces * job.H;
}

void launch_tokens(const GkaJob& job, bool float64, Stream stream) {
  with_variant(float64, job.K, [&]<class S, int KP>(S, std::integral_constant<int, KP>) {
    const auto kernel = has_drafts(job) ? gka_tokens<S, KP, true> : gka_tokens<S, KP, false>;
    const int shared = static_cast<int>(token_shared_bytes<S, KP>(job.direct, job.spill_is_shared));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    kernel<<<grid_of(job, 1), TokenLayout<S, KP>::kThreads, shared,
             static_cast<cudaStream_t>(stream)>>>(job);
    check(cudaGetLastError(), "launch of gka_tokens");
  });
}

void launch_segments(const GkaJob& job, bool float64, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 tiles = grid_of(job, SegmentLayout::tiles(job.K, job.V));
  const dim3 sums = grid_of(job, (job.K * (job.K + job.V) + 255) / 256);
  if (float64) {
    gka_segments<double><<<tiles, SegmentLayout::kThreads, 0, s>>>(job);
    gka_segment_sums<double><<<sums, 256, 0, s>>>(job);
  } else {
    gka_segments<float><<<tiles, SegmentLayout::kThreads, 0, s>>>(job);
    gka_segment_sums<float><<<sums, 256, 0, s>>>(job);
  }
  check(cudaGetLastError(), "launch of gka_segments");
}

}  // namespace kalmanet::cuda
