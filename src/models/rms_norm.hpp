// RMS norm without a gate: weight * x / sqrt(mean(x^2) + eps), over the last dimension.
#pragma once

#include <torch/torch.h>

#include "layers/ops.hpp"

namespace kalmanet::models {

class RmsNormImpl : public torch::nn::Module {
 public:
  RmsNormImpl(int64_t size, double eps) : eps_(eps) {
    weight = register_parameter("weight", at::ones({size}));
  }
  // x [..., size], any floating dtype; computed in float32, the result in x's dtype.
  at::Tensor forward(const at::Tensor& x) {
    return layers::gated_rms_norm(x, std::nullopt, weight, eps_);
  }
  at::Tensor weight;

 private:
  double eps_;
};
TORCH_MODULE(RmsNorm);

}  // namespace kalmanet::models
