// The low-rank expansion of keys and values, in plain LibTorch: its products are small beside those
// of the projections.
#include "layers/kv_expansion.hpp"

#include <algorithm>
#include <string>

#include "kalmanet/error.hpp"
#include "layers/gated_kalmanet.hpp"

namespace kalmanet::layers {

using at::Tensor;

bool GatedKalmaNetOptions::expands() const {
  return kv_proj_rank && std::min(k_heads(), v_heads()) < expanded_heads();
}

LowRankImpl::LowRankImpl(int64_t in, int64_t rank, int64_t out) {
  const auto linear = [this](const char* name, int64_t from, int64_t to) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(from, to).bias(false)));
  };
  a_ = linear("linearA", in, rank);
  b_ = linear("linearB", rank, out);
}

Tensor LowRankImpl::forward(const Tensor& t) {
  return b_->forward(at::silu(a_->forward(t)));
}

void LowRankImpl::reset_parameters() {
  a_->reset_parameters();
  b_->weight.zero_();
}

void KvExpansion::validate(const GatedKalmaNetOptions& o) {
  constexpr int64_t kMany = int64_t{1} << 24;
  if (o.kv_proj_rank && (*o.kv_proj_rank < 1 || *o.kv_proj_rank > kMany)) {
    throw Error(
        ErrorCode::invalid_argument, "kv_proj_rank",
        "is " + std::to_string(*o.kv_proj_rank) + "; allowed are 1 to " + std::to_string(kMany));
  }
  if (!o.kv_proj_rank && o.kv_learnable_residual) {
    throw Error(ErrorCode::invalid_argument, "kv_learnable_residual",
                "needs a kv_proj_rank, which is absent");
  }
}

KvExpansion::KvExpansion(torch::nn::Module& layer, const GatedKalmaNetOptions& o)
    : heads_(o.expanded_heads()) {
  const int64_t K = o.head_dim, V = o.head_v_dim(), r = *o.kv_proj_rank;
  proj_k_ = layer.register_module("proj_k", LowRank(o.k_heads() * K, r, heads_ * K));
  proj_v_ = layer.register_module("proj_v", LowRank(o.v_heads() * V, r, heads_ * V));
  if (o.kv_learnable_residual) {
    k_rep_ = layer.register_parameter("k_rep", at::empty({heads_, o.k_heads()}));
    v_rep_ = layer.register_parameter("v_rep", at::empty({heads_, o.v_heads()}));
  }
}

void KvExpansion::reset_parameters() {
  const at::NoGradGuard no_grad;
  proj_k_->reset_parameters();
  proj_v_->reset_parameters();
  for (Tensor* rep : {&k_rep_, &v_rep_}) {
    if (!rep->defined()) continue;
    const int64_t count = rep->size(1);
    rep->copy_(
        at::eye(count, rep->options().requires_grad(false)).repeat_interleave(heads_ / count, 0));
  }
}

Tensor KvExpansion::expand(const Tensor& t, LowRank& proj, const Tensor& rep) const {
  const int64_t B = t.size(0), T = t.size(1), count = t.size(2), size = t.size(3);
  const Tensor residual = rep.defined() ? at::matmul(rep.to(t.scalar_type()), t)
                                        : t.repeat_interleave(heads_ / count, 2);
  // The weights may be of 16 bits, beside activations that were widened behind the projections.
  const Tensor flat = t.reshape({B, T, count * size});
  const Tensor added = proj->forward(flat.to(proj->parameters()[0].scalar_type()));
  return residual + added.to(t.scalar_type()).view({B, T, heads_, size});
}

}  // namespace kalmanet::layers
