// GatedKalmaNet: construction, initialisation and the forward pass around the gka operator.
#include "layers/gated_kalmanet.hpp"

#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "kalmanet/conv.hpp"
#include "kalmanet/error.hpp"
#include "kalmanet/gka.hpp"
#include "layers/head_norm.hpp"

namespace kalmanet::layers {
namespace {

using at::Tensor;

// Sequences of at most this many tokens take the recurrent step: the chunked operator pays for
// its products of a whole chunk only beyond it.
constexpr int64_t kMaxStepTokens = 8;

[[noreturn]] void fail(const char* argument, const std::string& message) {
  throw Error(ErrorCode::invalid_argument, argument, message);
}
[[noreturn]] void fail_shape(const char* argument, const std::string& message) {
  throw Error(ErrorCode::invalid_shape, argument, message);
}

template <class T>
std::string text(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

void require_between(const char* argument, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  fail(argument, "is " + text(value) + "; allowed are " + text(low) + " to " + text(high));
}

void validate(const GatedKalmaNetOptions& o) {
  constexpr int64_t kMany = int64_t{1} << 24;
  require_between("hidden_size", o.hidden_size, 1, kMany);
  require_between("head_dim", o.head_dim, 1, kMaxHeadDim);
  require_between("num_heads", o.num_heads, 1, kMany);
  require_between("num_k_heads", o.k_heads(), 1, kMany);
  require_between("num_v_heads", o.v_heads(), 1, kMany);
  require_between("conv_size", o.conv_size, 1, kMaxConvWidth);
  require_between("num_iter", o.num_iter, 0, 1'000'000);
  require_between("chunk_size", o.chunk_size, 0, 256);
  const int64_t H = o.expanded_heads();
  const std::pair<const char*, int64_t> counts[] = {
      {"num_heads", o.num_heads}, {"num_k_heads", o.k_heads()}, {"num_v_heads", o.v_heads()}};
  for (const auto& [argument, count] : counts) {
    if (H % count != 0) {
      fail(argument, "is " + text(count) + ", which does not divide the largest head count, " +
                         text(H) + ": every head of the layer reads one head of each");
    }
  }
  const double V = o.expand_v * static_cast<double>(o.head_dim);
  if (!(V >= 0.5) || std::abs(V - std::round(V)) > 1e-5 * V) {
    fail("expand_v", "is " + text(o.expand_v) + ", which gives a value head dim of " + text(V) +
                         " at head_dim " + text(o.head_dim) + "; it must be an integer >= 1");
  }
  if (o.head_v_dim() > kMaxHeadDim) {
    fail("expand_v", "gives a value head dim of " + text(o.head_v_dim()) + "; allowed are 1 to " +
                         text(kMaxHeadDim));
  }
  if (!(o.ridge_ratio > 0) || !std::isfinite(o.ridge_ratio)) {
    fail("ridge_ratio", "is " + text(o.ridge_ratio) + "; it must be a positive number");
  }
  if (!(o.tolerance > 0 && o.tolerance < 1)) {
    fail("tolerance", "is " + text(o.tolerance) + "; it must be between 0 and 1");
  }
  if (!(o.norm_eps >= 0) || !std::isfinite(o.norm_eps)) {
    fail("norm_eps", "is " + text(o.norm_eps) + "; it must not be negative");
  }
  if (o.solver != "chebyshev" && o.solver != "direct" && o.solver != "cg" && o.solver != "auto") {
    fail("solver",
         "is \"" + o.solver + "\"; allowed are \"chebyshev\", \"direct\", \"cg\" and \"auto\"");
  }
  if (o.arithmetic != "standard" && o.arithmetic != "bfloat16") {
    fail("arithmetic", "is \"" + o.arithmetic + "\"; allowed are \"standard\" and \"bfloat16\"");
  }
  if (o.arithmetic == "bfloat16" &&
      (o.solver != "chebyshev" || o.num_iter == kAutoNumIter || o.learned_ridge)) {
    fail("arithmetic",
         "is \"bfloat16\", which is for solver \"chebyshev\" with a num_iter >= 1; it cannot meet "
         "the tolerance that the other solvers, num_iter 0 and learned_ridge aim at");
  }
  KvExpansion::validate(o);
  if (o.qk_norm != "official" && o.qk_norm != "fla") {
    fail("qk_norm", "is \"" + o.qk_norm +
                        "\"; allowed are \"official\" (x / (|x| + 1e-6)) and \"fla\" (x / "
                        "sqrt(|x|^2 + 1e-6))");
  }
  if (o.fixed_alpha) {
    const double alpha = *o.fixed_alpha;
    if (!(alpha >= 0 && alpha <= 1)) {
      fail("fixed_alpha", "is " + text(alpha) + "; it must be between 0 and 1");
    }
    if (!o.use_alpha_connection && alpha != 1) {
      fail("fixed_alpha", "is " + text(alpha) +
                              " but use_alpha_connection is false, which means alpha 1; set one of "
                              "the two only");
    }
    if (o.learned_ridge && alpha == 0) {
      fail("learned_ridge",
           "has no effect with fixed_alpha 0, where nothing is solved; set one of the two only");
    }
  }
}

// A module with one parameter, or with a bias [sizes[0]] two, so that they are named
// "<module>.weight" and "<module>.bias" in the checkpoint. Unlike torch::nn::Linear it draws no
// random number when it is made.
class WeightImpl : public torch::nn::Module {
 public:
  explicit WeightImpl(at::IntArrayRef sizes, bool with_bias = false) {
    weight = register_parameter("weight", at::empty(sizes));
    if (with_bias) bias = register_parameter("bias", at::empty(sizes[0]));
  }
  Tensor weight, bias;
};

// rows [R,in] -> [R,out]. On rows rather than [B,T,in]: fewer operators run for the same product.
Tensor linear(const Tensor& weight, const Tensor& bias, const Tensor& rows) {
  return bias.defined() ? at::addmm(bias, rows, weight.t()) : at::mm(rows, weight.t());
}
Tensor linear(const torch::nn::LinearImpl& layer, const Tensor& rows) {
  return linear(layer.weight, layer.bias, rows);
}

// The number of tokens of the longest sequence; 0 where cu_seqlens is not valid (the operators
// then say why).
int64_t longest(const Tensor& x, const OptionalTensor& cu_seqlens) {
  if (!cu_seqlens) return x.size(1);
  if (cu_seqlens->scalar_type() != at::kLong || cu_seqlens->dim() != 1 || !cu_seqlens->is_cpu()) {
    return x.size(1);
  }
  const auto offsets = cu_seqlens->accessor<int64_t, 1>();
  int64_t result = 0;
  for (int64_t i = 1; i < offsets.size(0); ++i) {
    result = std::max(result, offsets[i] - offsets[i - 1]);
  }
  return result;
}

void require_state(const char* name, const Tensor& tensor, at::IntArrayRef sizes) {
  if (tensor.defined() && tensor.sizes() == sizes) return;
  fail_shape(name, "of the layer's state must have shape " + text(sizes) + ", got " +
                       (tensor.defined() ? text(tensor.sizes()) : "an undefined tensor"));
}

}  // namespace

int64_t GatedKalmaNetOptions::expanded_heads() const {
  return std::max({num_heads, k_heads(), v_heads()});
}

int64_t GatedKalmaNetOptions::head_v_dim() const {
  return std::llround(expand_v * static_cast<double>(head_dim));
}

GatedKalmaNetImpl::GatedKalmaNetImpl(const GatedKalmaNetOptions& options) : options_(options) {
  validate(options_);
  const auto& o = options_;
  const int64_t D = o.hidden_size, K = o.head_dim, V = o.head_v_dim(), H = o.expanded_heads();
  const auto project = [this, D](const char* name, int64_t out, bool bias) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(D, out).bias(bias)));
  };
  const auto weight = [this](const char* name, at::IntArrayRef sizes) {
    return register_module(name, std::make_shared<WeightImpl>(sizes))->weight;
  };
  q_proj_ = project("q_proj", o.num_heads * K, false);
  k_proj_ = project("k_proj", o.k_heads() * K, false);
  v_proj_ = project("v_proj", o.v_heads() * V, false);
  q_conv_ = weight("q_conv1d", {o.num_heads * K, 1, o.conv_size});
  k_conv_ = weight("k_conv1d", {o.k_heads() * K, 1, o.conv_size});
  if (o.use_v_conv) v_conv_ = weight("v_conv1d", {o.v_heads() * V, 1, o.conv_size});
  if (o.use_beta_gate) b_proj_ = project("b_proj", H, true);
  if (o.use_alpha_connection && !o.fixed_alpha) alpha_proj_ = project("alpha_proj", H, true);
  if (o.learned_ridge) {
    const auto ridge =
        register_module("ridge_proj", std::make_shared<WeightImpl>(at::IntArrayRef{H, D}, true));
    ridge_weight_ = ridge->weight;
    ridge_bias_ = ridge->bias;
  }
  if (o.use_forgetting_gate) {
    a_proj_ = project("a_proj", H, false);
    A_log_ = register_parameter("A_log", at::empty({H}));
    dt_bias_ = register_parameter("dt_bias", at::empty({H}));
  }
  if (o.use_gate) g_proj_ = project("g_proj", H * V, false);
  o_norm_ = weight("o_norm", {V});
  o_proj_ =
      register_module("o_proj", torch::nn::Linear(torch::nn::LinearOptions(H * V, D).bias(false)));
  if (o.kv_proj_rank) expansion_.emplace(*this, o);
  reset_parameters();
}

