// The CUDA backend as the rest of the library sees it.
#pragma once

#include "core/backend.hpp"

namespace kalmanet::cuda {

const core::GkaBackend& gka_backend();

}  // namespace kalmanet::cuda
