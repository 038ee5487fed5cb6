// The gates: before anything is timed, the results of the very problem are compared with the
// float64 reference of the same solver and number of steps. What differs is not timed.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "problem.hpp"
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
  // A failure that was found in another way.
  void fail(const std::string& what) { failures_ += "\n    " + what; }
  // Prints the outcome, counts a failure, and says whether the case may be timed.
  bool passed() const;

 private:
  std::string what_;
  Settings settings_;
  std::string failures_;
  double worst_ = 0;
};
int failed_gates();

// Runs the problem on the CPU backend, and the reference on the first tokens, on the last tokens
// from the reference's own state before them, and on the states from the first token to the last.
bool check_forward(Problem& problem, const Settings& settings);
// The same for the outputs and gradients: the reference's gradients of the last tokens.
bool check_forward_backward(Problem& problem, const Settings& settings);

}  // namespace kalmanet::bench
