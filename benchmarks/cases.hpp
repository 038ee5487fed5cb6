// The benchmarks, registered by name.
#pragma once

#include "timing.hpp"

namespace kalmanet::bench {

// forward/<isa> and forward_backward/<isa> beside OpenBLAS's matrix product, and time_per_token.
void register_sequence_cases(const Settings& settings);
// decode/K:<K>/<isa> beside the same number of OpenBLAS's matrix-vector products.
void register_decode_cases(const Settings& settings);

}  // namespace kalmanet::bench
