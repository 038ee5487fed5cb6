// The GPU's memory, as gka_cuda holds it.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace kalmanet::benchmark {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Memory of the GPU, and what it was filled with.
struct Device {
  void* data = nullptr;
  explicit Device(size_t bytes) { check(cudaMalloc(&data, bytes), "cudaMalloc"); }
  template <class T>
  explicit Device(const std::vector<T>& from) : Device(from.size() * sizeof(T)) {
    check(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
};

}  // namespace kalmanet::benchmark
