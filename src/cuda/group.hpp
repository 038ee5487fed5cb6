// How a kernel's body is written once and run twice: by the threads of a block on the GPU, and by a
// loop on the CPU, where the tests run the very same index arithmetic against the oracle.
//
// A body is a template over a group. group.each(f) runs f(thread, registers) for every thread of the
// block; what a thread keeps from one each() to the next lies in its registers, a plain struct that
// the compiler takes apart. group.barrier() separates what one thread writes to shared memory from
// what another reads. On the CPU the threads of an each() run one after the other, in either order:
// a result that depends on the order is a missing barrier.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KALMANET_KERNEL __device__ __forceinline__
#define KALMANET_BOTH __host__ __device__
#define KALMANET_UNROLL _Pragma("unroll")
#else
#include "core/half.hpp"
#define KALMANET_KERNEL inline
#define KALMANET_BOTH
#define KALMANET_UNROLL
#endif

namespace kalmanet::cuda {

#ifdef __CUDACC__
template <class Registers>
class DeviceGroup {
 public:
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    f(static_cast<int>(threadIdx.x), registers_);
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }
  // In each thread, the sum of member(registers) over its kLanes neighbours (a power of two, aligned):
  // the same bits in all of them.
  template <int kLanes, class Member>
  __device__ __forceinline__ void sum_lanes(Member&& member) {
    auto& value = member(registers_);
    KALMANET_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) value += __shfl_xor_sync(~0u, value, mask);
  }

 private:
  Registers registers_;
};
#endif

template <class Registers>
class HostGroup {
 public:
  HostGroup(int threads, bool backwards)
      : registers_(static_cast<size_t>(threads)), backwards_(backwards) {}
  template <class F>
  void each(F&& f) {
    const int n = static_cast<int>(registers_.size());
    for (int i = 0; i < n; ++i) {
      const int thread = backwards_ ? n - 1 - i : i;
      f(thread, registers_[static_cast<size_t>(thread)]);
    }
  }
  void barrier() {}
  template <int kLanes, class Member>
  void sum_lanes(Member&& member) {
    using Value = std::decay_t<decltype(member(registers_[0]))>;
    std::vector<Value> old(registers_.size());
    for (int mask = 1; mask < kLanes; mask *= 2) {
      for (size_t i = 0; i < old.size(); ++i) old[i] = member(registers_[i]);
      for (size_t i = 0; i < old.size(); ++i) {
        member(registers_[i]) = old[i] + old[i ^ static_cast<size_t>(mask)];
      }
    }
  }

 private:
  std::vector<Registers> registers_;
  bool backwards_;
};

// Four neighbours in 16-byte aligned memory (32 of float64).
KALMANET_KERNEL void load4(const float* p, float (&out)[4]) {
#ifdef __CUDACC__
  const float4 v = *reinterpret_cast<const float4*>(p);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
#else
  for (int i = 0; i < 4; ++i) out[i] = p[i];
#endif
}
KALMANET_KERNEL void load4(const double* p, double (&out)[4]) {
#ifdef __CUDACC__
  const double2 a = reinterpret_cast<const double2*>(p)[0], b = reinterpret_cast<const double2*>(p)[1];
  out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y;
#else
  for (int i = 0; i < 4; ++i) out[i] = p[i];
#endif
}
KALMANET_KERNEL void store4(float* p, const float (&in)[4]) {
#ifdef __CUDACC__
  *reinterpret_cast<float4*>(p) = make_float4(in[0], in[1], in[2], in[3]);
#else
  for (int i = 0; i < 4; ++i) p[i] = in[i];
#endif
}
KALMANET_KERNEL void store4(double* p, const double (&in)[4]) {
#ifdef __CUDACC__
  reinterpret_cast<double2*>(p)[0] = make_double2(in[0], in[1]);
  reinterpret_cast<double2*>(p)[1] = make_double2(in[2], in[3]);
#else
  for (int i = 0; i < 4; ++i) p[i] = in[i];
#endif
}

}  // namespace kalmanet::cuda
