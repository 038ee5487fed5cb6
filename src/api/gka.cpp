// Gated KalmaNet's public entry points: validate, choose a backend, run.
#include "kalmanet/gka.hpp"

#include "api/backends.hpp"
#include "core/check.hpp"
#include "core/problem.hpp"
#include "core/text.hpp"
#include "kalmanet/workspace.hpp"

namespace kalmanet {

GkaReport gka_forward(const GkaInputs& inputs, const GkaOutputs& outputs,
                      const GkaOptions& options) {
  const core::GkaProblem problem = core::validate_forward(inputs, outputs, options);
  return api::choose_backend(problem).forward(problem, outputs);
}

GkaReport gka_backward(const GkaInputs& inputs, const GkaSaved& saved,
                       const GkaOutputGrads& output_grads, const GkaInputGrads& grads,
                       const GkaOptions& options) {
  const core::GkaProblem problem =
      core::validate_backward(inputs, saved, output_grads, grads, options);
  return api::choose_backend(problem).backward(problem, saved, output_grads, grads);
}

GkaReport gka_step(const GkaInputs& inputs, const GkaOutputs& outputs, const GkaOptions& options) {
  const core::GkaProblem problem = core::validate_forward(inputs, outputs, options);
  if (outputs.segment_states.rank > 0 || outputs.segment_states.defined()) {
    core::fail(ErrorCode::invalid_argument, "segment_states",
               "is an output of gka_forward; leave it absent in gka_step");
  }
  return api::choose_backend(problem).step(problem, outputs);
}

int64_t gka_workspace_bytes(GkaOperation operation, const GkaShape& shape,
                            const GkaOptions& options) {
  if (operation != GkaOperation::forward && operation != GkaOperation::backward &&
      operation != GkaOperation::step) {
    core::fail(ErrorCode::invalid_argument, "operation",
               core::text("unknown value ", static_cast<int>(operation),
                          "; must be forward, backward or step"));
  }
  const core::GkaProblem problem = core::validate_shape(shape, options);
  return api::choose_backend(problem).workspace_bytes(operation, problem, shape);
}

}  // namespace kalmanet
