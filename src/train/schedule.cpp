// Warm-up, cosine and one-cycle learning rates (see schedule.hpp).
#include "train/schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kalmanet/error.hpp"

namespace kalmanet::train {
namespace {

// Half a cosine from `from` (p = 0) to `to` (p = 1).
double anneal(double from, double to, double p) {
  return to + (from - to) * (1 + std::cos(std::numbers::pi * std::clamp(p, 0.0, 1.0))) / 2;
}

}  // namespace

double Schedule::at(int64_t step, double min_progress) const {
  if (kind == ScheduleKind::constant) return peak;
  // The last step is number total - 1 and gets the final rate.
  const auto last = static_cast<double>(std::max<int64_t>(1, total_steps - 1));
  const auto s = static_cast<double>(step);
  const auto warmup = static_cast<double>(std::min(warmup_steps, total_steps));
  if (kind == ScheduleKind::one_cycle) {
    constexpr double kStartDivisor = 25;  // as the policy is usually run
    constexpr double kFinalDivisor = 250000;
    const double low = peak / kStartDivisor;
    if (s < warmup) return anneal(low, peak, s / std::max(1.0, warmup));
    const double p = (s - warmup) / std::max(1.0, last - warmup);
    return anneal(peak, peak / kFinalDivisor, std::max(p, min_progress));
  }
  if (s < warmup) return peak * (s + 1) / warmup;
  const double p = (s - warmup) / std::max(1.0, last - warmup);
  return anneal(peak, peak * final_ratio, std::max(p, min_progress));
}

std::string name(ScheduleKind kind) {
  switch (kind) {
    case ScheduleKind::cosine:
      return "cosine";
    case ScheduleKind::one_cycle:
      return "one-cycle";
    case ScheduleKind::constant:
      return "constant";
  }
  return "?";
}

ScheduleKind schedule_kind(const std::string& text) {
  for (ScheduleKind kind :
       {ScheduleKind::cosine, ScheduleKind::one_cycle, ScheduleKind::constant}) {
    if (name(kind) == text) return kind;
  }
  throw Error(ErrorCode::invalid_argument, "schedule",
              "'" + text + "'; allowed: cosine, one-cycle, constant");
}

}  // namespace kalmanet::train
