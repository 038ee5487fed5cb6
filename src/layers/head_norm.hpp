// Normalisation of each head's query or key to unit length.
#pragma once

#include <torch/torch.h>

#include <string>

namespace kalmanet::layers {

// t / (|t| + eps) over the last dimension, |t| the Euclidean norm, or with kind "fla"
// t / sqrt(|t|^2 + eps); differentiable (the gradient of |t| at t = 0 is taken as 0). float32 on
// the CPU is one operator each way; all else is plain_unit_heads.
at::Tensor unit_heads(const at::Tensor& t, const std::string& kind = "official", double eps = 1e-6);

// The same in LibTorch's operators, whose gradient is autograd's.
at::Tensor plain_unit_heads(const at::Tensor& t, const std::string& kind, double eps);

}  // namespace kalmanet::layers
