// Arrays that begin at a cache line, as PyTorch's tensors do: a malloc of this size would begin 16
// bytes after one, and every vector load of OpenBLAS and of ours would touch two lines.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace kalmanet::bench {

template <class T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}  // NOLINT(google-explicit-constructor)
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const CacheLineAllocator&) const { return true; }
};

using Floats = std::vector<float, CacheLineAllocator<float>>;

}  // namespace kalmanet::bench
