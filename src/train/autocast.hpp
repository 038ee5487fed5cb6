// bfloat16 matrix products for as long as one of these lives (PyTorch's autocast on the CPU).
#pragma once

#include <ATen/autocast_mode.h>

namespace kalmanet::train {

// The GKA operator computes in float32 under it: its inputs are cast by the operator itself.
class Autocast {
 public:
  explicit Autocast(bool on) : on_(on) {
    if (!on_) return;
    was_enabled_ = at::autocast::is_autocast_enabled(at::kCPU);
    dtype_before_ = at::autocast::get_autocast_dtype(at::kCPU);
    at::autocast::increment_nesting();
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~Autocast() {
    if (!on_) return;
    // The cache holds bfloat16 copies of the weights, stale after the next step.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, was_enabled_);
    at::autocast::set_autocast_dtype(at::kCPU, dtype_before_);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool on_, was_enabled_ = false;
  at::ScalarType dtype_before_ = at::kBFloat16;
};

}  // namespace kalmanet::train
