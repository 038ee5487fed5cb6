// AdamW with decay groups (see optimizer.hpp).
#include "train/optimizer.hpp"

#include <ATen/ops/_fused_adamw.h>

#include <stdexcept>

namespace kalmanet::train {

bool decays(const std::string& name, const at::Tensor& parameter) {
  return parameter.dim() >= 2 && name.find("embed") == std::string::npos;
}

AdamW::AdamW(const NamedTensors& parameters, const AdamWOptions& options) : options_(options) {
  groups_.resize(2);
  groups_[0].weight_decay = options.weight_decay;
  groups_[1].weight_decay = 0;
  for (const auto& [name, parameter] : parameters) {
    if (!parameter.requires_grad()) continue;
    if (parameter.scalar_type() != at::kFloat) {
      throw std::runtime_error("parameter " + name + " is " +
                               c10::toString(parameter.scalar_type()) +
                               "; training keeps its weights in float32");
    }
    Group& group = groups_[decays(name, parameter) ? 0 : 1];
    group.names.push_back(name);
    group.parameters.push_back(parameter);
    group.exp_avg.push_back(at::zeros_like(parameter));
    group.exp_avg_sq.push_back(at::zeros_like(parameter));
  }
}

void AdamW::zero_grad() {
  for (Group& group : groups_) {
    for (at::Tensor& p : group.parameters) {
      if (p.grad().defined()) p.mutable_grad().zero_();
    }
  }
}

double AdamW::clip(double max_norm) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> grads, norms;
  for (const Group& group : groups_) {
    for (const at::Tensor& p : group.parameters) {
      if (!p.grad().defined()) continue;
      grads.push_back(p.grad());
      norms.push_back(at::linalg_vector_norm(grads.back()));
    }
  }
  if (grads.empty()) return 0;
  // All of them at once: to ask a GPU for one number is to wait for all that it was told before.
  const at::Tensor all = at::stack(norms).to(at::kCPU, at::kDouble);
  double sum = 0;
  for (int64_t i = 0; i < all.numel(); ++i) {
    const double norm = all.data_ptr<double>()[i];
    sum += norm * norm;
  }
  const double norm = std::sqrt(sum);
  if (max_norm > 0 && norm > max_norm) {
    for (at::Tensor& grad : grads) grad.mul_(max_norm / norm);
  }
  return norm;
}

void AdamW::step(double lr) {
  const at::NoGradGuard no_grad;
  ++steps_;
  for (Group& group : groups_) {
    std::vector<at::Tensor> parameters, grads, exp_avg, exp_avg_sq, steps;
    at::Tensor step;  // where the parameters are
    for (size_t i = 0; i < group.parameters.size(); ++i) {
      const at::Tensor& p = group.parameters[i];
      if (!p.grad().defined()) continue;
      if (!step.defined()) {
        step = at::full({}, static_cast<double>(steps_), p.options().dtype(at::kFloat));
      }
      parameters.push_back(p);
      grads.push_back(p.grad());
      exp_avg.push_back(group.exp_avg[i]);
      exp_avg_sq.push_back(group.exp_avg_sq[i]);
      steps.push_back(step);
    }
    if (parameters.empty()) continue;
    at::_fused_adamw_(parameters, grads, exp_avg, exp_avg_sq, {}, steps, lr, options_.beta1,
                      options_.beta2, group.weight_decay, options_.eps, /*amsgrad=*/false,
                      /*maximize=*/false);
  }
}

AdamW::NamedTensors AdamW::state() const {
  NamedTensors tensors;
  for (const Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      tensors.emplace_back("exp_avg." + group.names[i], group.exp_avg[i]);
      tensors.emplace_back("exp_avg_sq." + group.names[i], group.exp_avg_sq[i]);
    }
  }
  return tensors;
}

}  // namespace kalmanet::train