void GatedKalmaNetImpl::reset_parameters() {
  const at::NoGradGuard no_grad;
  for (auto* layer :
       {&q_proj_, &k_proj_, &v_proj_, &a_proj_, &b_proj_, &alpha_proj_, &g_proj_, &o_proj_}) {
    if (*layer) (*layer)->reset_parameters();
  }
  // A depthwise filter of W taps has fan in W.
  const double bound = 1 / std::sqrt(static_cast<double>(options_.conv_size));
  for (Tensor* weight : {&q_conv_, &k_conv_, &v_conv_}) {
    if (weight->defined()) weight->uniform_(-bound, bound);
  }
  o_norm_.fill_(1);
  if (expansion_) expansion_->reset_parameters();
  // A constant to begin with, and no draw taken from the generator: at the same seed a layer with a
  // learned ridge starts as the one with a fixed ridge does, and the input decides once it helps.
  if (options_.learned_ridge) {
    ridge_weight_.zero_();
    ridge_bias_.fill_(std::log(kInitialLearnedRidge));
  }
  if (A_log_.defined()) {
    // A of exactly 0 would be a logarithm of minus infinity.
    A_log_.uniform_(0, 16).clamp_min_(1e-6).log_();
    // dt_bias is the inverse softplus of dt: dt + log(1 - e^-dt).
    dt_bias_.uniform_(std::log(1e-3), std::log(1e-1)).exp_().clamp_min_(1e-4);
    dt_bias_.copy_(dt_bias_ + at::log(-at::expm1(-dt_bias_)));
  }
}

