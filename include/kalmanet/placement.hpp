// Where one of the layer's small operations (conv.hpp, norm.hpp) runs.
#pragma once

#include "kalmanet/backend.hpp"
#include "kalmanet/executor.hpp"

namespace kalmanet {

struct Placement {
  Executor* executor = nullptr;  // cpu: who shares out the work; null: default_executor()
  // `automatic` and `cpu`: the processor, with tensors in its memory. `cuda`: a GPU, which holds
  // the tensors; Error(unsupported) without one. `reference` has none of these operations.
  Backend backend = Backend::automatic;
  // Backend::cuda: a cudaStream_t of the device that holds the tensors (null: the default stream).
  // The work is put on it and the call returns; the caller synchronises.
  void* stream = nullptr;
};

}  // namespace kalmanet
