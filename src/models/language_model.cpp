// The hybrid language model: construction, initial weights, forward pass, state.
#include "models/language_model.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>

#include "kalmanet/error.hpp"
#include "models/checkpointing.hpp"

namespace kalmanet::models {
namespace {

using at::Tensor;
using Offsets = std::optional<Tensor>;

[[noreturn]] void fail(const char* argument, const std::string& message,
                       ErrorCode code = ErrorCode::invalid_argument) {
  throw Error(code, argument, message);
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream stream;
  stream << tensor.sizes();
  return stream.str();
}

int64_t longest_sequence(const Tensor& cu_seqlens) {
  const auto offsets = cu_seqlens.accessor<int64_t, 1>();
  int64_t longest = 0;
  for (int64_t i = 1; i < offsets.size(0); ++i) {
    longest = std::max(longest, offsets[i] - offsets[i - 1]);
  }
  return longest;
}

void check_cu_seqlens(const Tensor& cu_seqlens, const Tensor& input_ids) {
  if (cu_seqlens.scalar_type() != at::kLong || !cu_seqlens.is_cpu()) {
    fail("cu_seqlens",
         std::string("is ") + at::toString(cu_seqlens.scalar_type()) + " on " +
             cu_seqlens.device().str() + "; it must be int64 on the CPU",
         ErrorCode::invalid_dtype);
  }
  if (cu_seqlens.dim() != 1 || cu_seqlens.size(0) < 2 || input_ids.size(0) != 1) {
    fail("cu_seqlens",
         "has shape " + shape_text(cu_seqlens) + " with input_ids of shape " +
             shape_text(input_ids) +
             "; packed sequences are input_ids [1,T] and cu_seqlens [N+1], N >= 1",
         ErrorCode::invalid_shape);
  }
  const auto offsets = cu_seqlens.accessor<int64_t, 1>();
  const int64_t N = offsets.size(0) - 1;
  bool ascending = true;
  for (int64_t i = 0; i < N; ++i) ascending = ascending && offsets[i] <= offsets[i + 1];
  if (offsets[0] != 0 || offsets[N] != input_ids.size(1) || !ascending) {
    fail("cu_seqlens", "must ascend from 0 to T = " + std::to_string(input_ids.size(1)) +
                           "; it goes from " + std::to_string(offsets[0]) + " to " +
                           std::to_string(offsets[N]) + (ascending ? "" : " and descends between"));
  }
}

}  // namespace

layers::GatedKalmaNetOptions gka_options(const ModelConfig& config) {
  const GkaConfig& g = config.gka;
  const GkaHeads heads = config.gka_heads();
  layers::GatedKalmaNetOptions o;
  o.hidden_size = config.hidden_size;
  o.head_dim = heads.head_dim;
  o.num_heads = heads.num_q_heads;
  o.num_k_heads = heads.num_k_heads;
  o.num_v_heads = heads.num_v_heads;
  o.expand_v = static_cast<double>(heads.value_head_dim) / static_cast<double>(heads.head_dim);
  o.use_beta_gate = g.use_beta_gate;
  o.use_alpha_connection = g.use_alpha_connection;
  o.use_v_conv = g.use_v_conv;
  o.use_forgetting_gate = g.use_forgetting_gate;
  o.use_forgetting_gate_kk = g.use_forgetting_gate_kk;
  o.gla_rescale = g.gla_rescale;
  o.use_gate = g.use_gate;
  o.bp_lambda = g.bp_lambda;
  o.ridge_ratio = g.ridge_strength;
  o.num_iter = g.num_iter;
  o.solver = g.solver_type;
  o.tolerance = g.tolerance;
  o.arithmetic = g.arithmetic;
  o.conv_size = heads.conv_size;
  o.norm_eps = g.norm_eps;
  o.qk_norm = g.qk_norm;
  o.learned_ridge = g.learned_ridge;
  o.fixed_alpha = g.fixed_alpha;
  o.chunk_size = g.chunk_size;
  return o;
}

int64_t ModelState::bytes() const {
  int64_t total = 0;
  for (const LayerState& layer : layers) {
    total += std::visit([](const auto& state) { return state.bytes(); }, layer);
  }
  return total;
}

ModelState ModelState::clone() const {
  ModelState copy;
  copy.position = position;
  for (const LayerState& layer : layers) {
    copy.layers.push_back(
        std::visit([](const auto& state) -> LayerState { return state.clone(); }, layer));
  }
  return copy;
}

MlpImpl::MlpImpl(int64_t hidden_size, int64_t intermediate_size) {
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false)));
  };
  gate_proj_ = linear("gate_proj", hidden_size, intermediate_size);
  up_proj_ = linear("up_proj", hidden_size, intermediate_size);
  down_proj_ = linear("down_proj", intermediate_size, hidden_size);
}

