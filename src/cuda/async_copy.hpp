// Shared memory: copies into it that need no registers on their way, and reads that many lanes
// share.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/group.hpp"

namespace kalmanet::cuda {

// 16 bytes, aligned, from the GPU's memory into shared memory, where they are after the same
// thread's wait_copies().
KALMANET_KERNEL void copy16(void* to, const void* from) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  std::memcpy(to, from, 16);
#endif
}
KALMANET_KERNEL void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Of each thread that wrote to shared memory what store_bulk will read, before the barrier between.
KALMANET_KERNEL void before_bulk() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
#endif
}
// So many bytes (of 16) from shared memory to the GPU's, by Hopper's copy engine at one thread's
// word; they are there after its wait_bulk().
KALMANET_KERNEL void store_bulk(void* to, const void* from, int bytes) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))), "r"(bytes)
      : "memory");
#endif
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}
KALMANET_KERNEL void wait_bulk() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
#endif
}

// Two neighbours, aligned. Where many lanes read the same, shared memory serves 8 bytes a lane in
// one turn, and 16 in four.
KALMANET_KERNEL void load2(const float* p, float (&out)[2]) {
#ifdef __CUDACC__
  const float2 v = *reinterpret_cast<const float2*>(p);
  out[0] = v.x, out[1] = v.y;
#else
  out[0] = p[0], out[1] = p[1];
#endif
}

}  // namespace kalmanet::cuda
