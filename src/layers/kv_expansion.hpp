// Keys and values of fewer heads than the layer has, expanded to all of them by a low-rank map.
#pragma once

#include <torch/torch.h>

namespace kalmanet::layers {

struct GatedKalmaNetOptions;

// t [..., in] -> linearB(silu(linearA(t))) [..., out], rank r between, no biases.
class LowRankImpl : public torch::nn::Module {
 public:
  LowRankImpl(int64_t in, int64_t rank, int64_t out);
  at::Tensor forward(const at::Tensor& t);
  void reset_parameters();  // linearA as any linear layer, linearB zero

 private:
  torch::nn::Linear a_{nullptr}, b_{nullptr};
};
TORCH_MODULE(LowRank);

// The published `kv_proj_rank` and `kv_learnable_residual`: with h heads of t and H of the layer,
//
//   expanded = residual(t) + proj(t)     residual: each head repeated H / h times, or rep [H,h] t
//
// Its parameters are those of the layer it is made for: proj_k, proj_v, and k_rep, v_rep.
class KvExpansion {
 public:
  // Throws kalmanet::Error where the two settings do not fit each other.
  static void validate(const GatedKalmaNetOptions& options);
  KvExpansion(torch::nn::Module& layer, const GatedKalmaNetOptions& options);
  // It starts as the plain repeat.
  void reset_parameters();
  // [B,T,h,d] -> [B,T,H,d].
  at::Tensor keys(const at::Tensor& k) { return expand(k, proj_k_, k_rep_); }
  at::Tensor values(const at::Tensor& v) { return expand(v, proj_v_, v_rep_); }

 private:
  at::Tensor expand(const at::Tensor& t, LowRank& proj, const at::Tensor& rep) const;

  int64_t heads_;
  LowRank proj_k_{nullptr}, proj_v_{nullptr};
  at::Tensor k_rep_, v_rep_;  // undefined without kv_learnable_residual
};

}  // namespace kalmanet::layers
