// The library's operators as differentiable functions of LibTorch tensors.
//
// Letters: B batch, T tokens, H heads, K key head dim, V value head dim, N sequences (B, or the
// number of packed ones), D channels, W convolution width.
//
// dtypes: float32 is computed as it is; bfloat16 and float16 are computed in float32 and the
// result is rounded once, to the dtype of v (of x, of o); states are float32 always. float64 needs
// backend = "reference" in gka() and gka_step() (slow; everything is float64 then, states too),
// and runs on plain LibTorch in causal_conv() and gated_rms_norm().
//
// Every function throws (c10::Error, kalmanet::Error or another std::exception) with a message that
// names the argument, before anything is written. First derivatives only: differentiating a
// backward (create_graph) is an error.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>

namespace kalmanet::layers {

using OptionalTensor = std::optional<at::Tensor>;

struct GkaOpOptions {
  double ridge_ratio = 0.02;         // where the tensor `ridge` is absent; > 0
  std::string solver = "chebyshev";  // "chebyshev", "direct", "cg" or "auto"
  int64_t num_iter = 30;             // >= 1, or 0: from the ridge ratio and `tolerance`
  double tolerance = 1e-5;
  // "bfloat16": Chebyshev's products in bfloat16 (kalmanet::Arithmetic says what that costs).
  std::string arithmetic = "standard";
  bool bp_lambda = true;         // false: f_t is a constant to the gradient
  int64_t chunk_size = 0;        // 0: the backend's choice
  std::optional<double> scale;   // absent: K^-1/2
  std::string backend = "auto";  // "auto", "cpu" or "reference"
};

struct GkaResult {
  at::Tensor o;  // [B,T,H,V], v's dtype
  at::Tensor h;  // [N,H,K,K]: the state H after the last token
  at::Tensor u;  // [N,H,K,V]: the state U after the last token
};

// Gated KalmaNet over whole sequences (include/kalmanet/gka.hpp has the equations). q [B,T,Hq,K],
// k [B,T,Hk,K], v [B,T,Hv,V]; H is the largest of their head counts and the gates' last size, and
// each head count divides it (head h reads head h / (H / count)). g, gk (log decays <= 0), alpha,
// beta, ridge: [B,T,H], each optional; `ridge` may also be one number (0 dimensions). h0 [N,H,K,K]
// and u0 [N,H,K,V] optional. cu_seqlens: int64 [N+1] on the CPU, needs B == 1. Differentiable
// through every tensor, and through all three results, by implicit differentiation of the solve.
GkaResult gka(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
              const OptionalTensor& g = {}, const OptionalTensor& gk = {},
              const OptionalTensor& alpha = {}, const OptionalTensor& beta = {},
              const OptionalTensor& ridge = {}, const OptionalTensor& h0 = {},
              const OptionalTensor& u0 = {}, const OptionalTensor& cu_seqlens = {},
              const GkaOpOptions& options = {});

// Decoding from a pool of states, and drafts (docs/decode.md): with slots, int32 [N], h and u of
// gka_step are [num_slots,...]; k .. beta and accepted (int32 [N]) are of the last draft.
struct GkaDraftParts {
  OptionalTensor slots, k, v, g, gk, beta, accepted;
  bool is_draft = false;
};

// The same answer token by token, for one or a few new tokens a sequence, without gradients: the
// states h [N,H,K,K] and u [N,H,K,V] are read and updated in place. Returns o [B,T,H,V].
at::Tensor gka_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const OptionalTensor& g, const OptionalTensor& gk, const OptionalTensor& alpha,
                    const OptionalTensor& beta, const OptionalTensor& ridge, at::Tensor h,
                    at::Tensor u, const OptionalTensor& cu_seqlens = {},
                    const GkaOpOptions& options = {}, const GkaDraftParts& draft = {});

// What a layer holds for its decode step between the projections (kalmanet/layer_step.hpp has the
// equations): weights, states that are updated in place, and switches.
struct LayerStepParts {
  at::Tensor conv_q_weight, conv_k_weight;  // [D,1,W] or [D,W]
  OptionalTensor conv_v_weight;             // absent: v as it is
  at::Tensor o_norm;                        // [V]
  OptionalTensor A_log, dt_bias;            // [H], with the logit a
  at::Tensor h, u, conv_q, conv_k;
  OptionalTensor conv_v;
  bool decay_h = true;
  double fixed_alpha = 1.0;
  std::string qk_norm = "official";
  double min_ridge = 0, max_ridge = 0;
  double norm_eps = 1e-6;
};

// One call for one or a few new tokens a sequence, without gradients, on the CPU: the projections'
// q [B,T,Hq,K], k, v and the logits gate [B,T,H,V], b, alpha, a, ridge [B,T,H], all of one dtype,
// to the rows [B,T,H,V] of that dtype that the output projection takes.
at::Tensor layer_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const OptionalTensor& gate, const OptionalTensor& b,
                      const OptionalTensor& alpha, const OptionalTensor& a,
                      const OptionalTensor& ridge, const LayerStepParts& parts,
                      const GkaOpOptions& options = {});

struct ConvResult {
  at::Tensor y;            // [B,T,D], x's dtype
  at::Tensor final_state;  // [N,D,W] float32; undefined unless asked for
};

// Causal depthwise convolution with optional SiLU: y_t = act(sum_j weight[d,j] x_{t-W+1+j}).
// x [B,T,D]; weight [D,1,W] (the checkpoint's shape) or [D,W]; state [N,D,W], the last W inputs
// before the first token, oldest first (absent: zeros). Differentiable.
ConvResult causal_conv(const at::Tensor& x, const at::Tensor& weight,
                       const OptionalTensor& state = {}, const OptionalTensor& cu_seqlens = {},
                       bool silu = true, bool want_final_state = false);

// One token a sequence, without gradients: x [N,D]; state [N,D,W] float32 updated in place.
at::Tensor causal_conv_step(const at::Tensor& x, const at::Tensor& weight, at::Tensor state,
                            bool silu = true);

// weight * o / sqrt(mean(o^2) + eps) * silu(gate) over the last dimension: o [..., V], gate of o's
// shape (absent: no gate), weight [V]. Differentiable.
at::Tensor gated_rms_norm(const at::Tensor& o, const OptionalTensor& gate, const at::Tensor& weight,
                          double eps = 1e-6);

}  // namespace kalmanet::layers
