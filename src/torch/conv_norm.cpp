// The causal convolution and the norms: tensors to views, kalmanet called.
#include <tuple>

#include "torch/place.hpp"
#include "torch/views.hpp"

namespace kalmanet::torch_ops {
namespace {

// x [B,T,D], weight [D,W], state [N,D,W].
struct Conv {
  ConvInputs inputs;
  std::vector<int64_t> cu_seqlens;
  int64_t N, D, W;
};

Conv read(const Tensor& x, const Tensor& weight, const OptionalTensor& state,
          const OptionalTensor& cu_seqlens) {
  Conv conv;
  require_rank(x, 3, "x", "[B,T,D]");
  require_rank(weight, 2, "weight", "[D,W]");
  conv.inputs.x = const_view(x, "x");
  conv.inputs.weight = const_view(weight, "weight");
  conv.inputs.state = const_view(state, "state");
  conv.cu_seqlens = offsets(cu_seqlens);
  conv.N = cu_seqlens ? static_cast<int64_t>(conv.cu_seqlens.size()) - 1 : x.size(0);
  conv.D = x.size(2);
  conv.W = weight.size(1);
  return conv;
}

std::tuple<Tensor, Tensor> causal_conv_forward_op(const Tensor& x, const Tensor& weight,
                                                  const OptionalTensor& state,
                                                  const OptionalTensor& cu_seqlens, bool silu,
                                                  bool want_final_state) {
  const Place place({"x", x}, {{"weight", weight}, {"state", state}});
  Conv conv = read(x, weight, state, cu_seqlens);
  conv.inputs.cu_seqlens = conv.cu_seqlens;
  Tensor y = new_tensor(x, {x.size(0), x.size(1), conv.D}, const_view(x, "x").dtype);
  Tensor final_state = want_final_state
                           ? new_tensor(x, {conv.N, conv.D, conv.W}, const_view(x, "x").dtype)
                           : no_tensor(x);
  causal_conv_forward(conv.inputs, mutable_view(y, "y"),
                      want_final_state ? mutable_view(final_state, "final_state") : View{}, silu,
                      place.placement());
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor> causal_conv_backward_op(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& state,
    const OptionalTensor& cu_seqlens, const OptionalTensor& d_final_state, bool silu) {
  const Place place(
      {"x", x},
      {{"dy", dy}, {"weight", weight}, {"state", state}, {"d_final_state", d_final_state}});
  Conv conv = read(x, weight, state, cu_seqlens);
  conv.inputs.cu_seqlens = conv.cu_seqlens;
  Tensor dx = new_tensor(x, {x.size(0), x.size(1), conv.D}, const_view(x, "x").dtype);
  Tensor dweight = new_tensor(x, {conv.D, conv.W}, const_view(weight, "weight").dtype);
  Tensor dstate =
      state ? new_tensor(x, {conv.N, conv.D, conv.W}, const_view(x, "x").dtype) : no_tensor(x);
  causal_conv_backward(conv.inputs, const_view(dy, "dy"),
                       const_view(d_final_state, "d_final_state"), mutable_view(dx, "dx"),
                       mutable_view(dweight, "dweight"),
                       state ? mutable_view(dstate, "dstate") : View{}, silu, place.placement());
  return {dx, dweight, dstate};
}

Tensor causal_conv_step_op(const Tensor& x, const Tensor& weight, const Tensor& state, bool silu) {
  const Place place({"x", x}, {{"weight", weight}, {"state", state}});
  require_rank(x, 2, "x", "[N,D]");
  require_rank(weight, 2, "weight", "[D,W]");
  Tensor y = new_tensor(x, {x.size(0), x.size(1)}, const_view(x, "x").dtype);
  causal_conv_step(const_view(x, "x"), const_view(weight, "weight"), mutable_view(state, "state"),
                   mutable_view(y, "y"), silu, place.placement());
  return y;
}

NormInputs read(const Tensor& o, const OptionalTensor& gate, const Tensor& weight, double eps) {
  NormInputs inputs;
  require_rank(o, 2, "o", "[R,V]");
  inputs.o = const_view(o, "o");
  inputs.gate = const_view(gate, "gate");
  inputs.weight = const_view(weight, "weight");
  inputs.eps = eps;
  return inputs;
}

Tensor gated_rms_norm_forward_op(const Tensor& o, const OptionalTensor& gate, const Tensor& weight,
                                 double eps) {
  const Place place({"o", o}, {{"gate", gate}, {"weight", weight}});
  const NormInputs inputs = read(o, gate, weight, eps);
  Tensor y = new_tensor(o, {o.size(0), o.size(1)}, inputs.o.dtype);
  gated_rms_norm_forward(inputs, mutable_view(y, "y"), place.placement());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward_op(const Tensor& dy, const Tensor& o,
                                                              const OptionalTensor& gate,
                                                              const Tensor& weight, double eps) {
  const Place place({"o", o}, {{"dy", dy}, {"gate", gate}, {"weight", weight}});
  const NormInputs inputs = read(o, gate, weight, eps);
  Tensor d_o = new_tensor(o, {o.size(0), o.size(1)}, inputs.o.dtype);
  Tensor d_gate = gate ? new_tensor(o, {o.size(0), o.size(1)}, inputs.o.dtype) : no_tensor(o);
  Tensor d_weight = new_tensor(o, {o.size(1)}, inputs.weight.dtype);
  gated_rms_norm_backward(inputs, const_view(dy, "dy"), mutable_view(d_o, "d_o"),
                          gate ? mutable_view(d_gate, "d_gate") : View{},
                          mutable_view(d_weight, "d_weight"), place.placement());
  return {d_o, d_gate, d_weight};
}

UnitNormInputs read(const Tensor& x, const Text& kind, double eps) {
  UnitNormInputs inputs;
  require_rank(x, 2, "x", "[R,K]");
  inputs.x = const_view(x, "x");
  inputs.kind = qk_norm_of(kind, "kind");
  inputs.eps = eps;
  return inputs;
}

Tensor unit_norm_forward_op(const Tensor& x, const Text& kind, double eps) {
  const Place place({"x", x}, {});
  const UnitNormInputs inputs = read(x, kind, eps);
  Tensor y = new_tensor(x, {x.size(0), x.size(1)}, inputs.x.dtype);
  unit_norm_forward(inputs, mutable_view(y, "y"), place.placement());
  return y;
}

Tensor unit_norm_backward_op(const Tensor& dy, const Tensor& x, const Text& kind, double eps) {
  const Place place({"x", x}, {{"dy", dy}});
  const UnitNormInputs inputs = read(x, kind, eps);
  Tensor dx = new_tensor(x, {x.size(0), x.size(1)}, inputs.x.dtype);
  unit_norm_backward(inputs, const_view(dy, "dy"), mutable_view(dx, "dx"), place.placement());
  return dx;
}

}  // namespace
}  // namespace kalmanet::torch_ops

#define KN_REGISTER(device)                                                                       \
  STABLE_TORCH_LIBRARY_IMPL(kalmanet, device, m) {                                                \
    m.impl("causal_conv_forward", TORCH_BOX(&kalmanet::torch_ops::causal_conv_forward_op));       \
    m.impl("causal_conv_backward", TORCH_BOX(&kalmanet::torch_ops::causal_conv_backward_op));     \
    m.impl("causal_conv_step", TORCH_BOX(&kalmanet::torch_ops::causal_conv_step_op));             \
    m.impl("gated_rms_norm_forward", TORCH_BOX(&kalmanet::torch_ops::gated_rms_norm_forward_op)); \
    m.impl("gated_rms_norm_backward",                                                             \
           TORCH_BOX(&kalmanet::torch_ops::gated_rms_norm_backward_op));                          \
    m.impl("unit_norm_forward", TORCH_BOX(&kalmanet::torch_ops::unit_norm_forward_op));           \
    m.impl("unit_norm_backward", TORCH_BOX(&kalmanet::torch_ops::unit_norm_backward_op));         \
  }
KN_REGISTER(CPU)
KN_REGISTER(CUDA)
