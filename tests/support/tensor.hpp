// Test tensors that own their memory, in the plain layout or in an awkward one, with guarded gaps.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <stdexcept>
#include <vector>

#include "kalmanet/tensor.hpp"
#include "support/dtypes.hpp"

namespace kalmanet::testing {

// SplitMix64 and Box-Muller: the same numbers from the same seed with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x1234567u) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }  // (0, 1)
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  int64_t integer(int64_t low, int64_t high) {  // low..high
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool coin() { return bits() & 1; }
  double normal() {
    return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * std::numbers::pi * uniform());
  }

 private:
  uint64_t state_;
};

// Calls f(index, offset in elements) for every element of a view in row-major order of its indices.
template <class V, class F>
void for_each_element(const V& view, F&& f) {
  Extents at{};
  const int64_t count = view.numel();
  for (int64_t i = 0; i < count; ++i) {
    int64_t offset = 0;
    for (int d = 0; d < view.rank; ++d) offset += at[d] * view.stride[d];
    f(i, offset);
    for (int d = view.rank - 1; d >= 0; --d) {
      if (++at[d] < view.size[d]) break;
      at[d] = 0;
    }
  }
}

// A view's values in row-major order, as doubles.
inline std::vector<double> values(const ConstView& view) {
  std::vector<double> result(view.defined() ? static_cast<size_t>(view.numel()) : 0);
  if (result.empty()) return result;
  for_each_element(view, [&](int64_t i, int64_t offset) {
    const auto value = [&]<class T>(T) -> double {
      return static_cast<const T*>(view.data)[offset];
    };
    double& to = result[static_cast<size_t>(i)];
    switch (view.dtype) {
      case DType::float32:
        to = value(float());
        break;
      case DType::float64:
        to = value(double());
        break;
      case DType::bfloat16:
        to = value(BFloat16());
        break;
      case DType::float16:
        to = value(Float16());
        break;
    }
  });
  return result;
}

// An owning tensor of up to four dimensions. Awkward: the dimensions lie in another order in memory
// (heads before time), rows have gaps, time may run backwards. Everything, gaps included, starts as
// NaN: what is read from a gap or never written shows.
template <class T>
class Tensor {
 public:
  Tensor() = default;
  // row_gap: elements between rows of the plain layout.
  Tensor(std::vector<int64_t> sizes, bool awkward, Random& random, int64_t row_gap = 0) {
    view_.dtype = DTypeOf<T>::value;
    view_.rank = static_cast<int>(sizes.size());
    // Innermost first: the last dimension, then (awkward) the others in an order of their own.
    std::vector<int> order;
    for (int d = view_.rank - 1; d >= 0; --d) order.push_back(d);
    if (awkward) {
      for (size_t i = 1; i + 1 < order.size(); ++i) {
        std::swap(order[i], order[static_cast<size_t>(
                                random.integer(static_cast<int64_t>(i), std::ssize(order) - 1))]);
      }
    }
    int64_t stride = awkward ? random.integer(1, 2) : 1;
    for (int d : order) {
      view_.size[d] = sizes[static_cast<size_t>(d)];
      view_.stride[d] = stride;
      stride = stride * sizes[static_cast<size_t>(d)] + (awkward ? random.integer(0, 3) : 0);
      if (d == view_.rank - 1 && !awkward) stride += row_gap;
    }
    // One element at least, so that an empty tensor is not taken for an absent one.
    memory_.assign(static_cast<size_t>(stride) + 1, std::numeric_limits<T>::quiet_NaN());
    if (awkward && view_.rank == 4 && view_.size[1] > 1 && random.coin()) {
      origin_ = view_.stride[1] * (view_.size[1] - 1);
      view_.stride[1] = -view_.stride[1];
    }
  }

  bool defined() const { return !memory_.empty(); }
  // All memory, gaps included, and where in it element 0 lies: for copies elsewhere.
  std::vector<T>& memory() { return memory_; }
  const std::vector<T>& memory() const { return memory_; }
  int64_t origin() const { return origin_; }
  // Absent if it was never given a shape.
  View view() {
    View v = view_;
    if (defined()) v.data = memory_.data() + origin_;
    return v;
  }
  ConstView view() const {
    View v = view_;
    ConstView c(v);
    if (defined()) c.data = memory_.data() + origin_;
    return c;
  }
  std::vector<double> values() const { return testing::values(view()); }

  // f(row-major index) -> value
  template <class F>
  void fill(F&& f) {
    if (!defined()) return;
    for_each_element(view_, [&](int64_t i, int64_t offset) {
      memory_[static_cast<size_t>(origin_ + offset)] = static_cast<T>(f(i));
    });
  }
  void assign(std::span<const double> from) {
    if (std::ssize(from) != (defined() ? view_.numel() : 0)) {
      throw std::logic_error("test tensor: wrong number of values");
    }
    fill([&](int64_t i) { return from[static_cast<size_t>(i)]; });
  }
  void clear() {
    fill([](int64_t) { return std::numeric_limits<double>::quiet_NaN(); });
  }

  T& operator[](int64_t i) {  // by row-major index
    int64_t offset = origin_;
    for (int d = view_.rank - 1; d >= 0; --d) {
      offset += i % view_.size[d] * view_.stride[d];
      i /= view_.size[d];
    }
    return memory_[static_cast<size_t>(offset)];
  }

  // Nothing was written between the elements.
  bool gaps_intact() const {
    std::vector<bool> element(memory_.size(), false);
    if (defined()) {
      for_each_element(view_, [&](int64_t, int64_t offset) {
        element[static_cast<size_t>(origin_ + offset)] = true;
      });
    }
    for (size_t i = 0; i < memory_.size(); ++i) {
      if (!element[i] && !std::isnan(memory_[i])) return false;
    }
    return true;
  }

  // The same values and layout in another precision.
  template <class U>
  Tensor<U> as() const {
    Tensor<U> other;
    other.view_ = view_;
    other.view_.dtype = DTypeOf<U>::value;
    other.origin_ = origin_;
    for (const T& e : memory_) other.memory_.push_back(static_cast<U>(static_cast<double>(e)));
    return other;
  }

 private:
  template <class U>
  friend class Tensor;
  std::vector<T> memory_;
  View view_;  // its data is null: view() fills it in
  int64_t origin_ = 0;
};

}  // namespace kalmanet::testing
