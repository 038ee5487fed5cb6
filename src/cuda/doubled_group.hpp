// Twice as many threads as a block has, each of its threads two of them: what must run now and then
// in a block of half its size. Of DeviceGroup's operations those that the step kernel takes.
#pragma once

#include "cuda/group.hpp"

#ifdef __CUDACC__
namespace kalmanet::cuda {

template <class Registers, int kThreads>
class DoubledGroup {
 public:
  __device__ __forceinline__ DoubledGroup() : thread_(static_cast<int>(threadIdx.x)) {}
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    __builtin_assume(thread_ >= 0 && thread_ < kThreads);
    f(thread_, registers_[0]);
    f(thread_ + kThreads, registers_[1]);
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }
  template <int kLanes, class Member>
  __device__ __forceinline__ void sum_lanes(Member&& member) {
    auto& low = member(registers_[0]);
    auto& high = member(registers_[1]);
    KALMANET_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) {
      low += __shfl_xor_sync(~0u, low, mask);
      high += __shfl_xor_sync(~0u, high, mask);
    }
  }
  template <int kMask, class To, class From>
  __device__ __forceinline__ void exchange(To&& to, From&& from) {
    to(registers_[0]) = __shfl_xor_sync(~0u, from(registers_[0]), kMask);
    to(registers_[1]) = __shfl_xor_sync(~0u, from(registers_[1]), kMask);
  }

 private:
  int thread_;
  Registers registers_[2];
};

}  // namespace kalmanet::cuda
#endif
