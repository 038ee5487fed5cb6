// Autograd functions over torch.ops.kalmanet.*, found through PyTorch's dispatcher so that the
// device of the tensors decides which implementation runs.
#include "layers/ops.hpp"

#include <utility>

#include "layers/find_operator.hpp"
#include "layers/plain.hpp"

namespace kalmanet::layers {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

Tensor value(const OptionalTensor& tensor) {
  return tensor.has_value() ? *tensor : Tensor();
}

bool needs_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

template <class... Tensors>
bool records(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_grad(tensors) || ...);
}

// 16-bit floating point to float32; all else as it is (an integer tensor is refused further down).
Tensor widened(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kBFloat16 || type == at::kHalf ? tensor.to(at::kFloat) : tensor;
}
OptionalTensor widened(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(widened(*tensor)) : std::nullopt;
}

void refuse_double_backward(const char* what) {
  TORCH_CHECK(!at::GradMode::is_enabled(), what,
              ": the backward pass itself is not differentiable; call backward() or grad() without "
              "create_graph");
}

// The CPU's kernels read float32 fastest; the GPU's take 16 bits as they are, on matrix units.
Tensor for_gka(const Tensor& tensor) {
  return tensor.is_cuda() ? tensor : widened(tensor);
}

// Tells autograd that `state` was written to: a graph that saved it then refuses to run backward
// instead of using the new values.
void mark_written(const Tensor& state) {
  state.unsafeGetTensorImpl()->bump_version();
}

// ---- GKA ----

using GkaForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, std::optional<double>, double, std::string_view,
    int64_t, double, int64_t, std::string_view, bool, bool, std::string_view, bool);
using GkaBackward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::optional<double>,
        double, std::string_view, int64_t, double, int64_t, std::string_view, bool,
        std::string_view);
using GkaStep = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, std::optional<double>, double, std::string_view, int64_t, double,
    int64_t, std::string_view, bool, std::string_view, bool);

struct GkaResults {
  Tensor o, h, u, x, segment_states;
};

GkaResults forward_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                      const OptionalTensor& gk, const OptionalTensor& alpha,
                      const OptionalTensor& beta, const OptionalTensor& ridge,
                      const OptionalTensor& h0, const OptionalTensor& u0,
                      const OptionalTensor& cu_seqlens, const GkaOpOptions& options, bool save_x) {
  static const auto op = find_operator<GkaForward>("kalmanet::gka_forward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  auto [o, h, u, x, residual, segment_states] = op.call(
      q, k, v, g, gk, alpha, beta, ridge, h0, u0, cu_seqlens, options.scale, options.ridge_ratio,
      options.solver, options.num_iter, options.tolerance, options.chunk_size, options.arithmetic,
      save_x, /*want_residual=*/false, options.backend, options.bp_lambda);
  return {std::move(o), std::move(h), std::move(u), std::move(x), std::move(segment_states)};
}

struct SavedOptions : torch::CustomClassHolder {
  explicit SavedOptions(const GkaOpOptions& o) : options(o) {}
  GkaOpOptions options;
};

class GkaFunction : public torch::autograd::Function<GkaFunction> {
 public:
  static constexpr size_t kInputs = 11;  // tensors, of which the last, cu_seqlens, has no gradient

