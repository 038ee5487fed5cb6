// The GPU's memory that a call holds beside its tensors.
#pragma once

#include "cuda/launch.hpp"

namespace kalmanet::cuda {

// Stream-ordered memory that is given back, also where a launch throws.
class Workspace {
 public:
  Workspace(int64_t bytes, Stream stream) : data_(allocate(bytes, stream)), stream_(stream) {}
  ~Workspace() { release(data_, stream_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const noexcept { return data_; }

 private:
  void* data_;
  Stream stream_;
};

}  // namespace kalmanet::cuda
