// The reference backend: the oracles of token_loop.hpp behind the interface of every backend.
#pragma once

#include "core/backend.hpp"

namespace kalmanet::reference {

// Computes in float64 whatever the dtype of the tensors (float32 or float64), rounding results
// once.
const core::GkaBackend& gka_backend();

}  // namespace kalmanet::reference