Tensor MlpImpl::forward(const Tensor& x) {
  return down_proj_->forward(at::silu(gate_proj_->forward(x)) * up_proj_->forward(x));
}

BlockImpl::BlockImpl(const ModelConfig& config, LayerKind kind) {
  const int64_t D = config.hidden_size;
  input_layernorm_ = register_module("input_layernorm", RmsNorm(D, config.rms_norm_eps));
  if (kind == LayerKind::gka) {
    gka_ = register_module("gka", layers::GatedKalmaNet(gka_options(config)));
  } else {
    self_attn_ = register_module("self_attn", Attention(config));
  }
  if (config.intermediate_size == 0) return;
  post_attention_layernorm_ =
      register_module("post_attention_layernorm", RmsNorm(D, config.rms_norm_eps));
  mlp_ = register_module("mlp", Mlp(D, config.intermediate_size));
}

Tensor BlockImpl::forward(const Tensor& x, const RopeTables& rope, const Offsets& cu_seqlens,
                          LayerState* state) {
  const Tensor normed = input_layernorm_->forward(x);
  const Tensor mixed =
      gka_ ? gka_->forward(normed, cu_seqlens,
                           state ? &std::get<layers::GkaLayerState>(*state) : nullptr)
           : self_attn_->forward(normed, rope, cu_seqlens,
                                 state ? &std::get<AttentionState>(*state) : nullptr);
  const Tensor y = x + mixed;
  return mlp_ ? y + mlp_->forward(post_attention_layernorm_->forward(y)) : y;
}

HybridLanguageModelImpl::HybridLanguageModelImpl(const ModelConfig& config) : config_(config) {
  validate(config_);
  // The published names begin with "model." for everything but the head.
  auto model = register_module("model", std::make_shared<torch::nn::Module>("model"));
  embed_tokens_ = model->register_module(
      "embed_tokens", torch::nn::Embedding(config_.vocab_size, config_.hidden_size));
  torch::nn::ModuleList list;
  for (const LayerKind kind : config_.layers) {
    blocks_.emplace_back(config_, kind);
    list->push_back(blocks_.back());
  }
  model->register_module("layers", list);
  norm_ = model->register_module("norm", RmsNorm(config_.hidden_size, config_.rms_norm_eps));
  if (!config_.tie_word_embeddings) {
    lm_head_ = register_module(
        "lm_head",
        torch::nn::Linear(
            torch::nn::LinearOptions(config_.hidden_size, config_.vocab_size).bias(false)));
  }
  initialise_weights();
}

void HybridLanguageModelImpl::initialise_weights() {
  const at::NoGradGuard no_grad;
  const double std = config_.initializer_range;
  const double residual_std = std / std::sqrt(2.0 * static_cast<double>(config_.num_hidden_layers));
  for (const auto& item : named_parameters()) {
    const std::string& name = item.key();
    Tensor parameter = item.value();
    if (name.find("ridge_proj.") != std::string::npos) continue;  // a constant, by its layer
    if (name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight")) {
      parameter.normal_(0, residual_std);
    } else if (name.ends_with("_proj.weight") || name == "lm_head.weight" ||
               name == "model.embed_tokens.weight") {
      parameter.normal_(0, std);
    } else if (name.ends_with("_proj.bias")) {
      parameter.zero_();
    }
  }
}

void HybridLanguageModelImpl::check_input(const Tensor& input_ids, const Offsets& cu_seqlens,
                                          const ModelState* state) const {
  if (input_ids.scalar_type() != at::kLong) {
    fail("input_ids",
         std::string("have dtype ") + at::toString(input_ids.scalar_type()) +
             "; token ids must be int64",
         ErrorCode::invalid_dtype);
  }
  if (input_ids.dim() != 2 || input_ids.numel() == 0) {
    fail("input_ids",
         "have shape " + shape_text(input_ids) + "; it must be [B,T] with at least one token",
         ErrorCode::invalid_shape);
  }
  const auto [low, high] = at::aminmax(input_ids);
  if (low.item<int64_t>() < 0 || high.item<int64_t>() >= config_.vocab_size) {
    fail("input_ids", "go from " + std::to_string(low.item<int64_t>()) + " to " +
                          std::to_string(high.item<int64_t>()) + "; token ids must be from 0 to " +
                          "vocab_size-1 = " + std::to_string(config_.vocab_size - 1));
  }
  if (cu_seqlens) check_cu_seqlens(*cu_seqlens, input_ids);
  const bool has_attention = config_.has_attention();
  if (cu_seqlens && state != nullptr && has_attention) {
    fail("state",
         "cannot be kept for packed sequences in a pattern with `*` layers; run the "
         "sequences one by one, or without a state",
         ErrorCode::unsupported);
  }
  const int64_t tokens = cu_seqlens ? longest_sequence(*cu_seqlens) : input_ids.size(1);
  const int64_t position = state != nullptr ? state->position : 0;
  if (has_attention && position + tokens > config_.max_position_embeddings) {
    fail("max_position_embeddings",
         "the sequence would reach " + std::to_string(position + tokens) +
             " tokens, but the `*` layers of this model end at max_position_embeddings = " +
             std::to_string(config_.max_position_embeddings) +
             "; use fewer tokens, or a pattern of GKA layers only, which has no limit");
  }
  if (state == nullptr || (state->layers.empty() && state->position == 0)) return;
  bool fits = state->layers.size() == config_.layers.size();
  for (size_t i = 0; fits && i < config_.layers.size(); ++i) {
    fits = std::holds_alternative<AttentionState>(state->layers[i]) ==
           (config_.layers[i] == LayerKind::attention);
  }
  if (!fits) {
    fail("state", "was made by a model with other layers than " + to_pattern(config_.layers) +
                      "; begin with an empty one");
  }
}

