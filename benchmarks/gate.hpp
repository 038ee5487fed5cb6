// The gates: before anything is timed, the results of the very problem are compared with the
// float64 reference of the same solver. What differs is not timed.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "array.hpp"
#include "timing.hpp"

namespace kalmanet::bench {

// Relative differences in norm that a float32 kernel may have; the bounds of the tests.
inline constexpr double kOutputBound = 1e-5;
inline constexpr double kGradientBound = 1e-4;

// Worst of several comparisons, against their bounds.
class Gate {
 public:
  Gate(std::string what, const Settings& settings) : what_(std::move(what)), settings_(settings) {}
  // Compares `got` with `want`.
  void compare(const char* name, std::span<const float> got, std::span<const float> want,
               double bound);
  // Compares the elements of `got` from `first` on with all of `want`.
  void compare(const char* name, const Array& got, int64_t first, const Array& want, double bound);
  // A failure that was found in another way.
  void fail(const std::string& what) { failures_ += "\n    " + what; }
  // Prints the outcome, counts a failure, and says whether the case may be timed.
  bool passed() const;

 private:
  template <class Got, class Want>
  void compare_numbers(const char* name, Got&& got, Want&& want, int64_t size, double bound);

  std::string what_;
  Settings settings_;
  std::string failures_;
  double worst_ = 0;
};
int failed_gates();

}  // namespace kalmanet::bench
