// Registration and choice of backend.
#pragma once

#include "core/backend.hpp"

namespace kalmanet::api {

// Why Backend::cuda cannot run where the room src/cuda was not built.
inline constexpr const char* kNoCuda =
    "this build has no CUDA kernels; build with nvcc and -DKALMANET_CUDA=ON, or pass backend cpu";

// The backend that options.backend names, or the cpu for `automatic` (the reference is never chosen
// by itself: it is slow). Throws Error(unsupported) with the backend's reason if it cannot compute
// the problem.
const core::GkaBackend& choose_backend(const core::GkaProblem& problem);

}  // namespace kalmanet::api
