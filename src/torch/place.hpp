// Where an operator runs: on the device of its tensors, which must be one, in the order of
// PyTorch's current stream there.
#pragma once

#include <initializer_list>
#include <string>

#include "torch/views.hpp"

namespace kalmanet::torch_ops {

// A tensor of a call by its argument's name; none if it is absent.
struct Named {
  const char* name;
  const Tensor* tensor;
  Named(const char* n, const Tensor& t) : name(n), tensor(&t) {}
  Named(const char* n, const OptionalTensor& t) : name(n), tensor(t ? &*t : nullptr) {}
};

// For as long as one lives, the tensors' GPU is PyTorch's current device (nothing on the CPU).
class Place {
 public:
  // Error naming the first of `others` that is not on `first`'s device.
  Place(Named first, std::initializer_list<Named> others);
  ~Place();
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  bool on_gpu() const noexcept { return on_gpu_; }
  void* stream() const noexcept { return stream_; }  // a cudaStream_t
  // The backend of that name, "auto" being the device's own. Error where it does not fit the
  // device.
  Backend backend(const std::string& name) const;
  Placement placement() const;  // of the layer's operations

 private:
  bool on_gpu_ = false;
  void* stream_ = nullptr;
  DeviceGuardHandle guard_ = nullptr;
  std::string where_;  // "q is on cuda:0"
};

}  // namespace kalmanet::torch_ops
