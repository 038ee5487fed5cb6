// A layer's decode step on the GPU: a kernel, the recurrence's step, a kernel.
#include "cuda/backend.hpp"
#include "cuda/layer.hpp"
#include "cuda/layer_launch.hpp"
#include "cuda/layer_step_plan.hpp"
#include "cuda/workspace.hpp"
#include "kalmanet/error.hpp"

namespace kalmanet::cuda {

GkaReport layer_step(const core::GkaProblem& problem, const LayerStepInputs& inputs,
                     const LayerStepStates& states, const View& o, const View& residual,
                     const LayerStepOptions& options) {
  const DeviceInfo& device = device_info();
  if (device.count == 0) throw Error(ErrorCode::unsupported, "backend", "cuda: " + device.problem);
  if (problem.B == 0 || problem.T == 0) {
    GkaReport nothing;
    nothing.backend = Backend::cuda;
    return nothing;
  }
  const Stream stream = options.gka.stream;
  const bool float64 = problem.dtype == DType::float64;
  const Workspace memory(layer_step_bytes(problem, inputs), stream);
  const LayerStepPlan plan =
      plan_layer_step(problem, inputs, states, o, residual, options, memory.data());
  launch_layer_before(plan.before, float64, stream);
  const GkaReport report = gka_backend().step(plan.problem, plan.outputs);
  if (plan.norm.lanes != 0) {
    launch_norm(plan.norm, false, float64, stream);
  } else {
    launch_layer_after(plan.after, float64, stream);
  }
  return report;
}

}  // namespace kalmanet::cuda
