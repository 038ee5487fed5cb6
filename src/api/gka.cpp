// Gated KalmaNet's public entry points: validate, choose a backend, run.
#include "kalmanet/gka.hpp"

#include <vector>

#include "api/backends.hpp"
#include "core/check.hpp"
#include "core/half.hpp"
#include "core/problem.hpp"
#include "core/text.hpp"
#include "kalmanet/workspace.hpp"

namespace kalmanet {

namespace {

// The outputs of sequences without a slot, on the backends that left them out.
void clear_left_out(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  const GkaInputs& in = problem.inputs;
  if (in.slots.empty() || problem.options.backend == Backend::cuda) return;
  const std::vector<core::Sequence> all = core::make_sequences(problem.B, problem.T, in.cu_seqlens);
  const auto clear = [](const View& view, const core::Sequence& sequence) {
    if (!view.defined()) return;
    const int64_t width = view.rank == 4 ? view.size[3] : 1;  // rank 3: one number a head
    for (int64_t t = sequence.begin; t < sequence.end; ++t) {
      for (int64_t h = 0; h < view.size[2]; ++h) {
        for (int64_t c = 0; c < width; ++c) {
          const int64_t at = sequence.row * view.stride[0] + t * view.stride[1] +
                             h * view.stride[2] + c * (view.rank == 4 ? view.stride[3] : 0);
          core::store_element(view.dtype, view.data, at, 0.0);
        }
      }
    }
  };
  for (const core::Sequence& sequence : all) {
    if (in.slots[static_cast<size_t>(sequence.index)] >= 0) continue;
    clear(outputs.o, sequence), clear(outputs.x, sequence), clear(outputs.residual, sequence);
  }
}

}  // namespace

GkaReport gka_forward(const GkaInputs& inputs, const GkaOutputs& outputs,
                      const GkaOptions& options) {
  core::refuse_decode(inputs, "gka_forward");
  const core::GkaProblem problem = core::validate_forward(inputs, outputs, options);
  return api::choose_backend(problem).forward(problem, outputs);
}

GkaReport gka_backward(const GkaInputs& inputs, const GkaSaved& saved,
                       const GkaOutputGrads& output_grads, const GkaInputGrads& grads,
                       const GkaOptions& options) {
  core::refuse_decode(inputs, "gka_backward");
  const core::GkaProblem problem =
      core::validate_backward(inputs, saved, output_grads, grads, options);
  return api::choose_backend(problem).backward(problem, saved, output_grads, grads);
}

GkaReport gka_step(const GkaInputs& inputs, const GkaOutputs& outputs, const GkaOptions& options) {
  const core::GkaProblem problem = core::validate_step(inputs, outputs, options);
  const core::GkaBackend& backend = api::choose_backend(problem);
  clear_left_out(problem, outputs);
  return backend.step(problem, outputs);
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
