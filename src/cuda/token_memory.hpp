// What memory a block of the token kernel needs, and where in it what lies.
#pragma once

#include "cuda/token_kernel.hpp"

namespace kalmanet::cuda {

// Bytes of scratch that a block needs beside shared memory: U where it has no final place (always
// counted: whether it is needed depends on the piece), what H spills, the factor.
template <class S, int KP>
constexpr int64_t token_scratch_bytes(int64_t K, int64_t V, bool direct, bool spill_is_shared) {
  using L = TokenLayout<S, KP>;
  int64_t bytes = K * V * static_cast<int64_t>(sizeof(S));
  bytes = (bytes + 31) / 32 * 32;
  if (!spill_is_shared) bytes += L::kSpilled * static_cast<int64_t>(sizeof(S));
  if (!L::kParkedIsShared) bytes += L::kParked * static_cast<int64_t>(sizeof(S));
  if (direct && !L::kFactorIsShared) bytes += L::kFactor * 8;
  return (bytes + 255) / 256 * 256;
}

template <class S, int KP>
constexpr int64_t token_shared_bytes(bool direct, bool spill_is_shared) {
  using L = TokenLayout<S, KP>;
  int64_t bytes = (static_cast<int64_t>(sizeof(TokenShared<S, KP>)) + 31) / 32 * 32;
  if (spill_is_shared) bytes += L::kSpilled * static_cast<int64_t>(sizeof(S));
  if (L::kParkedIsShared) bytes += L::kParked * static_cast<int64_t>(sizeof(S));
  if (direct && L::kFactorIsShared) bytes += L::kFactor * 8;
  return bytes;
}

// Where a block's arrays lie. `shared_memory`: token_shared_bytes, 32-byte aligned.
template <class S, int KP>
struct TokenMemory {
  using L = TokenLayout<S, KP>;
  TokenShared<S, KP>& shared;
  S *u, *spilled = nullptr, *parked;
  double* factor;

  KALMANET_KERNEL TokenMemory(char* shared_memory, const GkaJob& job, int64_t piece_index,
                              int64_t head)
      : shared(*reinterpret_cast<TokenShared<S, KP>*>(shared_memory)) {
    char* in_shared = shared_memory + (sizeof(TokenShared<S, KP>) + 31) / 32 * 32;
    char* in_scratch =
        static_cast<char*>(job.scratch) + (piece_index * job.H + head) * job.scratch_bytes;
    u = reinterpret_cast<S*>(in_scratch);
    in_scratch += (job.K * job.V * static_cast<int64_t>(sizeof(S)) + 31) / 32 * 32;
    if (L::kSpilled > 0) {
      spilled = reinterpret_cast<S*>(job.spill_is_shared ? in_shared : in_scratch);
      (job.spill_is_shared ? in_shared : in_scratch) +=
          L::kSpilled * static_cast<int64_t>(sizeof(S));
    }
    parked = reinterpret_cast<S*>(L::kParkedIsShared ? in_shared : in_scratch);
    (L::kParkedIsShared ? in_shared : in_scratch) += L::kParked * static_cast<int64_t>(sizeof(S));
    factor = reinterpret_cast<double*>(L::kFactorIsShared ? in_shared : in_scratch);
  }
};

}  // namespace kalmanet::cuda
