// CUDA's statuses as the library's errors.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "kalmanet/error.hpp"

namespace kalmanet::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Error(ErrorCode::unsupported, "backend",
              std::string("cuda: ") + what + " failed: " + cudaGetErrorString(status));
}

}  // namespace kalmanet::cuda
