// The plain gated-linear-attention layer.
#include "gla_layer.hpp"

#include <cmath>

#include "layers/head_norm.hpp"
#include "layers/ops.hpp"

namespace kalmanet::bench {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t C = 64;  // tokens a chunk

// [B,T,H,D] -> [B*H*(T/C), C, D], or [B,T,H] -> [B*H*(T/C), C]: chunks of a head in a row.
Tensor chunked(const Tensor& t) {
  const int64_t n = t.size(0) * t.size(2) * (t.size(1) / C);
  return t.dim() == 4 ? t.transpose(1, 2).reshape({n, C, t.size(3)})
                      : t.transpose(1, 2).reshape({n, C});
}
Tensor unchunked(const Tensor& t, int64_t B, int64_t T, int64_t H) {
  return t.dim() == 3 ? t.reshape({B, H, T, t.size(2)}).transpose(1, 2)
                      : t.reshape({B, H, T}).transpose(1, 2);
}

// `adds` [heads, chunks, K, V]: what each chunk adds; becomes the states that the chunks start from
// (reversed: end with). decay [heads, chunks].
void scan(const Tensor& adds, const Tensor& decay, bool reverse) {
  Tensor carry = at::zeros_like(adds.select(1, 0));
  const int64_t chunks = adds.size(1);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t c = reverse ? chunks - 1 - i : i;
    const Tensor slot = adds.select(1, c);
    const Tensor following = at::addcmul(slot, carry, decay.select(1, c).unsqueeze(1).unsqueeze(2));
    slot.copy_(carry);
    carry = following;
  }
}

class ChunkedGla : public torch::autograd::Function<ChunkedGla> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& q_in, const Tensor& k_in,
                        const Tensor& v_in, const Tensor& g_in, const Tensor& beta_in) {
    const int64_t B = q_in.size(0), T = q_in.size(1), H = q_in.size(2), K = q_in.size(3);
    const double scale = 1 / std::sqrt(static_cast<double>(K));
    const Tensor q = chunked(q_in), k = chunked(k_in), v = chunked(v_in);
    const Tensor total = chunked(g_in).cumsum(1), beta = chunked(beta_in).unsqueeze(2);
    const Tensor kb = k * beta, vb = v * beta;
    const Tensor mask = (total.unsqueeze(2) - total.unsqueeze(1)).tril_().exp_().tril_();
    const Tensor since = total.exp().unsqueeze(2), to_end = mask.select(1, C - 1).unsqueeze(2);
    const Tensor decay = since.select(1, C - 1).reshape({B * H, T / C});
    const Tensor u0 = at::bmm((kb * to_end).transpose(1, 2), vb);
    scan(u0.view({B * H, T / C, K, v.size(2)}), decay, false);
    const Tensor qs = q * (since * scale);  // scale e^{G_t} q_t
    const Tensor dots = at::bmm(q, kb.transpose(1, 2)).mul_(mask).mul_(scale);
    Tensor o = at::bmm(qs, u0);
    o.baddbmm_(dots, vb);
    ctx->save_for_backward(
        {q, k, v, beta, kb, vb, mask, since, to_end.contiguous(), decay, u0, qs, dots});
    ctx->saved_data["B"] = B;
    ctx->saved_data["H"] = H;
    return unchunked(o, B, T, H);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const Tensor &q = s[0], &k = s[1], &v = s[2], &beta = s[3], &kb = s[4], &vb = s[5],
                 &mask = s[6], &since = s[7], &to_end = s[8], &decay = s[9], &u0 = s[10],
                 &qs = s[11], &dots = s[12];
    const int64_t B = ctx->saved_data["B"].toInt(), H = ctx->saved_data["H"].toInt();
    const int64_t T = q.size(0) * C / (B * H), K = q.size(2), V = v.size(2);
    const double scale = 1 / std::sqrt(static_cast<double>(K));
    const Tensor d_o = chunked(grads[0]);
    const Tensor do_v = at::bmm(d_o, vb.transpose(1, 2)).mul_(mask).mul_(scale);
    Tensor dq = at::bmm(d_o, u0.transpose(1, 2)).mul_(since * scale);
    dq.baddbmm_(do_v, kb);
    const Tensor e = at::bmm(qs.transpose(1, 2), d_o);
    scan(e.view({B * H, T / C, K, V}), decay, true);
    Tensor dkb = at::bmm(vb, e.transpose(1, 2)).mul_(to_end);
    dkb.baddbmm_(do_v.transpose(1, 2), q);
    Tensor dvb = at::bmm(kb, e).mul_(to_end);
    dvb.baddbmm_(dots.transpose(1, 2), d_o);
    // Token i's pair fades by every later gate: dg_t = the sum over i >= t of q.dq - k.dk.
    const Tensor r = (q * dq).sum(2) - (kb * dkb).sum(2);
    const Tensor dg =
        r.view({B * H, T}).to(at::kDouble).flip(1).cumsum(1).flip(1).to(at::kFloat).view({-1, C});
    const Tensor dbeta = (dkb * k).sum(2) + (dvb * v).sum(2);
    return {unchunked(dq, B, T, H), unchunked(dkb.mul_(beta), B, T, H),
            unchunked(dvb.mul_(beta), B, T, H), unchunked(dg, B, T, H), unchunked(dbeta, B, T, H)};
  }
};