RopeTables HybridLanguageModelImpl::rope_for(int64_t begin, int64_t num_tokens,
                                             const Offsets& cu_seqlens) {
  if (!config_.has_attention()) return {};
  const int64_t end = begin + (cu_seqlens ? longest_sequence(*cu_seqlens) : num_tokens);
  const at::Device here = device();
  const bool grow = !rope_.cos.defined() || rope_.cos.size(0) < end || rope_.cos.device() != here;
  if (grow) {
    // Tables made in inference mode could not serve training later.
    const c10::InferenceMode normal_mode(false);
    const at::NoGradGuard no_grad;
    const int64_t rows = std::min(std::max<int64_t>(2 * end, 256), config_.max_position_embeddings);
    rope_ = make_rope_tables(rows, config_.head_dim, config_.rope_theta, here);
  }
  if (!cu_seqlens) {
    return {rope_.cos.narrow(0, begin, num_tokens), rope_.sin.narrow(0, begin, num_tokens)};
  }
  const auto offsets = cu_seqlens->accessor<int64_t, 1>();
  Tensor positions = at::empty({num_tokens}, at::kLong);
  int64_t* out = positions.data_ptr<int64_t>();
  for (int64_t i = 1; i < offsets.size(0); ++i) {
    for (int64_t t = offsets[i - 1]; t < offsets[i]; ++t) out[t] = t - offsets[i - 1];
  }
  positions = positions.to(here);
  return {rope_.cos.index_select(0, positions), rope_.sin.index_select(0, positions)};
}

Tensor HybridLanguageModelImpl::hidden_states(const Tensor& input_ids, const Offsets& cu_seqlens,
                                              ModelState* state) {
  check_input(input_ids, cu_seqlens, state);
  if (state != nullptr && state->layers.empty()) {
    for (const LayerKind kind : config_.layers) {
      if (kind == LayerKind::gka) {
        state->layers.emplace_back(layers::GkaLayerState());
      } else {
        state->layers.emplace_back(AttentionState());
      }
    }
  }
  const RopeTables rope =
      rope_for(state != nullptr ? state->position : 0, input_ids.size(1), cu_seqlens);
  const bool recompute = gradient_checkpointing_ && state == nullptr && at::GradMode::is_enabled();

  Tensor x = embed_tokens_->forward(input_ids);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (recompute) {
      const auto run = [block = blocks_[i], rope, cu_seqlens](const Tensor& in) mutable {
        return block->forward(in, rope, cu_seqlens, nullptr);
      };
      x = checkpoint(run, x, blocks_[i]->parameters());
    } else {
      x = blocks_[i]->forward(x, rope, cu_seqlens, state ? &state->layers[i] : nullptr);
    }
  }
  if (state != nullptr) {
    state->position += cu_seqlens ? longest_sequence(*cu_seqlens) : input_ids.size(1);
  }
  return norm_->forward(x);
}

Tensor HybridLanguageModelImpl::logits(const Tensor& hidden) {
  return at::linear(hidden, lm_head_ ? lm_head_->weight : embed_tokens_->weight);
}

Tensor HybridLanguageModelImpl::forward(const Tensor& input_ids, const Offsets& cu_seqlens,
                                        ModelState* state) {
  return logits(hidden_states(input_ids, cu_seqlens, state));
}

int64_t HybridLanguageModelImpl::num_parameters() const {
  int64_t n = 0;
  for (const Tensor& parameter : parameters()) n += parameter.numel();
  return n;
}

at::Device HybridLanguageModelImpl::device() const {
  return embed_tokens_->weight.device();
}

}  // namespace kalmanet::models