  // x spares the CPU's backward one solve. The GPU's solves again in any case, and its forward is
  // on matrix units only where it need not write x.
  static bool saves_x(const Tensor& q) { return !q.is_cuda(); }

  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const OptionalTensor& g, const OptionalTensor& gk,
                               const OptionalTensor& alpha, const OptionalTensor& beta,
                               const OptionalTensor& ridge, const OptionalTensor& h0,
                               const OptionalTensor& u0, const OptionalTensor& cu_seqlens,
                               const GkaOpOptions& options) {
    auto [o, h, u, x, segment_states] =
        forward_op(q, k, v, g, gk, alpha, beta, ridge, h0, u0, cu_seqlens, options, saves_x(q));
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, value(g), value(gk), value(alpha), value(beta), value(ridge),
                            value(h0), value(u0), value(cu_seqlens), saves_x(q) ? x : Tensor(),
                            segment_states.dim() == 4 ? segment_states : Tensor()});
    ctx->saved_data["heads"] = o.size(2);
    ctx->saved_data["options"] =
        c10::IValue::make_capsule(c10::make_intrusive<SavedOptions>(options));
    return {o, h, u};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward("gka");
    variable_list result(kInputs + 1);
    const Tensor &d_h = grads[1], &d_u = grads[2];
    if (!grads[0].defined() && !d_h.defined() && !d_u.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto holder =
        c10::static_intrusive_pointer_cast<SavedOptions>(ctx->saved_data["options"].toCapsule());
    const GkaOpOptions& options = holder->options;
    const Tensor &v = saved[2], &x = saved[kInputs], &segments = saved[kInputs + 1];
    const Tensor d_o =
        grads[0].defined()
            ? grads[0]
            : at::zeros({v.size(0), v.size(1), ctx->saved_data["heads"].toInt(), v.size(3)},
                        v.options());
    static const auto op = find_operator<GkaBackward>("kalmanet::gka_backward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dv, dg, dgk, dalpha, dbeta, dridge, dh0, du0] = op.call(
        d_o, saved[0], saved[1], v, optional(saved[3]), optional(saved[4]), optional(saved[5]),
        optional(saved[6]), optional(saved[7]), optional(saved[8]), optional(saved[9]),
        optional(saved[10]), optional(x), optional(segments), optional(d_h), optional(d_u),
        options.scale, options.ridge_ratio, options.solver, options.num_iter, options.tolerance,
        options.chunk_size, options.arithmetic, options.bp_lambda, options.backend);
    variable_list all = {dq, dk, dv, dg, dgk, dalpha, dbeta, dridge, dh0, du0};
    // The operator returns empty tensors where an input was absent.
    for (size_t i = 0; i < all.size(); ++i) {
      if (saved[i].defined()) result[i] = std::move(all[i]);
    }
    return result;
  }
};

// ---- Causal convolution ----

using ConvForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, bool, bool);
using ConvBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                        const OptionalTensor&,
                                                        const OptionalTensor&,
                                                        const OptionalTensor&, bool);
using ConvStep = Tensor(const Tensor&, const Tensor&, const Tensor&, bool);

Tensor flat_weight(const Tensor& weight) {
  return weight.dim() == 3 && weight.size(1) == 1 ? weight.select(1, 0) : weight;
}

ConvResult conv_op(const Tensor& x, const Tensor& weight, const OptionalTensor& state,
                   const OptionalTensor& cu_seqlens, bool silu, bool want_final_state) {
  static const auto op = find_operator<ConvForward>("kalmanet::causal_conv_forward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  auto [y, final_state] =
      op.call(x, flat_weight(weight), state, cu_seqlens, silu, want_final_state);
  return {std::move(y), want_final_state ? std::move(final_state) : Tensor()};
}

class ConvFunction : public torch::autograd::Function<ConvFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                               bool silu, bool want_final_state) {
    const ConvResult result = conv_op(x, weight, state, cu_seqlens, silu, want_final_state);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, weight, value(state), value(cu_seqlens)});
    ctx->saved_data["silu"] = silu;
    if (!want_final_state) return {result.y};
    return {result.y, result.final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward("causal_conv");
    variable_list result(6);
    const Tensor d_state = grads.size() > 1 ? grads[1] : Tensor();
    if (!grads[0].defined() && !d_state.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    static const auto op = find_operator<ConvBackward>("kalmanet::causal_conv_backward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dx, dweight, dstate] =
        op.call(grads[0].defined() ? grads[0] : at::zeros_like(x), x, flat_weight(weight),
                optional(saved[2]), optional(saved[3]), optional(d_state),
                ctx->saved_data["silu"].toBool());
    result[0] = std::move(dx);
    result[1] = dweight.view(weight.sizes());
    if (saved[2].defined()) result[2] = std::move(dstate);
    return result;
  }
};

// ---- The fused decode step ----

using LayerStep = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
    const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    std::optional<double>, double, std::string_view, int64_t, double, bool, double,
    std::string_view, double, double, double, bool);

// ---- Gated RMS norm ----

