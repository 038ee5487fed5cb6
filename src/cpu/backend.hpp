// The CPU backend: GKA by vector kernels chosen at run time.
#pragma once

#include "core/backend.hpp"

namespace kalmanet::cpu {

const core::GkaBackend& gka_backend();

}  // namespace kalmanet::cpu
