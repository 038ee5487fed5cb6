// bfloat16 matrix products for as long as one of these lives (PyTorch's autocast).
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

namespace kalmanet::train {

// The GKA operator has float32's accuracy under it: its inputs are cast by the layer itself.
class Autocast {
 public:
  Autocast(bool on, const at::Device& device) : on_(on), device_(device.type()) {
    if (!on_) return;
    was_enabled_ = at::autocast::is_autocast_enabled(device_);
    dtype_before_ = at::autocast::get_autocast_dtype(device_);
    at::autocast::increment_nesting();
    at::autocast::set_autocast_dtype(device_, at::kBFloat16);
    at::autocast::set_autocast_enabled(device_, true);
  }
  ~Autocast() {
    if (!on_) return;
    // The cache holds bfloat16 copies of the weights, stale after the next step.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device_, was_enabled_);
    at::autocast::set_autocast_dtype(device_, dtype_before_);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool on_, was_enabled_ = false;
  at::DeviceType device_;
  at::ScalarType dtype_before_ = at::kBFloat16;
};

}  // namespace kalmanet::train
