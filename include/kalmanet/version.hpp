// The library's version (semantic versioning).
#pragma once

#include "kalmanet/export.hpp"

#define KALMANET_VERSION_MAJOR 0
#define KALMANET_VERSION_MINOR 1
#define KALMANET_VERSION_PATCH 0

namespace kalmanet {

KALMANET_API const char* version() noexcept;  // "0.1.0", of the library that runs

}  // namespace kalmanet
