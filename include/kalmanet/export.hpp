// Symbol visibility of the public library.
#pragma once

#include "kalmanet/export.h"  // IWYU pragma: export
