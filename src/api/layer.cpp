// Public entry points of the causal convolution, the norms and the fused decode step.
#include "api/backends.hpp"
#include "core/check.hpp"
#include "core/text.hpp"
#include "core/validate_layer.hpp"
#include "core/validate_layer_step.hpp"
#include "cpu/conv.hpp"
#include "cpu/layer_step.hpp"
#include "cpu/norm.hpp"
#include "kalmanet/conv.hpp"
#include "kalmanet/error.hpp"
#include "kalmanet/layer_step.hpp"
#include "kalmanet/norm.hpp"
#ifdef KALMANET_WITH_CUDA
#include "cuda/layer.hpp"
#endif

namespace kalmanet {
namespace {

// Runs on_cpu(executor) or on_gpu(stream).
template <class Cpu, class Gpu>
void run(const Placement& where, const Cpu& on_cpu, [[maybe_unused]] const Gpu& on_gpu) {
  switch (where.backend) {
    case Backend::automatic:
    case Backend::cpu:
      return on_cpu(where.executor ? *where.executor : default_executor());
    case Backend::cuda:
#ifdef KALMANET_WITH_CUDA
      return on_gpu(where.stream);
#else
      throw Error(ErrorCode::unsupported, "backend", api::kNoCuda);
#endif
    case Backend::reference:
      break;
  }
  core::fail(ErrorCode::unsupported, "backend",
             core::text(name(where.backend),
                        " has no convolution and no norm; must be automatic, cpu or cuda"));
}

// The GPU's side of a call; without the CUDA room, whose names do not exist then, nothing.
#ifdef KALMANET_WITH_CUDA
#define KN_ON_GPU(call) [&](void* stream) { cuda::call; }
#else
#define KN_ON_GPU(call) 0
#endif

}  // namespace

void causal_conv_forward(const ConvInputs& inputs, View y, View final_state, bool silu,
                         const Placement& where) {
  const auto sequences = core::validate_conv_forward(inputs, y, final_state);
  run(
      where,
      [&](Executor& executor) {
        cpu::causal_conv_forward(inputs, sequences, y, final_state, silu, executor);
      },
      KN_ON_GPU(causal_conv_forward(inputs, sequences, y, final_state, silu, stream)));
}

void causal_conv_backward(const ConvInputs& inputs, ConstView dy, ConstView d_final_state, View dx,
                          View dweight, View dstate, bool silu, const Placement& where) {
  const auto sequences =
      core::validate_conv_backward(inputs, dy, d_final_state, dx, dweight, dstate);
  run(
      where,
      [&](Executor& executor) {
        cpu::causal_conv_backward(inputs, sequences, dy, d_final_state, dx, dweight, dstate, silu,
                                  executor);
      },
      KN_ON_GPU(causal_conv_backward(inputs, sequences, dy, d_final_state, dx, dweight, dstate,
                                     silu, stream)));
}

void causal_conv_step(ConstView x, ConstView weight, View state, View y, bool silu,
                      const Placement& where) {
  core::validate_conv_step(x, weight, state, y);
  run(
      where,
      [&](Executor& executor) { cpu::causal_conv_step(x, weight, state, y, silu, executor); },
      KN_ON_GPU(causal_conv_step(x, weight, state, y, silu, stream)));
}

void gated_rms_norm_forward(const NormInputs& inputs, View y, const Placement& where) {
  core::validate_norm_forward(inputs, y);
  run(
      where, [&](Executor& executor) { cpu::gated_rms_norm_forward(inputs, y, executor); },
      KN_ON_GPU(gated_rms_norm_forward(inputs, y, stream)));
}

void gated_rms_norm_backward(const NormInputs& inputs, ConstView dy, View d_o, View d_gate,
                             View d_weight, const Placement& where) {
  core::validate_norm_backward(inputs, dy, d_o, d_gate, d_weight);
  run(
      where,
      [&](Executor& executor) {
        cpu::gated_rms_norm_backward(inputs, dy, d_o, d_gate, d_weight, executor);
      },
      KN_ON_GPU(gated_rms_norm_backward(inputs, dy, d_o, d_gate, d_weight, stream)));
}

void unit_norm_forward(const UnitNormInputs& inputs, View y, const Placement& where) {
  core::validate_unit_norm_forward(inputs, y);
  run(
      where, [&](Executor& executor) { cpu::unit_norm_forward(inputs, y, executor); },
      KN_ON_GPU(unit_norm_forward(inputs, y, stream)));
}

void unit_norm_backward(const UnitNormInputs& inputs, ConstView dy, View dx,
                        const Placement& where) {
  core::validate_unit_norm_backward(inputs, dy, dx);
  run(
      where, [&](Executor& executor) { cpu::unit_norm_backward(inputs, dy, dx, executor); },
      KN_ON_GPU(unit_norm_backward(inputs, dy, dx, stream)));
}

GkaReport layer_step(const LayerStepInputs& inputs, const LayerStepStates& states, View o,
                     View residual, const LayerStepOptions& options) {
  const core::GkaProblem problem = core::validate_layer_step(inputs, states, o, residual, options);
  if (problem.options.backend == Backend::cuda) {
    api::choose_backend(problem);  // throws where it cannot
#ifdef KALMANET_WITH_CUDA
    return cuda::layer_step(problem, inputs, states, o, residual, options);
#endif
  }
  return cpu::layer_step(problem, inputs, states, o, residual, options);
}

}  // namespace kalmanet
