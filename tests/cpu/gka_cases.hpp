// What the CPU room's GKA tests share: oracle results, gate combinations, a forced instruction set.
#pragma once

#include "kalmanet/kalmanet.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

class ForcedInstructionSet {
 public:
  explicit ForcedInstructionSet(InstructionSet isa) { set_instruction_set(isa); }
  ~ForcedInstructionSet() { reset_instruction_set(); }
};

// One of 64 combinations of optional inputs.
inline void set_gates(CaseSpec& spec, int bits) {
  spec.g = bits & 1;
  spec.gk = bits & 2;
  spec.alpha = bits & 4;
  spec.beta = bits & 8;
  spec.ridge_tensor = bits & 16;
  spec.same_gate = (bits & 32) && spec.g && spec.gk;
}

// Forward and backward of the same numbers by the float64 oracle.
template <class T, class G>
Case<double> oracle_results(const Case<T, G>& c, GkaOptions options) {
  Case<double> d = to_double(c);
  options.backend = Backend::reference;
  gka_forward(d.inputs(), d.outputs(), options);
  gka_backward(d.inputs(), d.x.view(), d.output_grads(), d.grads(), options);
  return d;
}

}  // namespace kalmanet::testing
