// Shared memory: copies into it that need no registers on their way, and reads that many lanes share.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/group.hpp"

namespace kalmanet::cuda {

// 16 bytes, aligned, from the GPU's memory into shared memory, where they are after the same
// thread's wait_copies().
KALMANET_KERNEL void copy16(void* to, const void* from) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(
                   __cvta_generic_to_shared(to))),
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

// Four neighbours, as load4, where many lanes read the same: two loads of 8 bytes, which shared memory serves in two
// turns where one of 16 takes it four.
KALMANET_KERNEL void load4_shared(const float* p, float (&out)[4]) {
#ifdef __CUDACC__
  const float2 a = reinterpret_cast<const float2*>(p)[0], b = reinterpret_cast<const float2*>(p)[1];
  out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y;
#else
  load4(p, out);
#endif
}
}  // namespace kalmanet::cuda
