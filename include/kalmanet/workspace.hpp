// How much memory an operation takes beside its arguments, asked before it runs.
#pragma once

#include <cstdint>
#include <span>

#include "kalmanet/export.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet {

enum class GkaOperation { forward, backward, step };
KALMANET_API const char* name(GkaOperation operation) noexcept;

// The sizes of a problem, without its tensors (letters: gka.hpp).
struct GkaShape {
  int64_t B = 1, T = 1, H = 1, K = 1, V = 1;
  int64_t Hq = 0, Hk = 0, Hv = 0;  // heads of q, k and v; 0: H
  DType dtype = DType::float32;    // of q
  // As in GkaInputs; empty: B sequences of T tokens.
  std::span<const int64_t> cu_seqlens;
  bool saved_x = true;          // backward: x of the forward is passed in
  bool segment_states = false;  // and its states
};

// An upper bound of the bytes that one call of the operation holds at a time, over all threads of
// the executor: working states, scratch, lists of tasks. Up to 16 MiB of it a thread stay with the
// thread for its next call; the rest is given back. No term grows with T^2; in the forward none
// grows with T. Throws Error where the operation itself would, and Error(unsupported) for
// Backend::reference, whose oracles are not written to be small.
KALMANET_API int64_t gka_workspace_bytes(GkaOperation operation, const GkaShape& shape,
                                         const GkaOptions& options = {});

}  // namespace kalmanet
