// Qwen3's softmax attention: grouped heads, RMS norm on each head of q and k, rotary positions on
// halves, and a key-value cache.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>

#include "models/config.hpp"

namespace kalmanet::models {

// cos and sin of position * theta^(-2i/D), i < D/2: [positions, D/2], float32.
struct RopeTables {
  at::Tensor cos, sin;
};
RopeTables make_rope_tables(int64_t positions, int64_t head_dim, double theta,
                            const at::Device& device);

// Keys (already rotated) and values of the tokens so far: [B, kv heads, capacity, head_dim], of
// which the first `length` positions are filled. The capacity doubles as needed, up to
// max_position_embeddings.
struct AttentionState {
  at::Tensor k, v;
  int64_t length = 0;
  int64_t bytes() const;
};

class RmsNormImpl;

class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(const ModelConfig& config);
  // x [B,T,D] -> [B,T,D]. `rope`: the tables of all positions needed (from 0). cu_seqlens as in
  // HybridLanguageModel; not together with a state.
  at::Tensor forward(const at::Tensor& x, const RopeTables& rope,
                     const std::optional<at::Tensor>& cu_seqlens, AttentionState* state);

  torch::nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  std::shared_ptr<RmsNormImpl> q_norm, k_norm;

 private:
  int64_t num_heads_, num_kv_heads_, head_dim_, max_positions_;
};
TORCH_MODULE(Attention);

}  // namespace kalmanet::models
