// Qwen3's softmax attention: grouped heads, RMS norm on each head of q and k, rotary positions on
// halves, and a key-value cache.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>

#include "models/config.hpp"
#include "models/rms_norm.hpp"

namespace kalmanet::models {

// cos and sin of position * theta^(-2i/D), i < D/2: [positions, D/2], float32.
struct RopeTables {
  at::Tensor cos, sin;
};
RopeTables make_rope_tables(int64_t positions, int64_t head_dim, double theta,
                            const at::Device& device);
// x [B,T,H,D], tables of these T positions: (x1 cos - x2 sin, x2 cos + x1 sin) with x1, x2 the
// halves of the last dimension. The result is float32 or better.
at::Tensor rotate(const at::Tensor& x, const RopeTables& rope);

// Keys (rotated) and values of the tokens so far: [B, kv heads, capacity, head_dim], of which the
// first `length` positions are filled. The capacity doubles when it is reached, up to
// max_position_embeddings.
struct AttentionState {
  at::Tensor k, v;
  int64_t length = 0;
  int64_t bytes() const;  // of the capacity
  AttentionState clone() const;
};

class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(const ModelConfig& config);
  // x [B,T,D] -> [B,T,D]:  o_proj(softmax(q k^T / sqrt(head_dim)) v), causal.
  // `rope`: the tables of x's T positions. cu_seqlens as in HybridLanguageModel: each packed
  // sequence is attended to alone; not together with a state. With gradients on, a state's tensors
  // stay part of the graph.
  // At most max_position_embeddings tokens in all: the model checks that before any layer runs.
  at::Tensor forward(const at::Tensor& x, const RopeTables& rope,
                     const std::optional<at::Tensor>& cu_seqlens, AttentionState* state);

 private:
  // q [B,H,T,D], k and v [B,Hkv,L,D]; the queries are the last T of the L positions.
  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const;
  void append(AttentionState& state, const at::Tensor& k, const at::Tensor& v) const;

  int64_t num_heads_, num_kv_heads_, head_dim_, max_positions_;
  torch::nn::Linear q_proj_{nullptr}, k_proj_{nullptr}, v_proj_{nullptr}, o_proj_{nullptr};
  RmsNorm q_norm_{nullptr}, k_norm_{nullptr};
};
TORCH_MODULE(Attention);

}  // namespace kalmanet::models
