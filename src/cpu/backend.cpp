// The CPU backend as the rest of the library sees it.
#include "cpu/backend.hpp"

#include <string>

#include "cpu/gka_ops.hpp"
#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

int64_t chosen_chunk_size(const core::GkaProblem& problem) {
  const int64_t asked = problem.options.chunk_size;
  return asked == 0 || asked > kLanes ? kLanes : asked;
}

namespace {

class CpuBackend final : public core::GkaBackend {
 public:
  Backend id() const noexcept override { return Backend::cpu; }

  std::string describe() const override {
    std::string text =
        "float32, float64, bfloat16, float16; chebyshev, direct, cg; instruction sets:";
    for (InstructionSet isa : available_instruction_sets()) text += std::string(" ") + name(isa);
    return text + "; using " + name(instruction_set());
  }

  // Everything that validation lets through.
  std::string refuses(const core::GkaProblem&) const override { return ""; }

  GkaReport forward(const core::GkaProblem& problem, const GkaOutputs& outputs) const override {
    return cpu::forward(problem, outputs);
  }
  GkaReport backward(const core::GkaProblem& problem, const GkaSaved& saved,
                     const GkaOutputGrads& output_grads,
                     const GkaInputGrads& grads) const override {
    return cpu::backward(problem, saved, output_grads, grads);
  }
  GkaReport step(const core::GkaProblem& problem, const GkaOutputs& outputs) const override {
    return cpu::step(problem, outputs);
  }
  int64_t workspace_bytes(GkaOperation operation, const core::GkaProblem& problem,
                          const GkaShape& shape) const override {
    return cpu::workspace_bytes(operation, problem, shape);
  }
};

}  // namespace

const core::GkaBackend& gka_backend() {
  static const CpuBackend backend;
  return backend;
}

}  // namespace kalmanet::cpu
