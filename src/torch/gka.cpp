// The GKA operators: tensors to views, results allocated on their device, kalmanet called.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "torch/executor.hpp"
#include "torch/place.hpp"
#include "torch/views.hpp"

namespace kalmanet::torch_ops {
namespace {

// What every GKA operator reads, as views, with the sizes of its results.
struct Call {
  GkaInputs inputs;
  GkaOptions options;
  std::vector<int64_t> cu_seqlens;
  int64_t B, T, H, K, V, N;
  DType dtype;        // of o
  DType fine_dtype;   // of x and the residual: float32 beside 16 bits, which would lose what
                      // the gradients of small ridge ratios need
  DType state_dtype;  // float32, or float64 where q is
};

Call read(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
          const OptionalTensor& gk, const OptionalTensor& alpha, const OptionalTensor& beta,
          const OptionalTensor& ridge, const OptionalTensor& h0, const OptionalTensor& u0,
          const OptionalTensor& cu_seqlens, std::optional<double> scale, double ridge_ratio,
          const std::string& solver, int64_t num_iter, double tolerance, int64_t chunk_size,
          const std::string& arithmetic, Backend backend, void* stream) {
  Call call;
  require_rank(q, 4, "q", "[B,T,Hq,K]");
  require_rank(k, 4, "k", "[B,T,Hk,K]");
  require_rank(v, 4, "v", "[B,T,Hv,V]");
  call.H = std::max({q.size(2), k.size(2), v.size(2)});
  const auto gate = [&call](const OptionalTensor& tensor, const char* name) {
    if (!tensor) return ConstView{};
    require_rank(*tensor, 3, name, "[B,T,H]");
    call.H = std::max(call.H, tensor->size(2));
    return const_view(tensor, name);
  };
  call.B = q.size(0);
  call.T = q.size(1);
  call.K = q.size(3);
  call.V = v.size(3);
  // Before the results are allocated, whose size grows with K * K: the rest is checked by kalmanet.
  for (const auto& [name, size] : {std::pair{"q", call.K}, std::pair{"v", call.V}}) {
    if (size < 1 || size > kMaxHeadDim) {
      throw Error(ErrorCode::invalid_shape, name,
                  "has a head dim (last size) of " + std::to_string(size) + "; allowed are 1 to " +
                      std::to_string(kMaxHeadDim));
    }
  }
  GkaInputs& inputs = call.inputs;
  inputs.q = const_view(q, "q");
  inputs.k = const_view(k, "k");
  inputs.v = const_view(v, "v");
  inputs.g = gate(g, "g");
  inputs.gk = gate(gk, "gk");
  inputs.alpha = gate(alpha, "alpha");
  inputs.beta = gate(beta, "beta");
  inputs.ridge_ratio = gate(ridge, "ridge");
  inputs.h0 = const_view(h0, "h0");
  inputs.u0 = const_view(u0, "u0");
  call.cu_seqlens = offsets(cu_seqlens);
  call.N = cu_seqlens ? static_cast<int64_t>(call.cu_seqlens.size()) - 1 : call.B;
  call.dtype = inputs.q.dtype;
  call.fine_dtype = call.dtype == DType::float64 ? DType::float64 : DType::float32;
  call.state_dtype = call.dtype == DType::float64 ? DType::float64 : DType::float32;

  GkaOptions& options = call.options;
  options.scale = scale;
  options.ridge_ratio = ridge_ratio;
  options.solver = solver_of(solver);
  options.num_iter = num_iter_of(num_iter);
  options.tolerance = tolerance;
  options.chunk_size = chunk_size;
  options.arithmetic = arithmetic_of(arithmetic);
  options.backend = backend;
  options.stream = stream;
  options.executor = &torch_executor();
  return call;
}

// Whether segment states are for this call (gka.hpp).
bool keeps_segments(const Call& call) {
  const GkaOptions& options = call.options;
  return (options.backend == Backend::automatic || options.backend == Backend::cpu) &&
         (options.chunk_size == 0 ||
          std::has_single_bit(static_cast<uint64_t>(options.chunk_size)));
}

// The operators' [B,H,T,size/512] as kalmanet's [B,H,T/512,size], the same numbers in the same
// order: a shape that says T and not T/512 is one that compiled and exported programs need no
// special cases for. (A state's size, of rows padded to 16, is a multiple of 256: size/512 is
// rounded up, and 256 numbers may lie unused between two states.)
int64_t segment_numbers(int64_t K, int64_t V) {
  return (gka_segment_state_size(K, V) + kSegmentTokens - 1) / kSegmentTokens;
}
template <class AnyView>
AnyView as_segments(AnyView view, int64_t K, int64_t V) {
  if (!view.defined()) return view;
  if (view.rank != 4 || view.stride[3] != 1 || view.stride[2] != view.size[3] ||
      view.size[3] != segment_numbers(K, V)) {
    throw Error(
        ErrorCode::invalid_shape, "segment_states",
        "is not the [B,H,T,size/512] that gka_forward returned; pass that, or leave it out");
  }
  view.size[2] /= kSegmentTokens;
  view.stride[2] = view.size[3] * kSegmentTokens;
  view.size[3] = gka_segment_state_size(K, V);
  return view;
}

// What no state is written to: the rest of each head after its last one; of packed sequences, whose
// ends say what that is, and where there are gaps between states, all of it. An operator's results
// are the same whenever it is called.
void clear_rest(const View& states, DType dtype, bool whole) {
  if (!states.defined()) return;  // no elements
  const auto [B, H, T, numbers] = states.size;
  const int64_t kept = whole ? 0 : T / kSegmentTokens * kSegmentTokens;
  for (int64_t i = 0; i < B * H; ++i) {
    char* const head = static_cast<char*>(states.data) + i * T * numbers * size_of(dtype);
    std::memset(head + kept * numbers * size_of(dtype), 0,
                static_cast<size_t>((T - kept) * numbers * size_of(dtype)));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gka_forward_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
    const OptionalTensor& gk, const OptionalTensor& alpha, const OptionalTensor& beta,
    const OptionalTensor& ridge, const OptionalTensor& h0, const OptionalTensor& u0,
    const OptionalTensor& cu_seqlens, std::optional<double> scale, double ridge_ratio,
    const Text& solver, int64_t num_iter, double tolerance, int64_t chunk_size,
    const Text& arithmetic, bool save_x, bool want_residual, const Text& backend,
    bool /*bp_lambda*/) {
  const Place place({"q", q}, {{"k", k},
                               {"v", v},
                               {"g", g},
                               {"gk", gk},
                               {"alpha", alpha},
                               {"beta", beta},
                               {"ridge", ridge},
                               {"h0", h0},
                               {"u0", u0}});
  Call call =
      read(q, k, v, g, gk, alpha, beta, ridge, h0, u0, cu_seqlens, scale, ridge_ratio, solver,
           num_iter, tolerance, chunk_size, arithmetic, place.backend(backend), place.stream());
  call.inputs.cu_seqlens = call.cu_seqlens;
  const auto [B, T, H, K, V, N] = std::tuple(call.B, call.T, call.H, call.K, call.V, call.N);
  Tensor o = new_tensor(q, {B, T, H, V}, call.dtype);
  Tensor h = new_tensor(q, {N, H, K, K}, call.state_dtype);
  Tensor u = new_tensor(q, {N, H, K, V}, call.state_dtype);
  Tensor x = save_x ? new_tensor(q, {B, T, H, K}, call.fine_dtype) : no_tensor(q);
  Tensor residual = want_residual ? new_tensor(q, {B, T, H}, call.fine_dtype) : no_tensor(q);
  const bool segments = save_x && keeps_segments(call);
  const int64_t numbers = segment_numbers(K, V);
  Tensor states = segments ? new_tensor(q, {B, H, T, numbers}, call.state_dtype) : no_tensor(q);
  GkaOutputs outputs;
  outputs.o = mutable_view(o, "o");
  outputs.h_final = mutable_view(h, "h_final");
  outputs.u_final = mutable_view(u, "u_final");
  if (save_x) outputs.x = mutable_view(x, "x");
  if (want_residual) outputs.residual = mutable_view(residual, "residual");
  if (segments) {
    const View whole = mutable_view(states, "segment_states");
    const bool gaps = numbers * kSegmentTokens != gka_segment_state_size(K, V);
    clear_rest(whole, call.state_dtype, cu_seqlens.has_value() || gaps);
    outputs.segment_states = as_segments(whole, K, V);
  }
  gka_forward(call.inputs, outputs, call.options);
  return {o, h, u, x, residual, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
gka_backward_op(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                const OptionalTensor& g, const OptionalTensor& gk, const OptionalTensor& alpha,
                const OptionalTensor& beta, const OptionalTensor& ridge, const OptionalTensor& h0,
                const OptionalTensor& u0, const OptionalTensor& cu_seqlens, const OptionalTensor& x,
                const OptionalTensor& segment_states, const OptionalTensor& dh,
                const OptionalTensor& du, std::optional<double> scale, double ridge_ratio,
                const Text& solver, int64_t num_iter, double tolerance, int64_t chunk_size,
                const Text& arithmetic, bool bp_lambda, const Text& backend) {
  const Place place({"q", q}, {{"k", k},
                               {"v", v},
                               {"g", g},
                               {"gk", gk},
                               {"alpha", alpha},
                               {"beta", beta},
                               {"ridge", ridge},
                               {"h0", h0},
                               {"u0", u0},
                               {"d_o", d_o},
                               {"x", x},
                               {"segment_states", segment_states},
                               {"dh", dh},
                               {"du", du}});
  Call call =
      read(q, k, v, g, gk, alpha, beta, ridge, h0, u0, cu_seqlens, scale, ridge_ratio, solver,
           num_iter, tolerance, chunk_size, arithmetic, place.backend(backend), place.stream());
  call.inputs.cu_seqlens = call.cu_seqlens;
  call.options.bp_lambda = bp_lambda;
  const auto [B, T, H, K, V, N] = std::tuple(call.B, call.T, call.H, call.K, call.V, call.N);
  GkaOutputGrads output_grads;
  output_grads.d_o = const_view(d_o, "d_o");
  output_grads.d_h_final = const_view(dh, "dh");
  output_grads.d_u_final = const_view(du, "du");

  GkaInputGrads grads;
  const auto like_input = [&q, &call](const Tensor& input, View& view, const char* name) {
    Tensor grad =
        new_tensor(q, {input.size(0), input.size(1), input.size(2), input.size(3)}, call.dtype);
    view = mutable_view(grad, name);
    return grad;
  };
  const auto gate = [&](const OptionalTensor& input, View& view, const char* name) {
    if (!input) return no_tensor(q);
    Tensor grad = new_tensor(q, {B, T, H}, const_view(*input, name).dtype);
    view = mutable_view(grad, name);
    return grad;
  };
  const auto state = [&](const OptionalTensor& input, int64_t columns, View& view,
                         const char* name) {
    if (!input) return no_tensor(q);
    Tensor grad = new_tensor(q, {N, H, K, columns}, call.state_dtype);
    view = mutable_view(grad, name);
    return grad;
  };
  Tensor dq = like_input(q, grads.dq, "dq");
  Tensor dk = like_input(k, grads.dk, "dk");
  Tensor dv = like_input(v, grads.dv, "dv");
  Tensor dg = gate(g, grads.dg, "dg");
  Tensor dgk = gate(gk, grads.dgk, "dgk");
  Tensor dalpha = gate(alpha, grads.dalpha, "dalpha");
  Tensor dbeta = gate(beta, grads.dbeta, "dbeta");
  Tensor dridge = gate(ridge, grads.d_ridge_ratio, "dridge");
  Tensor dh0 = state(h0, K, grads.d_h0, "dh0");
  Tensor du0 = state(u0, V, grads.d_u0, "du0");
  const GkaSaved saved{const_view(x, "x"),
                       as_segments(const_view(segment_states, "segment_states"), K, V)};
  gka_backward(call.inputs, saved, output_grads, grads, call.options);
  return {dq, dk, dv, dg, dgk, dalpha, dbeta, dridge, dh0, du0};
}

std::tuple<Tensor, Tensor> gka_step_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& h, const Tensor& u,
    const OptionalTensor& g, const OptionalTensor& gk, const OptionalTensor& alpha,
    const OptionalTensor& beta, const OptionalTensor& ridge, const OptionalTensor& cu_seqlens,
    const OptionalTensor& slots, const OptionalTensor& draft_k, const OptionalTensor& draft_v,
    const OptionalTensor& draft_g, const OptionalTensor& draft_gk, const OptionalTensor& draft_beta,
    const OptionalTensor& accepted, std::optional<double> scale, double ridge_ratio,
    const Text& solver, int64_t num_iter, double tolerance, int64_t chunk_size,
    const Text& arithmetic, bool want_residual, const Text& backend, bool is_draft) {
  const Place place({"q", q}, {{"k", k},
                               {"v", v},
                               {"g", g},
                               {"gk", gk},
                               {"alpha", alpha},
                               {"beta", beta},
                               {"ridge", ridge},
                               {"h", h},
                               {"u", u},
                               {"slots", slots},
                               {"draft_k", draft_k},
                               {"draft_v", draft_v},
                               {"draft_g", draft_g},
                               {"draft_gk", draft_gk},
                               {"draft_beta", draft_beta},
                               {"accepted", accepted}});
  Call call =
      read(q, k, v, g, gk, alpha, beta, ridge, {}, {}, cu_seqlens, scale, ridge_ratio, solver,
           num_iter, tolerance, chunk_size, arithmetic, place.backend(backend), place.stream());
  call.inputs.cu_seqlens = call.cu_seqlens;
  call.inputs.slots = small_numbers(slots, "slots");
  call.inputs.last_draft = {const_view(draft_k, "draft_k"), const_view(draft_v, "draft_v"),
                            const_view(draft_g, "draft_g"), const_view(draft_gk, "draft_gk"),
                            const_view(draft_beta, "draft_beta")};
  call.inputs.accepted = small_numbers(accepted, "accepted");
  call.inputs.is_draft = is_draft;
  Tensor o = new_tensor(q, {call.B, call.T, call.H, call.V}, call.dtype);
  Tensor residual =
      want_residual ? new_tensor(q, {call.B, call.T, call.H}, call.fine_dtype) : no_tensor(q);
  GkaOutputs outputs;
  outputs.o = mutable_view(o, "o");
  outputs.h_final = mutable_view(h, "h");
  outputs.u_final = mutable_view(u, "u");
  if (want_residual) outputs.residual = mutable_view(residual, "residual");
  call.inputs.h0 = outputs.h_final;
  call.inputs.u0 = outputs.u_final;
  gka_step(call.inputs, outputs, call.options);
  return {o, residual};
}

}  // namespace
}  // namespace kalmanet::torch_ops

#define KN_REGISTER(device)                                                   \
  STABLE_TORCH_LIBRARY_IMPL(kalmanet, device, m) {                            \
    m.impl("gka_forward", TORCH_BOX(&kalmanet::torch_ops::gka_forward_op));   \
    m.impl("gka_backward", TORCH_BOX(&kalmanet::torch_ops::gka_backward_op)); \
    m.impl("gka_step", TORCH_BOX(&kalmanet::torch_ops::gka_step_op));         \
  }
KN_REGISTER(CPU)
KN_REGISTER(CUDA)
