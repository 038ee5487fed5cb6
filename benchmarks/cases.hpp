// The benchmarks, registered by name.
#pragma once

#include "timing.hpp"

namespace kalmanet::bench {

// sequence/<what varies>/<pass>: solvers, ridges, dtypes, head sizes, instruction sets; groups.hpp
// says what is measured.
void register_sequence_cases(const Settings& settings);
// lengths/<pass> and memory/<pass>: 1k to 128k tokens.
void register_length_cases(const Settings& settings);
// decode/K:<K>/<isa> beside the same number of OpenBLAS's matrix-vector products.
void register_decode_cases(const Settings& settings);
// decode_states/K:<K>/H:<sequences times heads>: states beyond the last-level cache, beside memcpy.
void register_decode_states_cases(const Settings& settings);
// bfloat16/K:<K>/<isa>: Chebyshev's forward with bfloat16 products beside standard arithmetic.
void register_arithmetic_cases(const Settings& settings);
// choice/forward/K:<K> and choice/step/K:<K>: auto beside the solvers it chooses from, as a table.
void register_choice_cases(const Settings& settings);

}  // namespace kalmanet::bench
