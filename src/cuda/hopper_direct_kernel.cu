// The direct kernel for Hopper, compiled and launched.
#include "cuda/check.hpp"
#include "cuda/hopper_direct_body.hpp"
#include "cuda/launch.hpp"

namespace kalmanet::cuda {
namespace {

#ifndef KALMANET_TEAMS
#define KALMANET_TEAMS 2
#endif
// Warpgroups a block, each with a head of its own.
constexpr int kTeams = KALMANET_TEAMS;

__global__ void __launch_bounds__(HopperLayout::kThreads* kTeams, 2 / kTeams)
    gka_hopper_direct([[maybe_unused]] const __grid_constant__ GkaJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // (elsewhere it is never launched)
  extern __shared__ __align__(128) char shared_memory[];
  const int team = static_cast<int>(threadIdx.x) / HopperLayout::kThreads;
  const int64_t head = static_cast<int64_t>(blockIdx.y) * kTeams + team;
  if (head >= job.H) return;
  DeviceGroup<HopperRegisters, HopperLayout::kThreads> group;
  run_hopper_direct(group, reinterpret_cast<HopperShared*>(shared_memory)[team], job, blockIdx.x,
                    head);
#endif
}

}  // namespace

void launch_hopper_direct(const GkaJob& job, Stream stream) {
  constexpr int kShared = static_cast<int>(sizeof(HopperShared)) * kTeams;
  check(
      cudaFuncSetAttribute(gka_hopper_direct, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
      "cudaFuncSetAttribute");
  const unsigned teams = static_cast<unsigned>((job.H + kTeams - 1) / kTeams);
  gka_hopper_direct<<<dim3(static_cast<unsigned>(job.num_pieces), teams),
                      HopperLayout::kThreads * kTeams, kShared,
                      static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError(), "launch of gka_hopper_direct");
}

}  // namespace kalmanet::cuda
