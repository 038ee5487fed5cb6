// The Gated KalmaNet layer: projections, short convolutions, gates, the ridge memory, output norm.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "layers/ops.hpp"

namespace kalmanet::layers {

// The published layers' switches. Their two ways to name head counts map onto this one: the
// official num_q_heads / num_k_heads / num_v_heads are num_heads / num_k_heads / num_v_heads;
// flash-linear-attention's num_kv_heads sets num_k_heads and num_v_heads.
struct GatedKalmaNetOptions {
  int64_t hidden_size = 2048;
  int64_t head_dim = 128;              // K
  int64_t num_heads = 16;              // query heads
  std::optional<int64_t> num_k_heads;  // absent: num_heads
  std::optional<int64_t> num_v_heads;  // absent: num_heads
  double expand_v = 1.0;               // V = expand_v * head_dim, which must be an integer
  bool use_beta_gate = true;           // k and v times beta = sigmoid(b_proj(x)) + 1e-6
  bool use_alpha_connection = true;  // mix q and x by alpha = sigmoid(alpha_proj(x)); else alpha 1
  bool use_v_conv = true;            // convolution (and SiLU) on v; else v is v_proj(x)
  bool use_forgetting_gate = true;   // U decays
  bool use_forgetting_gate_kk = true;  // H decays too; only with use_forgetting_gate
  bool gla_rescale = true;             // scale K^-1/2; else 1
  bool use_gate = true;                // output gate silu(g_proj(x))
  bool bp_lambda = true;
  double ridge_ratio = 0.02;
  int64_t num_iter = 30;  // 0: auto
  std::string solver = "chebyshev";
  double tolerance = 1e-5;
  std::string arithmetic = "standard";  // "bfloat16" (kalmanet::Arithmetic): chebyshev, no auto
  int64_t conv_size = 4;
  double norm_eps = 1e-6;
  std::string qk_norm = "official";  // x / (|x| + 1e-6); "fla": x / sqrt(|x|^2 + 1e-6)
  // a_t = exp(clamp(ridge_proj(x), ln 1.2e-4, ln 0.135)) instead of ridge_ratio, and the number of
  // iterations is auto: it follows the smallest a_t and `tolerance`.
  bool learned_ridge = false;
  // Replaces the alpha gate by a constant in 0..1: 0 is gated linear attention (nothing is solved),
  // 1 the pure ridge.
  std::optional<double> fixed_alpha;
  int64_t chunk_size = 0;        // 0: the backend's choice
  std::string backend = "auto";  // "auto", "cpu"; "reference" computes float64 (slow)
  // The recurrent step in one call between the projections; false: operator by operator, the same
  // answer. Packed sequences and the reference backend always go operator by operator.
  bool fused_step = true;

  int64_t k_heads() const { return num_k_heads.value_or(num_heads); }
  int64_t v_heads() const { return num_v_heads.value_or(num_heads); }
  int64_t expanded_heads() const;  // H: the largest of the three head counts
  int64_t head_v_dim() const;      // V
};

inline constexpr double kMinLearnedRidge = 1.2e-4;
inline constexpr double kMaxLearnedRidge = 0.135;
inline constexpr double kInitialLearnedRidge = 0.01;

// What a sequence carries from one call to the next; constant in its length. A call may update the
// tensors in place: clone() to fork a sequence.
struct GkaLayerState {
  at::Tensor h;  // [N,H,K,K] float32
  at::Tensor u;  // [N,H,K,V] float32
  // [N,D,conv_size] float32: the last inputs of each convolution; conv_v is undefined without
  // use_v_conv.
  at::Tensor conv_q;
  at::Tensor conv_k;
  at::Tensor conv_v;

  bool defined() const { return h.defined(); }
  int64_t bytes() const;
  GkaLayerState clone() const;
};

class GatedKalmaNetImpl : public torch::nn::Module {
 public:
  // Throws kalmanet::Error naming the option that does not fit.
  explicit GatedKalmaNetImpl(const GatedKalmaNetOptions& options);

  // x [B,T,hidden_size] -> [B,T,hidden_size]. cu_seqlens: int64 [N+1] on the CPU, packed sequences,
  // needs B == 1. state: null: none kept; else it is read if defined, and holds the state after the
  // last token afterwards. With gradients off and at most 8 tokens a sequence the recurrent step
  // runs, otherwise the chunked operator: the same answer.
  at::Tensor forward(const at::Tensor& x, const OptionalTensor& cu_seqlens = {},
                     GkaLayerState* state = nullptr);

  // A zero state for `num_sequences` sequences, on the parameters' device.
  GkaLayerState empty_state(int64_t num_sequences) const;

  // Draws every parameter anew (linear layers uniform in +-1/sqrt(fan in); A ~ U(0,16); dt
  // log-uniform in [0.001, 0.1]), except ridge_proj: weight 0 and bias ln 0.01, so that every token
  // starts at the ridge ratio 0.01 and the other parameters are those of a fixed ridge's layer.
  void reset_parameters();

  // Names, within this module, of the parameters that take no weight decay: A_log, dt_bias,
  // o_norm.weight and every bias.
  std::vector<std::string> no_weight_decay() const;

  const GatedKalmaNetOptions& options() const { return options_; }

 private:
  // The recurrent step of x's rows [B*T,hidden_size] up to the output projection: [B,T,H,V].
  at::Tensor fused_step(const at::Tensor& rows, int64_t B, int64_t T, GkaLayerState& state,
                        const GkaOpOptions& op) const;
  GkaOpOptions op_options() const;

  GatedKalmaNetOptions options_;
  torch::nn::Linear q_proj_{nullptr}, k_proj_{nullptr}, v_proj_{nullptr}, g_proj_{nullptr},
      o_proj_{nullptr};
  torch::nn::Linear a_proj_{nullptr}, b_proj_{nullptr}, alpha_proj_{nullptr};
  at::Tensor ridge_weight_, ridge_bias_;  // ridge_proj's; undefined without learned_ridge
  at::Tensor A_log_, dt_bias_;
  at::Tensor q_conv_, k_conv_, v_conv_;  // the `.weight`s of q_conv1d, k_conv1d, v_conv1d
  at::Tensor o_norm_;
};
TORCH_MODULE(GatedKalmaNet);

}  // namespace kalmanet::layers
