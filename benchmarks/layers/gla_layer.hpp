// A plain gated-linear-attention layer: the peer of the training step. GatedKalmaNet without the
// ridge regression: the same projections, convolutions, normalised keys, beta and decay gates, norm
// and output gate at the same widths; the core is
//
//   U_t = e^{g_t} U_{t-1} + beta_t k_t (beta_t v_t)^T        o_t = K^-1/2 U_t^T q_t
//
// in chunks, by LibTorch's batched products. No alpha gate, which only the regression needs.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace kalmanet::bench {

// q, k [B,T,H,K], v [B,T,H,V], g (log decay <= 0) and beta [B,T,H], all float32; T a multiple of
// 64. Returns o [B,T,H,V]. Differentiable once, by the chunked formulas of docs/math.md.
at::Tensor chunked_gla(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& g, const at::Tensor& beta);

struct GlaLayerOptions {
  int64_t hidden_size = 2048, num_heads = 16, head_dim = 128, conv_size = 4;
};

class GlaLayerImpl : public torch::nn::Module {
 public:
  explicit GlaLayerImpl(const GlaLayerOptions& options);
  // [B,T,hidden_size] -> [B,T,hidden_size]
  at::Tensor forward(const at::Tensor& x);

 private:
  GlaLayerOptions options_;
  torch::nn::Linear q_proj_{nullptr}, k_proj_{nullptr}, v_proj_{nullptr}, g_proj_{nullptr},
      o_proj_{nullptr}, a_proj_{nullptr}, b_proj_{nullptr};
  at::Tensor q_conv_, k_conv_, v_conv_, A_log_, dt_bias_, o_norm_;
};
TORCH_MODULE(GlaLayer);

}  // namespace kalmanet::bench
