// The one symbol of libkalmanet_torch.so: what ties a C++ program to the library that registers
// torch.ops.kalmanet.*. Python loads the library with torch.ops.load_library instead.
#pragma once

#include "kalmanet/export.hpp"

extern "C" KALMANET_API int kalmanet_torch_anchor();
