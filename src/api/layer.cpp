// Public entry points of the causal convolution, the norms and the fused decode step.
#include "core/validate_layer.hpp"
#include "core/validate_layer_step.hpp"
#include "cpu/conv.hpp"
#include "cpu/layer_step.hpp"
#include "cpu/norm.hpp"
#include "kalmanet/conv.hpp"
#include "kalmanet/layer_step.hpp"
#include "kalmanet/norm.hpp"

namespace kalmanet {
namespace {

Executor& resolve(Executor* executor) {
  return executor ? *executor : default_executor();
}

}  // namespace

void causal_conv_forward(const ConvInputs& inputs, View y, View final_state, bool silu,
                         Executor* executor) {
  const auto sequences = core::validate_conv_forward(inputs, y, final_state);
  cpu::causal_conv_forward(inputs, sequences, y, final_state, silu, resolve(executor));
}

void causal_conv_backward(const ConvInputs& inputs, ConstView dy, ConstView d_final_state, View dx,
                          View dweight, View dstate, bool silu, Executor* executor) {
  const auto sequences =
      core::validate_conv_backward(inputs, dy, d_final_state, dx, dweight, dstate);
  cpu::causal_conv_backward(inputs, sequences, dy, d_final_state, dx, dweight, dstate, silu,
                            resolve(executor));
}

void causal_conv_step(ConstView x, ConstView weight, View state, View y, bool silu,
                      Executor* executor) {
  core::validate_conv_step(x, weight, state, y);
  cpu::causal_conv_step(x, weight, state, y, silu, resolve(executor));
}

void gated_rms_norm_forward(const NormInputs& inputs, View y, Executor* executor) {
  core::validate_norm_forward(inputs, y);
  cpu::gated_rms_norm_forward(inputs, y, resolve(executor));
}

void gated_rms_norm_backward(const NormInputs& inputs, ConstView dy, View d_o, View d_gate,
                             View d_weight, Executor* executor) {
  core::validate_norm_backward(inputs, dy, d_o, d_gate, d_weight);
  cpu::gated_rms_norm_backward(inputs, dy, d_o, d_gate, d_weight, resolve(executor));
}

void unit_norm_forward(const UnitNormInputs& inputs, View y, Executor* executor) {
  core::validate_unit_norm_forward(inputs, y);
  cpu::unit_norm_forward(inputs, y, resolve(executor));
}

void unit_norm_backward(const UnitNormInputs& inputs, ConstView dy, View dx, Executor* executor) {
  core::validate_unit_norm_backward(inputs, dy, dx);
  cpu::unit_norm_backward(inputs, dy, dx, resolve(executor));
}

GkaReport layer_step(const LayerStepInputs& inputs, const LayerStepStates& states, View o,
                     View residual, const LayerStepOptions& options) {
  const core::GkaProblem problem = core::validate_layer_step(inputs, states, o, residual, options);
  return cpu::layer_step(problem, inputs, states, o, residual, options);
}

}  // namespace kalmanet