std::vector<std::string> GatedKalmaNetImpl::no_weight_decay() const {
  std::vector<std::string> names;
  for (const auto& item : named_parameters()) {
    const std::string& name = item.key();
    const bool bias = name.size() >= 5 && name.compare(name.size() - 5, 5, ".bias") == 0;
    if (bias || name == "A_log" || name == "dt_bias" || name == "o_norm.weight") {
      names.push_back(name);
    }
  }
  return names;
}

GkaLayerState GatedKalmaNetImpl::empty_state(int64_t num_sequences) const {
  const auto& o = options_;
  const int64_t H = o.expanded_heads(), K = o.head_dim, V = o.head_v_dim(), W = o.conv_size;
  const auto dtype = q_conv_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto zeros = [&](at::IntArrayRef sizes) {
    return at::zeros(sizes, q_conv_.options().dtype(dtype).requires_grad(false));
  };
  GkaLayerState state;
  state.h = zeros({num_sequences, H, K, K});
  state.u = zeros({num_sequences, H, K, V});
  state.conv_q = zeros({num_sequences, o.num_heads * K, W});
  state.conv_k = zeros({num_sequences, o.k_heads() * K, W});
  if (o.use_v_conv) state.conv_v = zeros({num_sequences, o.v_heads() * V, W});
  return state;
}

GkaOpOptions GatedKalmaNetImpl::op_options() const {
  const auto& o = options_;
  GkaOpOptions op;
  op.ridge_ratio = o.ridge_ratio;
  op.solver = o.solver;
  op.num_iter = o.learned_ridge ? kAutoNumIter : o.num_iter;
  op.tolerance = o.tolerance;
  op.arithmetic = o.arithmetic;
  op.bp_lambda = o.bp_lambda;
  op.chunk_size = o.chunk_size;
  op.backend = o.backend;
  if (!o.gla_rescale) op.scale = 1.0;
  if (o.fixed_alpha && *o.fixed_alpha == 0) {
    // o_t = scale U_t^T q_t whatever x_t is: the shortest solve there is.
    op.solver = "chebyshev";
    op.num_iter = 1;
    op.arithmetic = "standard";
  }
  return op;
}

