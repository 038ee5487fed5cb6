// The device that a model runs on, by the name that people give it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace kalmanet::models {

// "cpu", "cuda" (the first GPU) or "cuda:N". Throws Error(unsupported), argument "device", saying
// what is missing: CUDA in PyTorch, a GPU and its driver, or kalmanet's own CUDA kernels; and
// Error(invalid_argument) for any other text.
at::Device device_named(const std::string& text);

}  // namespace kalmanet::models
