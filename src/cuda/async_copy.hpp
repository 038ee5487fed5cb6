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
