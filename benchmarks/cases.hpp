// The benchmarks, registered by name.
#pragma once

#include "timing.hpp"

namespace kalmanet::bench {

// forward/<isa> and forward_backward/<isa> beside OpenBLAS's matrix product, and time_per_token.
void register_sequence_cases(const Settings& settings);
// decode/K:<K>/<isa> beside the same number of OpenBLAS's matrix-vector products.
void register_decode_cases(const Settings& settings);
// bfloat16/K:<K>/<isa>: Chebyshev's forward with bfloat16 products beside standard arithmetic.
void register_arithmetic_cases(const Settings& settings);
// choice/forward/K:<K> and choice/step/K:<K>: auto beside the solvers it chooses from, as a table.
void register_choice_cases(const Settings& settings);

}  // namespace kalmanet::bench
