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

// Hopper's copy engine: whole pieces of memory at one thread's word, past the registers and past
// the path that loads and stores of shared memory take. (On other chips these do nothing: no kernel
// there calls them.)
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 900
#define KALMANET_BULK(...) __VA_ARGS__
#else
#define KALMANET_BULK(...)
#endif
#ifdef __CUDACC__
KALMANET_KERNEL uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Of each thread that wrote to shared memory what store_bulk will read, before the barrier between.
KALMANET_KERNEL void before_bulk() {
#ifdef __CUDACC__
  KALMANET_BULK(asm volatile("fence.proxy.async.shared::cta;" :: : "memory");)
#endif
}
// So many bytes (of 16) from shared memory to the GPU's; they are there after the thread's
// wait_bulk_stores().
KALMANET_KERNEL void store_bulk([[maybe_unused]] void* to, [[maybe_unused]] const void* from,
                                [[maybe_unused]] int bytes) {
#ifdef __CUDACC__
  KALMANET_BULK(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                             "cp.async.bulk.commit_group;" ::"l"(to),
                             "r"(shared_address(from)), "r"(bytes) : "memory");)
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}
KALMANET_KERNEL void wait_bulk_stores() {
#ifdef __CUDACC__
  KALMANET_BULK(asm volatile("cp.async.bulk.wait_group 0;" :: : "memory");)
#endif
}
// The other way. `arrival`, in shared memory, is begun by one thread, before a barrier; whoever
// waits for it sees the bytes. Once.
KALMANET_KERNEL void begin_arrival([[maybe_unused]] uint64_t* arrival) {
#ifdef __CUDACC__
  KALMANET_BULK(asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                             "fence.mbarrier_init.release.cluster;" ::"r"(
                                 shared_address(arrival)) : "memory");)
#endif
}
KALMANET_KERNEL void load_bulk([[maybe_unused]] void* to, [[maybe_unused]] const void* from,
                               [[maybe_unused]] int bytes, [[maybe_unused]] uint64_t* arrival) {
#ifdef __CUDACC__
  KALMANET_BULK(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%2], %3;\n"
                   "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                   "%3, [%2];" ::"r"(shared_address(to)),
                   "l"(from), "r"(shared_address(arrival)), "r"(bytes) : "memory");)
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}
KALMANET_KERNEL void wait_arrival([[maybe_unused]] uint64_t* arrival) {
#ifdef __CUDACC__
  KALMANET_BULK(uint32_t done; do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, "
        "p; "
        "}"
        : "=r"(done)
        : "r"(shared_address(arrival))
        : "memory");
  } while (done == 0);)
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
