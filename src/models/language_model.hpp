// The hybrid language model: embeddings, blocks of a mixer (GKA or softmax attention) and an MLP,
// final norm, head. Parameter names are the published checkpoint's (docs: INTERFACES).
//
//   x = x + mixer(input_layernorm(x))
//   x = x + down(silu(gate(y)) * up(y)),  y = post_attention_layernorm(x)
//
// Letters: B batch, T tokens, D hidden size, N packed sequences.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "layers/gated_kalmanet.hpp"
#include "models/attention.hpp"
#include "models/config.hpp"
#include "models/rms_norm.hpp"

namespace kalmanet::models {

using LayerState = std::variant<layers::GkaLayerState, AttentionState>;

// Everything that a model keeps of the tokens it has read: pass the same object again to go on.
// A default-constructed one is the start of a sequence (or of B of them).
struct ModelState {
  std::vector<LayerState> layers;
  int64_t position = 0;  // tokens read
  int64_t bytes() const;
  ModelState clone() const;  // to fork a sequence: forward() may update tensors in place
};

layers::GatedKalmaNetOptions gka_options(const ModelConfig& config);

class MlpImpl : public torch::nn::Module {
 public:
  MlpImpl(int64_t hidden_size, int64_t intermediate_size);
  at::Tensor forward(const at::Tensor& x);  // [..., D] -> [..., D]

 private:
  torch::nn::Linear gate_proj_{nullptr}, up_proj_{nullptr}, down_proj_{nullptr};
};
TORCH_MODULE(Mlp);

class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const ModelConfig& config, LayerKind kind);
  // x [B,T,D] -> [B,T,D]; `rope` (the tables of x's positions) is read by attention only; `state`:
  // null, or this layer's.
  at::Tensor forward(const at::Tensor& x, const RopeTables& rope,
                     const std::optional<at::Tensor>& cu_seqlens, LayerState* state);

 private:
  RmsNorm input_layernorm_{nullptr}, post_attention_layernorm_{nullptr};
  layers::GatedKalmaNet gka_{nullptr};  // one of the two
  Attention self_attn_{nullptr};
  Mlp mlp_{nullptr};  // none where intermediate_size is 0
};
TORCH_MODULE(Block);

class HybridLanguageModelImpl : public torch::nn::Module {
 public:
  // New weights (all drawn from torch's default generator, so torch::manual_seed decides them):
  // linear and embedding weights normal(0, initializer_range); those that write into the residual
  // stream (o_proj, down_proj) divided by sqrt(2 * num_hidden_layers), as in GPT-2; biases 0, norms
  // 1; the GKA layer's convolutions, A_log, dt_bias and ridge_proj as that layer makes them.
  // Throws Error if the config is not valid.
  explicit HybridLanguageModelImpl(const ModelConfig& config);

  // input_ids [B,T] int64, T >= 1 -> logits [B,T,vocab_size] in the parameters' dtype.
  // cu_seqlens int64 [N+1] on the CPU, B = 1: packed sequences, each as if alone.
  // state: null: none kept; else read and advanced by T (batch B throughout; with cu_seqlens only
  // for patterns without `*`, and `position` then is that of the longest sequence).
  // Throws Error: ids of another dtype, rank or out of 0..vocab_size-1; more positions than
  // max_position_embeddings in a pattern with `*`; a state of another batch or model.
  at::Tensor forward(const at::Tensor& input_ids, const std::optional<at::Tensor>& cu_seqlens = {},
                     ModelState* state = nullptr);
  // The same in two halves, for callers that need few of the logits: the normed hidden states
  // [B,T,D], and logits of any [...,D] of them.
  at::Tensor hidden_states(const at::Tensor& input_ids,
                           const std::optional<at::Tensor>& cu_seqlens = {},
                           ModelState* state = nullptr);
  at::Tensor logits(const at::Tensor& hidden);

  // Keep only each block's input for the backward pass and run the block again there. Gradients are
  // the same bit for bit; no effect without gradients or with a state.
  void set_gradient_checkpointing(bool on) { gradient_checkpointing_ = on; }
  bool gradient_checkpointing() const noexcept { return gradient_checkpointing_; }

  const ModelConfig& config() const noexcept { return config_; }
  int64_t num_parameters() const;
  // Where the parameters are.
  at::Device device() const;

 private:
  void initialise_weights();
  void check_input(const at::Tensor& input_ids, const std::optional<at::Tensor>& cu_seqlens,
                   const ModelState* state) const;
  // The tables of the positions of this call's tokens; undefined ones without `*` layers.
  RopeTables rope_for(int64_t begin, int64_t num_tokens,
                      const std::optional<at::Tensor>& cu_seqlens);

  ModelConfig config_;
  bool gradient_checkpointing_ = false;
  RopeTables rope_;  // of positions 0.., grown as needed
  torch::nn::Embedding embed_tokens_{nullptr};
  std::vector<Block> blocks_;
  RmsNorm norm_{nullptr};
  torch::nn::Linear lm_head_{nullptr};  // none where the embeddings are tied
};
TORCH_MODULE(HybridLanguageModel);

}  // namespace kalmanet::models
