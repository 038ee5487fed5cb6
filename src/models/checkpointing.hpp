// Gradient checkpointing: keep a function's input instead of everything its backward needs, and run
// the function again when the backward comes.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <vector>

namespace kalmanet::models {

using TensorFunction = std::function<at::Tensor(const at::Tensor&)>;

// f(x), where f depends on x and `parameters` only. Gradients flow to x and to each parameter that
// requires one, and equal those of a plain call bit for bit: the second run sees the same autocast
// setting and the same state of the CPU's random generator as the first. Works under backward() and
// torch::autograd::grad(). First derivatives only: create_graph is an error.
at::Tensor checkpoint(TensorFunction f, const at::Tensor& x,
                      const std::vector<at::Tensor>& parameters);

}  // namespace kalmanet::models
