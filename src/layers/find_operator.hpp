// The operators of torch.ops.kalmanet.*, found through PyTorch's dispatcher.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include "torch/anchor.hpp"

namespace kalmanet::layers {

// The operator `name` with the C++ signature of its schema.
template <class Signature>
auto find_operator(const char* name) {
  kalmanet_torch_anchor();
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace kalmanet::layers