Tensor GatedKalmaNetImpl::fused_step(const Tensor& rows, int64_t B, int64_t T, GkaLayerState& state,
                                     const GkaOpOptions& op) const {
  const auto& o = options_;
  const int64_t H = o.expanded_heads(), K = o.head_dim, V = o.head_v_dim();
  const Tensor q = linear(*q_proj_, rows).view({B, T, o.num_heads, K});
  const auto heads = [&](const torch::nn::Linear& layer, at::IntArrayRef sizes) {
    return linear(*layer, rows).to(q.scalar_type()).view(sizes);
  };
  const auto logit = [&](const torch::nn::Linear& layer) {
    return layer ? OptionalTensor(heads(layer, {B, T, H})) : std::nullopt;
  };
  OptionalTensor ridge;
  if (o.learned_ridge) {
    ridge = linear(ridge_weight_, ridge_bias_, rows).to(q.scalar_type()).view({B, T, H});
  }
  // Weights are taken as they are: the operator reads 16 bits, or float32 beside them.
  LayerStepParts parts;
  parts.conv_q_weight = q_conv_;
  parts.conv_k_weight = k_conv_;
  parts.o_norm = o_norm_;
  parts.h = state.h;
  parts.u = state.u;
  parts.conv_q = state.conv_q;
  parts.conv_k = state.conv_k;
  if (o.use_v_conv) {
    parts.conv_v_weight = v_conv_;
    parts.conv_v = state.conv_v;
  }
  if (o.use_forgetting_gate) {
    parts.A_log = A_log_;
    parts.dt_bias = dt_bias_;
  }
  parts.decay_h = o.use_forgetting_gate_kk;
  parts.fixed_alpha = o.fixed_alpha.value_or(1.0);
  parts.qk_norm = o.qk_norm;
  parts.min_ridge = kMinLearnedRidge;
  parts.max_ridge = kMaxLearnedRidge;
  parts.norm_eps = o.norm_eps;
  return layer_step(q, heads(k_proj_, {B, T, o.k_heads(), K}),
                    heads(v_proj_, {B, T, o.v_heads(), V}),
                    o.use_gate ? OptionalTensor(heads(g_proj_, {B, T, H, V})) : std::nullopt,
                    logit(b_proj_), logit(alpha_proj_), logit(a_proj_), ridge, parts, op);
}

