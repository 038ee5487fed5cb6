// AdamW over a module's named parameters, with and without weight decay.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace kalmanet::train {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;
};

// Whether weight decay applies. It does to matrices and convolution kernels; it does not to
// vectors (norms, biases, A_log, dt_bias), whose size is a scale or a time constant and not a
// matter of overfitting, nor to the embedding, whose rows are each used seldom and would shrink
// in between.
bool decays(const std::string& name, const at::Tensor& parameter);

// LibTorch's fused AdamW kernel: one pass over each parameter and its two moments.
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr wd) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
class AdamW {
 public:
  using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

  // `parameters` are float32 leaves, in an order that is the same in every run.
  AdamW(const NamedTensors& parameters, const AdamWOptions& options);

  // Gradients to zero where they exist (their memory is kept).
  void zero_grad();
  // Scales all gradients so that their joint 2-norm is at most `max_norm` (<= 0: never scales).
  // Returns the norm before.
  double clip(double max_norm);
  // A parameter without a gradient stays as it is.
  void step(double lr);

  int64_t steps_taken() const { return steps_; }
  // The moments under "exp_avg.<name>" and "exp_avg_sq.<name>", for checkpoints: the very tensors.
  NamedTensors state() const;
  void set_steps_taken(int64_t steps) { steps_ = steps; }

 private:
  struct Group {
    double weight_decay;
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters, exp_avg, exp_avg_sq;
  };
  AdamWOptions options_;
  std::vector<Group> groups_;
  int64_t steps_ = 0;
};

}  // namespace kalmanet::train
