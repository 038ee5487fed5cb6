// The device that a model runs on, by the name that people give it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace kalmanet::models {

// "cpu", "cuda" (the first GPU) or "cuda:N". Throws Error(unsupported), argument "device", saying
// what is missing: CUDA in PyTorch, a GPU and its driver, or kalmanet's own CUDA kernels; and
// Error(invalid_argument) for any other text.
at::Device device_named(const std::string& text);

// What the operators' library can compute with, a line each: "cuda: not available; no NVIDIA GPU,
// ...".
std::vector<std::string> backend_lines();

}  // namespace kalmanet::models
