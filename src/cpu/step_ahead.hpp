// Memory fetched while a solver works: a token's iteration reads nothing but the packed H, so what
// comes after it, U of the same head and H of the thread's next one, can travel meanwhile.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

// Ranges, fetched a little before each step of an iteration. To the second level of the caches (the
// hint's 2): the first one keeps H. A line that is there already costs the instruction.
template <class Vec>
class Ahead {
 public:
  Ahead() = default;
  // All of it in `steps` portions; nothing where there are too few to hide it behind.
  KALMANET_INLINE Ahead(const StepAhead& ranges, int steps) {
    if (steps < kFewestSteps) return;
    ranges_ = ranges;
    portion_ = (ranges.lines[0] + ranges.lines[1]) / steps + 1;
  }

  KALMANET_INLINE void fetch() {
    int64_t left = portion_;
    for (int i = 0; i < 2; ++i) {
      const int64_t n = left < ranges_.lines[i] ? left : ranges_.lines[i];
      for (int64_t l = 0; l < n; ++l) {
        __builtin_prefetch(ranges_.at[i] + l * kCacheLine, 0, 2);
      }
      ranges_.at[i] += n * kCacheLine;
      ranges_.lines[i] -= n;
      left -= n;
    }
  }

 private:
  static constexpr int kFewestSteps = 8;
  StepAhead ranges_;
  int64_t portion_ = 0;
};

}  // namespace kalmanet::cpu
