// Memory of any dtype, as the timed sequences hold their tensors. It begins at a cache line, as
// PyTorch's tensors do (floats.hpp says why).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "core/half.hpp"
#include "floats.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet::bench {

class Array {
 public:
  Array() = default;
  Array(DType dtype, int64_t size)
      : dtype_(dtype), size_(size), bytes_(static_cast<size_t>(size * size_of(dtype))) {}

  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  double bytes() const { return static_cast<double>(bytes_.size()); }
  bool empty() const { return size_ == 0; }
  double at(int64_t i) const { return core::load_element(dtype_, bytes_.data(), i); }
  void set(int64_t i, double value) { core::store_element(dtype_, bytes_.data(), i, value); }

  View view(std::initializer_list<int64_t> sizes) { return dense(bytes_.data(), dtype_, sizes); }
  // A tensor that begins at element `first`.
  ConstView view(int64_t first, std::initializer_list<int64_t> sizes) const {
    const std::byte* data = bytes_.data() + first * size_of(dtype_);
    return dense(static_cast<const void*>(data), dtype_, sizes);
  }

 private:
  DType dtype_ = DType::float32;
  int64_t size_ = 0;
  std::vector<std::byte, CacheLineAllocator<std::byte>> bytes_;
};

}  // namespace kalmanet::bench
