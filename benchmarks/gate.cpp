// The gates: comparing, reporting, counting.
#include "gate.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace kalmanet::bench {
namespace {

int failures = 0;

}  // namespace

int failed_gates() {
  return failures;
}

template <class Got, class Want>
void Gate::compare_numbers(const char* name, Got&& got, Want&& want, int64_t size, double bound) {
  double difference2 = 0.0, want2 = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    // --spoil: one part in a hundred of one value in three.
    const double value = settings_.spoil && i % 3 == 0 ? 1.01 * got(i) : got(i);
    const double difference = value - want(i);
    difference2 += difference * difference;
    want2 += want(i) * want(i);
  }
  const double error = std::sqrt(difference2 / want2);
  if (error <= bound) {  // a NaN fails
    worst_ = std::max(worst_, error / bound);
    return;
  }
  char line[160];
  std::snprintf(line, sizeof line, "\n    %s: relative difference %.2e, at most %.1e allowed", name,
                error, bound);
  failures_ += line;
}

void Gate::compare(const char* name, std::span<const float> got, std::span<const float> want,
                   double bound) {
  const double limit = got.size() == want.size() ? bound : -1.0;
  compare_numbers(
      name, [&](int64_t i) -> double { return got[static_cast<size_t>(i)]; },
      [&](int64_t i) -> double { return want[static_cast<size_t>(i)]; },
      static_cast<int64_t>(std::min(got.size(), want.size())), limit);
}

void Gate::compare(const char* name, const Array& got, int64_t first, const Array& want,
                   double bound) {
  const double limit = first + want.size() <= got.size() ? bound : -1.0;
  compare_numbers(
      name, [&](int64_t i) { return got.at(first + i); }, [&](int64_t i) { return want.at(i); },
      std::min(want.size(), got.size() - first), limit);
}

bool Gate::passed() const {
  if (failures_.empty()) {
    std::fprintf(stderr, "gate passed: %s (largest difference %.0f%% of its bound)\n",
                 what_.c_str(), 100.0 * worst_);
    return true;
  }
  ++failures;
  std::fprintf(stderr, "refused to time a wrong answer: %s%s\n", what_.c_str(), failures_.c_str());
  return false;
}

}  // namespace kalmanet::bench
