// The gate of the whole sequences.
#pragma once

#include <string>

#include "sequence.hpp"
#include "timing.hpp"

namespace kalmanet::bench {

// Runs the pass on the CPU backend, and the float64 reference on the first tokens, on the last
// tokens from the reference's own states before them, and on the states from the first token to the
// last; with the backward, on the gradients of the last tokens too. chebyshev(r) and cg(r) are held
// to the reference of the same steps; what promises a tolerance, to the exact solution.
bool check(Sequence& sequence, Pass pass, const Method& method, const Settings& settings);

}  // namespace kalmanet::bench