Tensor GatedKalmaNetImpl::forward(const Tensor& x, const OptionalTensor& cu_seqlens,
                                  GkaLayerState* state) {
  const auto& o = options_;
  if (x.dim() != 3 || x.size(2) != o.hidden_size) {
    fail_shape("x", "must have shape [B,T,hidden_size] with hidden_size " + text(o.hidden_size) +
                        ", got " + text(x.sizes()));
  }
  const int64_t B = x.size(0), T = x.size(1), H = o.expanded_heads(), K = o.head_dim,
                V = o.head_v_dim(), W = o.conv_size;
  const auto weight_type = q_proj_->weight.scalar_type();
  if (x.scalar_type() != weight_type && !at::autocast::is_autocast_enabled(x.device().type())) {
    throw Error(ErrorCode::invalid_dtype, "x",
                std::string("has dtype ") + c10::toString(x.scalar_type()) +
                    " but the parameters are " + c10::toString(weight_type) +
                    "; convert one of them, or enable autocast");
  }
  if (cu_seqlens && B != 1) {
    fail_shape("cu_seqlens",
               "needs x with B = 1 (all sequences packed into one row), got B = " + text(B));
  }
  const int64_t N = cu_seqlens ? std::max<int64_t>(cu_seqlens->numel() - 1, 0) : B;
  // 16-bit activations are widened once, behind the projections; all in between is float32.
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const bool step =
      state != nullptr && !at::GradMode::is_enabled() && longest(x, cu_seqlens) <= kMaxStepTokens;
  const bool fresh = state != nullptr && !state->defined();
  if (fresh && step) *state = empty_state(N);
  const bool carried = state != nullptr && state->defined();
  if (carried) {
    require_state("h", state->h, {N, H, K, K});
    require_state("u", state->u, {N, H, K, V});
    require_state("conv_q", state->conv_q, {N, o.num_heads * K, W});
    require_state("conv_k", state->conv_k, {N, o.k_heads() * K, W});
    if (o.use_v_conv) require_state("conv_v", state->conv_v, {N, o.v_heads() * V, W});
  }

  // Everything between here and the operator works on rows [B*T, ...]: fewer views per product.
  const Tensor rows = x.reshape({B * T, o.hidden_size});
  const GkaOpOptions op = op_options();
  // (A backend that is not the device's own is an error, which the operators one by one give.)
  const bool own = (x.is_cpu() && (o.backend == "auto" || o.backend == "cpu")) ||
                   (x.is_cuda() && (o.backend == "auto" || o.backend == "cuda"));
  if (step && o.fused_step && !cu_seqlens && !o.expands() && own) {
    const Tensor out = fused_step(rows, B, T, *state, op).view({B * T, H * V});
    return linear(*o_proj_, out).view({B, T, o.hidden_size});
  }
  auto projected = type;  // what the projections gave before that
  const auto project = [&](const torch::nn::Linear& layer) {
    const Tensor out = linear(*layer, rows);
    projected = out.scalar_type();
    return out.to(type);
  };
  const auto convolve = [&](const Tensor& in, const Tensor& weight, Tensor GkaLayerState::* slot) {
    if (step && T == 1 && !cu_seqlens) return causal_conv_step(in, weight, state->*slot);
    const OptionalTensor before =
        carried ? OptionalTensor(state->*slot) : OptionalTensor(std::nullopt);
    ConvResult result = causal_conv(in.view({B, T, in.size(1)}), weight, before, cu_seqlens,
                                    /*silu=*/true, state != nullptr);
    if (state != nullptr) state->*slot = std::move(result.final_state);
    return result.y;
  };
  const auto normalise = [&](const Tensor& by_head) { return unit_heads(by_head, o.qk_norm); };
  Tensor q = normalise(
      convolve(project(q_proj_), q_conv_, &GkaLayerState::conv_q).view({B, T, o.num_heads, K}));
  Tensor k =
      convolve(project(k_proj_), k_conv_, &GkaLayerState::conv_k).view({B, T, o.k_heads(), K});
  Tensor v = project(v_proj_);
  if (o.use_v_conv) v = convolve(v, v_conv_, &GkaLayerState::conv_v);
  v = v.view({B, T, o.v_heads(), V});
  if (o.expands()) {
    k = expansion_->keys(k);
    v = expansion_->values(v);
  }
  k = normalise(k);

  // On the GPU the recurrence takes what the projections gave: 16-bit numbers run on matrix units.
  if (x.is_cuda() && projected != type) {
    for (Tensor* t : {&q, &k, &v}) *t = t->to(projected);
  }

  const auto per_head = [&](const Tensor& gate) { return gate.view({B, T, H}); };
  OptionalTensor g, gk, alpha, beta, ridge;
  if (o.use_beta_gate) beta = per_head(at::sigmoid(project(b_proj_)) + 1e-6);
  if (alpha_proj_) alpha = per_head(at::sigmoid(project(alpha_proj_)));
  if (o.fixed_alpha && *o.fixed_alpha != 1) {
    alpha = at::full({}, *o.fixed_alpha, q.options().requires_grad(false)).expand({B, T, H});
  }
  if (o.use_forgetting_gate) {
    const Tensor rate = at::softplus(project(a_proj_) + dt_bias_.to(type));
    g = per_head(rate * -A_log_.to(type).exp());
    if (o.use_forgetting_gate_kk) gk = g;
  }
  if (o.learned_ridge) {
    const Tensor log_ridge = linear(ridge_weight_, ridge_bias_, rows).to(type);
    ridge = per_head(
        at::exp(at::clamp(log_ridge, std::log(kMinLearnedRidge), std::log(kMaxLearnedRidge))));
  }

  Tensor out;
  if (step) {
    out = gka_step(q, k, v, g, gk, alpha, beta, ridge, state->h, state->u, cu_seqlens, op);
  } else {
    const OptionalTensor h0 = carried ? OptionalTensor(state->h) : std::nullopt;
    const OptionalTensor u0 = carried ? OptionalTensor(state->u) : std::nullopt;
    GkaResult result = gka(q, k, v, g, gk, alpha, beta, ridge, h0, u0, cu_seqlens, op);
    out = std::move(result.o);
    if (state != nullptr) {
      state->h = std::move(result.h);
      state->u = std::move(result.u);
    }
  }

  OptionalTensor gate;
  if (o.use_gate) gate = linear(*g_proj_, rows).to(out.scalar_type()).view({B, T, H, V});
  out = gated_rms_norm(out, gate, o_norm_.to(type), o.norm_eps);
  out = out.view({B * T, H * V}).to(weight_type);
  return linear(o_proj_->weight, o_proj_->bias, out).view({B, T, o.hidden_size});
}

}  // namespace kalmanet::layers
