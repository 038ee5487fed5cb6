// Normalisation of each head's query or key to unit length.
#pragma once

#include <torch/torch.h>

namespace kalmanet::layers {

// t / (|t| + eps) over the last dimension, |t| the Euclidean norm; differentiable (the gradient of
// |t| at t = 0 is taken as 0). float32 on the CPU with a dense last dimension takes one pass each
// way; all else is LibTorch's operators.
at::Tensor unit_heads(const at::Tensor& t, double eps = 1e-6);

}  // namespace kalmanet::layers