Tensor linear(const torch::nn::Linear& layer, const Tensor& rows) {
  return layer->bias.defined() ? at::addmm(layer->bias, rows, layer->weight.t())
                               : at::mm(rows, layer->weight.t());
}

}  // namespace

Tensor chunked_gla(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                   const Tensor& beta) {
  TORCH_CHECK(q.size(1) % C == 0, "chunked_gla: T is ", q.size(1), "; it must be a multiple of ",
              C);
  return ChunkedGla::apply(q, k, v, g, beta);
}

GlaLayerImpl::GlaLayerImpl(const GlaLayerOptions& options) : options_(options) {
  const int64_t D = options.hidden_size, H = options.num_heads, inner = H * options.head_dim;
  const auto project = [&](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias)));
  };
  q_proj_ = project("q_proj", D, inner, false);
  k_proj_ = project("k_proj", D, inner, false);
  v_proj_ = project("v_proj", D, inner, false);
  g_proj_ = project("g_proj", D, inner, false);
  o_proj_ = project("o_proj", inner, D, false);
  a_proj_ = project("a_proj", D, H, false);
  b_proj_ = project("b_proj", D, H, true);
  const double bound = 1 / std::sqrt(static_cast<double>(options.conv_size));
  const auto conv = [&](const char* name) {
    return register_parameter(name,
                              at::empty({inner, 1, options.conv_size}).uniform_(-bound, bound));
  };
  q_conv_ = conv("q_conv");
  k_conv_ = conv("k_conv");
  v_conv_ = conv("v_conv");
  A_log_ = register_parameter("A_log", at::empty({H}).uniform_(1e-6, 16).log_());
  const Tensor dt = at::empty({H}).uniform_(std::log(1e-3), std::log(1e-1)).exp_();
  dt_bias_ = register_parameter("dt_bias", dt + at::log(-at::expm1(-dt)));
  o_norm_ = register_parameter("o_norm", at::ones({options.head_dim}));
}

Tensor GlaLayerImpl::forward(const Tensor& x) {
  const int64_t B = x.size(0), T = x.size(1), H = options_.num_heads, K = options_.head_dim;
  const Tensor rows = x.reshape({B * T, options_.hidden_size});
  const auto convolved = [&](const torch::nn::Linear& layer, const Tensor& weight) {
    const Tensor in = linear(layer, rows).view({B, T, H * K});
    return layers::causal_conv(in, weight).y.view({B, T, H, K});
  };
  const auto per_head = [&](const Tensor& gate) { return gate.view({B, T, H}); };
  const Tensor q = layers::unit_heads(convolved(q_proj_, q_conv_));
  const Tensor k = layers::unit_heads(convolved(k_proj_, k_conv_));
  const Tensor v = convolved(v_proj_, v_conv_);
  const Tensor beta = per_head(at::sigmoid(linear(b_proj_, rows)) + 1e-6);
  const Tensor g = per_head(at::softplus(linear(a_proj_, rows) + dt_bias_) * -A_log_.exp());
  const Tensor gate = linear(g_proj_, rows).view({B, T, H, K});
  const Tensor o = layers::gated_rms_norm(chunked_gla(q, k, v, g, beta), gate, o_norm_);
  return linear(o_proj_, o.reshape({B * T, H * K})).view({B, T, options_.hidden_size});
}

}  // namespace kalmanet::bench
