// What the emulations of the layer's CUDA kernels share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/arrays.hpp"
#include "cuda/conv_body.hpp"
#include "cuda/norm_vectors.hpp"
#include "cuda/plan.hpp"

namespace kalmanet::testing {

// Relative error of every output: 17 unit roundoffs of the arithmetic, as in tests/cpu.
template <class T>
constexpr double kBound = std::is_same_v<T, double> ? 2e-6 * 0x1p-29 : 1e-6;
template <class T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The sums of kPartsAThread parts at a time, as src/cuda/layer.cpp launches them.
inline void emulate_sums(View result, int64_t columns, std::vector<double> parts, int64_t count,
                         int64_t width) {
  while (count > cuda::kPartsAThread) {
    const int64_t groups = (count + cuda::kPartsAThread - 1) / cuda::kPartsAThread;
    std::vector<double> sums(static_cast<size_t>(groups * width));
    const cuda::SumJob job{parts.data(), sums.data(), count, width, {}, columns};
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t e = 0; e < width; ++e) cuda::run_sum(job, g, e);
    }
    parts = std::move(sums);
    count = groups;
  }
  cuda::SumJob job{parts.data(), nullptr, count, width, {}, columns};
  job.result = cuda::array_of(result);
  if (result.rank == 1) job.result.stride[1] = result.stride[0], job.columns = width;
  for (int64_t e = 0; e < width; ++e) cuda::run_sum(job, 0, e);
}

// Every thread of the grid, in its order or the opposite one.
template <class F>
void for_threads(int64_t count, bool backwards, const F& f) {
  for (int64_t i = 0; i < count; ++i) f(backwards ? count - 1 - i : i);
}

template <class T>
bool is_aligned(int64_t width, Layout layout) {
  return !std::is_same_v<T, double> && layout == Layout::dense &&
         width % static_cast<int64_t>(16 / sizeof(T)) == 0;
}

// The blocks of norm_vectors.hpp.
template <DType kType, int kLoads>
void emulate_norm_vectors(const cuda::NormJob& job, bool backward, bool backwards) {
  using Registers = cuda::NormVectorRegisters<kType, kLoads>;
  cuda::HostGroup<Registers> group(cuda::kNormThreads, backwards);
  cuda::NormVectors<kType, kLoads, decltype(group)> rows{group, job};
  const bool unit = job.unit != cuda::UnitNorm::none;
  const int64_t at_once = backward && !unit ? cuda::kNormVectorRows : rows.rows_at_once();
  for_threads((job.R + at_once - 1) / at_once, backwards, [&](int64_t block) {
    if (unit) return backward ? rows.template unit<true>(block) : rows.template unit<false>(block);
    if (!backward) return rows.forward(block);
    cuda::NormVectorShared shared;
    std::fill(std::begin(shared.part), std::end(shared.part), NAN);
    rows.backward(shared, block);
  });
}
template <class T>
void emulate_norm_vectors(const cuda::NormJob& job, bool backward, bool backwards) {
  if constexpr (!std::is_same_v<T, double>) {
    if (std::is_same_v<T, float> && job.loads == 2) {
      return emulate_norm_vectors<DType::float32, 2>(job, backward, backwards);
    }
    emulate_norm_vectors<DTypeOf<T>::value, 1>(job, backward, backwards);
  }
}

}  // namespace kalmanet::testing
