// The variants of the kernels that go token by token: one list of them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace kalmanet::cuda {

// At KP = 128 in float32 two blocks a multiprocessor: while one solves, the other's states travel.
template <class S, int KP>
inline constexpr int kBlocksAMultiprocessor = sizeof(S) == 4 && KP <= 128 ? 256 / KP : 1;

// f(S(), std::integral_constant of KP): for a job of K.
template <class F>
void with_variant(bool float64, int64_t K, F&& f) {
  const auto with_width = [&](auto s) {
    if (K <= 64) return f(s, std::integral_constant<int, 64>());
    if (K <= 128) return f(s, std::integral_constant<int, 128>());
    return f(s, std::integral_constant<int, 256>());
  };
  if (float64) return with_width(double());
  return with_width(float());
}

}  // namespace kalmanet::cuda
