// Learning rate over a run: linear warm-up then cosine decay, and the one-cycle policy.
#pragma once

#include <cstdint>
#include <string>

namespace kalmanet::train {

enum class ScheduleKind { cosine, one_cycle, constant };

struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  double peak = 1e-3;        // the highest learning rate
  double final_ratio = 0.1;  // cosine: the last rate is peak * final_ratio
  int64_t warmup_steps = 100;
  int64_t total_steps = 1000;

  // The rate of step `step` (0-based).
  //   cosine: peak (step + 1) / warmup during warm-up, then with p from 0 to 1 over the rest
  //     peak (final + (1 - final) (1 + cos(pi p)) / 2)
  //   one_cycle: half a cosine from peak / 25 to peak over warmup_steps, then half a cosine down to
  //     peak / 250000
  // `min_progress` in [0, 1] moves the decay on: a run with a time limit hands in the used share of
  // its time, so that the rate is down when time is up even if steps are left.
  double at(int64_t step, double min_progress = 0) const;
};

std::string name(ScheduleKind kind);
ScheduleKind schedule_kind(const std::string& name);  // throws kalmanet::Error

}  // namespace kalmanet::train