using NormForward = Tensor(const Tensor&, const OptionalTensor&, const Tensor&, double);
using NormBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                        const OptionalTensor&, const Tensor&,
                                                        double);

Tensor norm_op(const Tensor& o, const OptionalTensor& gate, const Tensor& weight, double eps) {
  static const auto op = find_operator<NormForward>("kalmanet::gated_rms_norm_forward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(o, gate, weight, eps);
}

class NormFunction : public torch::autograd::Function<NormFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& o, const OptionalTensor& gate,
                        const Tensor& weight, double eps) {
    ctx->save_for_backward({o, value(gate), weight});
    ctx->saved_data["eps"] = eps;
    return norm_op(o, gate, weight, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward("gated_rms_norm");
    const auto saved = ctx->get_saved_variables();
    static const auto op = find_operator<NormBackward>("kalmanet::gated_rms_norm_backward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [d_o, d_gate, d_weight] = op.call(grads[0], saved[0], optional(saved[1]), saved[2],
                                           ctx->saved_data["eps"].toDouble());
    return {d_o, saved[1].defined() ? d_gate : Tensor(), d_weight, Tensor()};
  }
};

// One number as a ridge ratio for every token and head; autograd sums its gradient.
OptionalTensor ridge_per_token(const OptionalTensor& ridge, const Tensor& q, const Tensor& k,
                               const Tensor& v) {
  if (!ridge || ridge->dim() != 0) return ridge;
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
              "q, k, v: must have the 4 dimensions [B,T,heads,head dim]");
  const int64_t heads = std::max({q.size(2), k.size(2), v.size(2)});
  return ridge->expand({q.size(0), q.size(1), heads});
}

}  // namespace

GkaResult gka(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& g,
              const OptionalTensor& gk, const OptionalTensor& alpha, const OptionalTensor& beta,
              const OptionalTensor& ridge, const OptionalTensor& h0, const OptionalTensor& u0,
              const OptionalTensor& cu_seqlens, const GkaOpOptions& options) {
  const Tensor q = for_gka(q_in), k = for_gka(k_in), v = for_gka(v_in);
  const OptionalTensor g32 = widened(g), gk32 = gk && g && gk->is_same(*g) ? g32 : widened(gk);
  const OptionalTensor alpha32 = widened(alpha), beta32 = widened(beta);
  const OptionalTensor ridge32 = ridge_per_token(widened(ridge), q, k, v);
  GkaResult result;
  if (records(q, k, v, g32, gk32, alpha32, beta32, ridge32, h0, u0)) {
    variable_list out = GkaFunction::apply(q, k, v, g32, gk32, alpha32, beta32, ridge32, h0, u0,
                                           cu_seqlens, options);
    result = {std::move(out[0]), std::move(out[1]), std::move(out[2])};
  } else {
    GkaResults all = forward_op(q, k, v, g32, gk32, alpha32, beta32, ridge32, h0, u0, cu_seqlens,
                                options, /*save_x=*/false);
    result = {std::move(all.o), std::move(all.h), std::move(all.u)};
  }
  result.o = result.o.to(v_in.scalar_type());
  return result;
}

Tensor gka_step(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& g,
                const OptionalTensor& gk, const OptionalTensor& alpha, const OptionalTensor& beta,
                const OptionalTensor& ridge, Tensor h, Tensor u, const OptionalTensor& cu_seqlens,
                const GkaOpOptions& options, const GkaDraftParts& draft) {
  static const auto op = find_operator<GkaStep>("kalmanet::gka_step");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor q = for_gka(q_in), k = for_gka(k_in), v = for_gka(v_in);
  const auto drafted = [](const OptionalTensor& t) {
    return t ? OptionalTensor(for_gka(*t)) : std::nullopt;
  };
  auto [o, residual] =
      op.call(q, k, v, h, u, widened(g), widened(gk), widened(alpha), widened(beta),
              ridge_per_token(widened(ridge), q, k, v), cu_seqlens, draft.slots, drafted(draft.k),
              drafted(draft.v), widened(draft.g), widened(draft.gk), widened(draft.beta),
              draft.accepted, options.scale, options.ridge_ratio, options.solver, options.num_iter,
              options.tolerance, options.chunk_size, options.arithmetic, /*want_residual=*/false,
              options.backend, draft.is_draft);
  mark_written(h);
  mark_written(u);
  return o.to(v_in.scalar_type());
}

