// Everything the torch-free library offers.
#pragma once

#include "kalmanet/backend.hpp"     // IWYU pragma: export
#include "kalmanet/conv.hpp"        // IWYU pragma: export
#include "kalmanet/error.hpp"       // IWYU pragma: export
#include "kalmanet/executor.hpp"    // IWYU pragma: export
#include "kalmanet/gka.hpp"         // IWYU pragma: export
#include "kalmanet/layer_step.hpp"  // IWYU pragma: export
#include "kalmanet/norm.hpp"        // IWYU pragma: export
#include "kalmanet/state.hpp"       // IWYU pragma: export
#include "kalmanet/tensor.hpp"      // IWYU pragma: export
#include "kalmanet/version.hpp"     // IWYU pragma: export
#include "kalmanet/workspace.hpp"   // IWYU pragma: export
