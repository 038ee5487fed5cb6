// The layer's fused decode step: tensors to views, result allocated, kalmanet called.
#include <algorithm>
#include <string>
#include <tuple>

#include "torch/executor.hpp"
#include "torch/place.hpp"
#include "torch/views.hpp"

namespace kalmanet::torch_ops {
namespace {

View mutable_view(const OptionalTensor& tensor, const char* name) {
  return tensor ? torch_ops::mutable_view(*tensor, name) : View{};
}

std::tuple<Tensor, Tensor> layer_step_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& h, const Tensor& u,
    const Tensor& conv_q, const Tensor& conv_k, const OptionalTensor& conv_v,
    const Tensor& conv_q_weight, const Tensor& conv_k_weight, const OptionalTensor& conv_v_weight,
    const Tensor& o_norm, const OptionalTensor& gate, const OptionalTensor& b,
    const OptionalTensor& alpha, const OptionalTensor& a, const OptionalTensor& ridge,
    const OptionalTensor& A_log, const OptionalTensor& dt_bias, std::optional<double> scale,
    double ridge_ratio, const Text& solver, int64_t num_iter, double tolerance, bool decay_h,
    double fixed_alpha, const Text& qk_norm, double min_ridge, double max_ridge, double norm_eps,
    bool want_residual) {
  const Place place({"q", q}, {{"k", k},
                               {"v", v},
                               {"h", h},
                               {"u", u},
                               {"conv_q", conv_q},
                               {"conv_k", conv_k},
                               {"conv_v", conv_v},
                               {"conv_q_weight", conv_q_weight},
                               {"conv_k_weight", conv_k_weight},
                               {"conv_v_weight", conv_v_weight},
                               {"o_norm", o_norm},
                               {"gate", gate},
                               {"b", b},
                               {"alpha", alpha},
                               {"a", a},
                               {"ridge", ridge},
                               {"A_log", A_log},
                               {"dt_bias", dt_bias}});
  require_rank(q, 4, "q", "[B,T,Hq,K]");
  require_rank(v, 4, "v", "[B,T,Hv,V]");
  require_rank(h, 4, "h", "[B,H,K,K]");
  const LayerStepInputs inputs = {.q = const_view(q, "q"),
                                  .k = const_view(k, "k"),
                                  .v = const_view(v, "v"),
                                  .gate = const_view(gate, "gate"),
                                  .b = const_view(b, "b"),
                                  .alpha = const_view(alpha, "alpha"),
                                  .a = const_view(a, "a"),
                                  .ridge = const_view(ridge, "ridge"),
                                  .conv_q_weight = const_view(conv_q_weight, "conv_q_weight"),
                                  .conv_k_weight = const_view(conv_k_weight, "conv_k_weight"),
                                  .conv_v_weight = const_view(conv_v_weight, "conv_v_weight"),
                                  .A_log = const_view(A_log, "A_log"),
                                  .dt_bias = const_view(dt_bias, "dt_bias"),
                                  .o_norm = const_view(o_norm, "o_norm")};
  const LayerStepStates states = {.h = torch_ops::mutable_view(h, "h"),
                                  .u = torch_ops::mutable_view(u, "u"),
                                  .conv_q = torch_ops::mutable_view(conv_q, "conv_q"),
                                  .conv_k = torch_ops::mutable_view(conv_k, "conv_k"),
                                  .conv_v = mutable_view(conv_v, "conv_v")};
  LayerStepOptions options;
  options.gka.scale = scale;
  options.gka.ridge_ratio = ridge_ratio;
  options.gka.solver = solver_of(solver);
  options.gka.num_iter = num_iter_of(num_iter);
  options.gka.tolerance = tolerance;
  options.gka.executor = &torch_executor();
  options.gka.backend = place.backend("auto");
  options.gka.stream = place.stream();
  options.decay_h = decay_h;
  options.fixed_alpha = fixed_alpha;
  options.qk_norm = qk_norm_of(qk_norm, "qk_norm");
  options.min_ridge = min_ridge;
  options.max_ridge = max_ridge;
  options.norm_eps = norm_eps;
  const int64_t B = q.size(0), T = q.size(1), H = h.size(1);
  Tensor o = new_tensor(q, {B, T, H, v.size(3)}, inputs.q.dtype);
  Tensor residual = want_residual ? new_tensor(q, {B, T, H}, inputs.q.dtype) : no_tensor(q);
  layer_step(inputs, states, torch_ops::mutable_view(o, "o"),
             want_residual ? torch_ops::mutable_view(residual, "residual") : View{}, options);
  return {o, residual};
}

}  // namespace
}  // namespace kalmanet::torch_ops

#define KN_REGISTER(device)                                               \
  STABLE_TORCH_LIBRARY_IMPL(kalmanet, device, m) {                        \
    m.impl("layer_step", TORCH_BOX(&kalmanet::torch_ops::layer_step_op)); \
  }
KN_REGISTER(CPU)
KN_REGISTER(CUDA)
