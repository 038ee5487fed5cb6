// What the tests of the convolution, the norm and the vector functions share: strided arrays with
// poisoned gaps, every instruction set, odd executors, error measures.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kalmanet/backend.hpp"
#include "kalmanet/executor.hpp"
#include "kalmanet/tensor.hpp"
#include "support/dtypes.hpp"

namespace kalmanet::testing {

// Runs `f` once for each instruction set of this machine.
inline void for_each_instruction_set(const std::function<void()>& f) {
  for (InstructionSet isa : available_instruction_sets()) {
    SCOPED_TRACE(std::string("instruction set ") + name(isa));
    set_instruction_set(isa);
    f();
    if (::testing::Test::HasFatalFailure()) break;
  }
  reset_instruction_set();
}

// The tasks one by one, the last first.
class ReversedExecutor final : public Executor {
 public:
  int concurrency() const noexcept override { return 1; }
  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    for (int64_t i = n - 1; i >= 0; --i) task(i);
  }
};

// How an array lies in memory. `padded`: the last dimension adjacent, gaps behind each row.
// `spread`: a gap behind each element. `transposed`: the first dimension adjacent. `mirrored`: the
// last dimension backwards.
enum class Layout { dense, padded, spread, transposed, mirrored };
inline const char* name(Layout layout) {
  constexpr const char* kNames[] = {"dense", "padded", "spread", "transposed", "mirrored"};
  return kNames[static_cast<int>(layout)];
}

// An array of up to three dimensions. Every number in its memory begins as NaN: a read outside the
// elements poisons the result, an element that is not written stays a NaN.
template <class T>
class ArrayOf {
 public:
  ArrayOf() = default;
  explicit ArrayOf(std::initializer_list<int64_t> sizes, Layout layout = Layout::dense) {
    shape_.dtype = DTypeOf<T>::value;
    shape_.rank = static_cast<int>(sizes.size());
    int d = 0;
    for (int64_t s : sizes) shape_.size[d++] = s;
    int64_t step = layout == Layout::spread ? 3 : 1;
    for (int i = 0; i < shape_.rank; ++i) {
      d = layout == Layout::transposed ? i : shape_.rank - 1 - i;
      shape_.stride[d] = step;
      step *= shape_.size[d];
      if (layout != Layout::dense) step += 5;
    }
    offset_ = kGuard;
    const int last = shape_.rank - 1;
    if (layout == Layout::mirrored) {
      offset_ += (shape_.size[last] - 1) * shape_.stride[last];
      shape_.stride[last] = -shape_.stride[last];
    }
    memory_.assign(static_cast<size_t>(step + 2 * kGuard), std::numeric_limits<T>::quiet_NaN());
  }

  bool defined() const { return !memory_.empty(); }
  int64_t size(int d) const { return shape_.size[d]; }
  int64_t numel() const { return shape_.numel(); }
  T& at(int64_t i, int64_t j = 0, int64_t k = 0) { return memory_[index(i, j, k)]; }
  T at(int64_t i, int64_t j = 0, int64_t k = 0) const { return memory_[index(i, j, k)]; }

  // Absent if the array is.
  View view() {
    View v = shape_;
    if (defined()) v.data = memory_.data() + offset_;
    return v;
  }
  ConstView view() const { return const_cast<ArrayOf*>(this)->view(); }

  template <class F>
  void for_each(F f) const {
    const int64_t last = shape_.rank > 2 ? shape_.size[2] : 1;
    const int64_t middle = shape_.rank > 1 ? shape_.size[1] : 1;
    for (int64_t i = 0; i < shape_.size[0]; ++i) {
      for (int64_t j = 0; j < middle; ++j) {
        for (int64_t k = 0; k < last; ++k) f(i, j, k);
      }
    }
  }

  // Elements of a normal distribution.
  ArrayOf& fill(std::mt19937_64& random, float deviation = 1.0f) {
    std::normal_distribution<float> normal(0.0f, deviation);
    for_each(
        [&](int64_t i, int64_t j, int64_t k) { at(i, j, k) = static_cast<T>(normal(random)); });
    return *this;
  }
  // The elements in row-major order.
  std::vector<double> values() const {
    std::vector<double> v;
    v.reserve(static_cast<size_t>(numel()));
    for_each([&](int64_t i, int64_t j, int64_t k) { v.push_back(at(i, j, k)); });
    return v;
  }
  // Numbers that are no elements and no longer NaN.
  int64_t gaps_written() const {
    int64_t written = 0;
    for (const T& e : memory_) written += std::isnan(static_cast<double>(e)) ? 0 : 1;
    for_each([&](int64_t i, int64_t j, int64_t k) {
      written -= std::isnan(static_cast<double>(at(i, j, k))) ? 0 : 1;
    });
    return written;
  }

 private:
  static constexpr int64_t kGuard =
      32;  // numbers before and behind: two of the widest registers of float32

  size_t index(int64_t i, int64_t j, int64_t k) const {
    return static_cast<size_t>(offset_ + i * shape_.stride[0] + j * shape_.stride[1] +
                               k * shape_.stride[2]);
  }

  View shape_;
  int64_t offset_ = 0;
  std::vector<T> memory_;
};
using Array = ArrayOf<float>;

// |a - b| / |scale|; |a - b| where the scale is all zeros. NaN if there is one.
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b,
                             const std::vector<double>& scale) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += scale[i] * scale[i];
  }
  return size > 0 ? std::sqrt(difference / size) : std::sqrt(difference);
}

// Elements and nothing else were written, and they are within `bound` of `expected`, relative to
// the size of `scale`: the expected values themselves or, for long sums that may cancel, the root
// of the sum of their terms' squares. 16-bit elements may also have what rounding the right ones
// once costs.
template <class T>
void expect_close(const char* what, const ArrayOf<T>& got, const std::vector<double>& expected,
                  double bound, const std::string& where, const std::vector<double>& scale) {
  if (!got.defined()) return;
  ASSERT_EQ(static_cast<int64_t>(expected.size()), got.numel()) << what << " of " << where;
  if (kIsHalf<T>) {
    std::vector<double> rounded = expected;
    for (double& e : rounded) e = static_cast<double>(static_cast<T>(e));
    bound += 1.05 * relative_error(rounded, expected, scale);
  }
  const double error = relative_error(got.values(), expected, scale);
  EXPECT_TRUE(error <= bound) << what << " of " << where << ": relative error " << error
                              << ", bound " << bound;
  EXPECT_EQ(got.gaps_written(), 0) << what << " of " << where << ": wrote between its elements";
}

template <class T>
void expect_close(const char* what, const ArrayOf<T>& got, const std::vector<double>& expected,
                  double bound, const std::string& where) {
  expect_close(what, got, expected, bound, where, expected);
}

template <class T>
void expect_same_bits(const char* what, const ArrayOf<T>& got, const ArrayOf<T>& expected,
                      const std::string& where) {
  ASSERT_EQ(got.defined(), expected.defined());
  if (!got.defined()) return;
  int64_t different = 0;
  got.for_each([&](int64_t i, int64_t j, int64_t k) {
    const T a = got.at(i, j, k), b = expected.at(i, j, k);
    different += std::memcmp(&a, &b, sizeof a) != 0 ? 1 : 0;
  });
  EXPECT_EQ(different, 0) << what << " of " << where << ": " << different << " of " << got.numel()
                          << " elements differ in their bits";
}

}  // namespace kalmanet::testing
