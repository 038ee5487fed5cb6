// Softmax attention through LibTorch's scaled_dot_product_attention, and its key-value cache.
#include "models/attention.hpp"

#include <algorithm>
#include <string>

#include "kalmanet/error.hpp"

namespace kalmanet::models {
namespace {

using at::Tensor;

constexpr int64_t kFirstCapacity = 64;  // positions; small enough to waste nothing, then doubled

}  // namespace

RopeTables make_rope_tables(int64_t positions, int64_t head_dim, double theta,
                            const at::Device& device) {
  // Angles in float64: float32 products lose whole digits at large positions.
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
  const Tensor exponent = at::arange(0, head_dim, 2, options) / static_cast<double>(head_dim);
  const Tensor angles = at::outer(at::arange(positions, options), at::pow(theta, -exponent));
  return {angles.cos().to(at::kFloat), angles.sin().to(at::kFloat)};
}

Tensor rotate(const Tensor& x, const RopeTables& rope) {
  const int64_t half = x.size(-1) / 2;
  const Tensor cos = rope.cos.unsqueeze(1), sin = rope.sin.unsqueeze(1);  // [T,1,D/2]
  const Tensor x1 = x.narrow(-1, 0, half), x2 = x.narrow(-1, half, half);
  return at::cat({x1 * cos - x2 * sin, x2 * cos + x1 * sin}, -1);
}

int64_t AttentionState::bytes() const {
  return k.defined() ? 2 * k.numel() * static_cast<int64_t>(k.element_size()) : 0;
}

AttentionState AttentionState::clone() const {
  const auto copy = [](const Tensor& t) { return t.defined() ? t.clone() : t; };
  return {copy(k), copy(v), length};
}

AttentionImpl::AttentionImpl(const ModelConfig& config)
    : num_heads_(config.num_attention_heads),
      num_kv_heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      max_positions_(config.max_position_embeddings) {
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(
        name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(config.attention_bias)));
  };
  q_proj_ = linear("q_proj", config.hidden_size, num_heads_ * head_dim_);
  k_proj_ = linear("k_proj", config.hidden_size, num_kv_heads_ * head_dim_);
  v_proj_ = linear("v_proj", config.hidden_size, num_kv_heads_ * head_dim_);
  o_proj_ = linear("o_proj", num_heads_ * head_dim_, config.hidden_size);
  q_norm_ = register_module("q_norm", RmsNorm(head_dim_, config.rms_norm_eps));
  k_norm_ = register_module("k_norm", RmsNorm(head_dim_, config.rms_norm_eps));
}

Tensor AttentionImpl::forward(const Tensor& x, const RopeTables& rope,
                              const std::optional<Tensor>& cu_seqlens, AttentionState* state) {
  const int64_t B = x.size(0), T = x.size(1);
  const auto heads = [&](const Tensor& t, int64_t count) {
    return t.view({B, T, count, head_dim_});
  };
  const Tensor v = heads(v_proj_->forward(x), num_kv_heads_).transpose(1, 2);
  const auto position = [&](const Tensor& t) {  // [B,T,H,D] -> rotated [B,H,T,D]
    return rotate(t, rope).to(v.scalar_type()).transpose(1, 2);
  };
  const Tensor q = position(q_norm_->forward(heads(q_proj_->forward(x), num_heads_)));
  const Tensor k = position(k_norm_->forward(heads(k_proj_->forward(x), num_kv_heads_)));

  Tensor out;  // [B,H,T,D]
  if (cu_seqlens) {
    const auto offsets = cu_seqlens->accessor<int64_t, 1>();
    std::vector<Tensor> parts;
    for (int64_t i = 1; i < offsets.size(0); ++i) {
      const int64_t begin = offsets[i - 1], length = offsets[i] - begin;
      if (length == 0) continue;
      parts.push_back(attend(q.narrow(2, begin, length), k.narrow(2, begin, length),
                             v.narrow(2, begin, length)));
    }
    out = at::cat(parts, 2);
  } else if (state != nullptr) {
    append(*state, k, v);
    out = attend(q, state->k.narrow(2, 0, state->length), state->v.narrow(2, 0, state->length));
  } else {
    out = attend(q, k, v);
  }
  return o_proj_->forward(out.transpose(1, 2).reshape({B, T, num_heads_ * head_dim_}));
}

Tensor AttentionImpl::attend(const Tensor& q, const Tensor& k, const Tensor& v) const {
  const int64_t T = q.size(2), L = k.size(2);
  const bool grouped = num_heads_ != num_kv_heads_;
  if (T == L || T == 1) {  // from the start, or one query that sees everything
    return at::scaled_dot_product_attention(q, k, v, /*attn_mask=*/{}, /*dropout_p=*/0.0,
                                            /*is_causal=*/T == L && T > 1, /*scale=*/{}, grouped);
  }
  // Query i stands at position L - T + i.
  const Tensor mask = at::ones({T, L}, q.options().dtype(at::kBool)).tril(L - T);
  return at::scaled_dot_product_attention(q, k, v, mask, 0.0, false, {}, grouped);
}

void AttentionImpl::append(AttentionState& state, const Tensor& k, const Tensor& v) const {
  const int64_t B = k.size(0), T = k.size(2), length = state.length + T;
  if (state.k.defined() &&
      (state.k.size(0) != B || state.k.size(1) != num_kv_heads_ || state.k.size(3) != head_dim_)) {
    throw Error(ErrorCode::invalid_shape, "state",
                "holds keys for a batch of " + std::to_string(state.k.size(0)) + " with " +
                    std::to_string(state.k.size(1)) + " heads of " +
                    std::to_string(state.k.size(3)) + "; this call has " + std::to_string(B) +
                    ", " + std::to_string(num_kv_heads_) + " and " + std::to_string(head_dim_) +
                    ": begin with an empty state");
  }
  if (at::GradMode::is_enabled()) {  // no writing into what the graph has saved
    const auto join = [&](const Tensor& past, const Tensor& now) {
      return past.defined() ? at::cat({past.narrow(2, 0, state.length), now}, 2) : now;
    };
    state = {join(state.k, k), join(state.v, v), length};
    return;
  }
  const int64_t capacity = state.k.defined() ? state.k.size(2) : 0;
  if (length > capacity) {
    const int64_t wanted = std::max({length, 2 * capacity, kFirstCapacity});
    const int64_t size = std::min(wanted, max_positions_);
    const auto grow = [&](Tensor& cache, const Tensor& now) {
      const Tensor grown = at::empty({B, num_kv_heads_, size, head_dim_}, now.options());
      if (cache.defined()) grown.narrow(2, 0, state.length).copy_(cache.narrow(2, 0, state.length));
      cache = grown;
    };
    grow(state.k, k);
    grow(state.v, v);
  }
  state.k.narrow(2, state.length, T).copy_(k);
  state.v.narrow(2, state.length, T).copy_(v);
  state.length = length;
}

}  // namespace kalmanet::models
