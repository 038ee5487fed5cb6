// Copies into shared memory that need no registers on their way.
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

}  // namespace kalmanet::cuda