Tensor layer_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& gate,
                  const OptionalTensor& b, const OptionalTensor& alpha, const OptionalTensor& a,
                  const OptionalTensor& ridge, const LayerStepParts& parts,
                  const GkaOpOptions& options) {
  static const auto op = find_operator<LayerStep>("kalmanet::layer_step");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto flat = [](const OptionalTensor& weight) {
    return weight ? OptionalTensor(flat_weight(*weight)) : std::nullopt;
  };
  auto [o, residual] =
      op.call(q, k, v, parts.h, parts.u, parts.conv_q, parts.conv_k, parts.conv_v,
              flat_weight(parts.conv_q_weight), flat_weight(parts.conv_k_weight),
              flat(parts.conv_v_weight), parts.o_norm, gate, b, alpha, a, ridge, parts.A_log,
              parts.dt_bias, options.scale, options.ridge_ratio, options.solver, options.num_iter,
              options.tolerance, parts.decay_h, parts.fixed_alpha, parts.qk_norm, parts.min_ridge,
              parts.max_ridge, parts.norm_eps, /*want_residual=*/false);
  for (const Tensor& state : {parts.h, parts.u, parts.conv_q, parts.conv_k}) mark_written(state);
  if (parts.conv_v) mark_written(*parts.conv_v);
  return o;
}

ConvResult causal_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& state,
                       const OptionalTensor& cu_seqlens, bool silu, bool want_final_state) {
  if (x.scalar_type() == at::kDouble) {
    return plain_causal_conv(x, weight, state, cu_seqlens, silu, want_final_state);
  }
  const Tensor x32 = widened(x), weight32 = widened(weight);
  ConvResult result;
  if (records(x32, weight32, state)) {
    variable_list out =
        ConvFunction::apply(x32, weight32, state, cu_seqlens, silu, want_final_state);
    result = {std::move(out[0]), want_final_state ? std::move(out[1]) : Tensor()};
  } else {
    result = conv_op(x32, weight32, state, cu_seqlens, silu, want_final_state);
  }
  result.y = result.y.to(x.scalar_type());
  return result;
}

Tensor causal_conv_step(const Tensor& x, const Tensor& weight, Tensor state, bool silu) {
  const at::NoGradGuard no_grad;
  if (x.scalar_type() == at::kDouble) {
    const ConvResult result =
        plain_causal_conv(x.unsqueeze(1), weight, state, std::nullopt, silu, true);
    state.copy_(result.final_state);
    return result.y.squeeze(1);
  }
  static const auto op = find_operator<ConvStep>("kalmanet::causal_conv_step");
  const Tensor y = op.call(widened(x), flat_weight(widened(weight)), state, silu);
  mark_written(state);
  return y.to(x.scalar_type());
}

Tensor gated_rms_norm(const Tensor& o, const OptionalTensor& gate, const Tensor& weight,
                      double eps) {
  TORCH_CHECK(!gate || gate->sizes() == o.sizes(), "gate: must have o's shape ", o.sizes(),
              ", got ", gate ? gate->sizes() : at::IntArrayRef());
  if (o.scalar_type() == at::kDouble) return plain_gated_rms_norm(o, gate, weight, eps);
  TORCH_CHECK(o.dim() >= 1, "o: must have at least 1 dimension, got none");
  const auto rows = [&o](const Tensor& t) {
    // (A gate of another dtype than o's, as under autocast, is given o's.)
    return (t.is_cuda() ? t.to(o.scalar_type()) : widened(t)).reshape({-1, t.size(-1)});
  };
  const Tensor o32 = rows(o), weight32 = widened(weight);
  const OptionalTensor gate32 = gate ? OptionalTensor(rows(*gate)) : std::nullopt;
  const Tensor y = records(o32, gate32, weight32) ? NormFunction::apply(o32, gate32, weight32, eps)
                                                  : norm_op(o32, gate32, weight32, eps);
  return y.view(o.sizes()).to(o.scalar_type());
}

}  // namespace kalmanet::layers
