// Registration and choice of backend.
#pragma once

#include "core/backend.hpp"

namespace kalmanet::api {

// The backend that options.backend names, or the cpu for `automatic` (the reference is never chosen
// by itself: it is slow). Throws Error(unsupported) with the backend's reason if it cannot compute
// the problem.
const core::GkaBackend& choose_backend(const core::GkaProblem& problem);

}  // namespace kalmanet::api
