// Learning rates at the places that matter.
#include "train/schedule.hpp"

#include <gtest/gtest.h>

#include "kalmanet/error.hpp"

namespace kalmanet::train {
namespace {

TEST(Schedule, CosineWarmsUpLinearlyAndEndsAtTheFinalRate) {
  const Schedule s{ScheduleKind::cosine, 1.0, 0.1, 10, 110};
  EXPECT_DOUBLE_EQ(s.at(0), 0.1);
  EXPECT_DOUBLE_EQ(s.at(4), 0.5);
  EXPECT_DOUBLE_EQ(s.at(9), 1.0);
  EXPECT_DOUBLE_EQ(s.at(10), 1.0);
  EXPECT_NEAR(s.at(109), 0.1, 1e-12);
  // Half way between steps 10 and 109.
  EXPECT_NEAR((s.at(59) + s.at(60)) / 2, 0.55, 1e-6);
  for (int64_t step = 11; step < 110; ++step) EXPECT_LT(s.at(step), s.at(step - 1)) << step;
}

TEST(Schedule, AnExhaustedTimeLimitBringsTheRateDown) {
  const Schedule s{ScheduleKind::cosine, 1.0, 0.1, 10, 110};
  EXPECT_NEAR(s.at(20, 1.0), 0.1, 1e-12);
  EXPECT_NEAR(s.at(20, 0.5), 0.55, 1e-12);
  EXPECT_DOUBLE_EQ(s.at(20, 0.0), s.at(20));
  EXPECT_DOUBLE_EQ(s.at(5, 0.5), s.at(5)) << "the warm-up is not moved";
}

TEST(Schedule, OneCycleStartsLowPeaksAndVanishes) {
  const Schedule s{ScheduleKind::one_cycle, 3e-3, 0, 75, 1500};
  EXPECT_NEAR(s.at(0), 3e-3 / 25, 1e-12);
  EXPECT_NEAR(s.at(75), 3e-3, 1e-12);
  EXPECT_NEAR(s.at(1499), 3e-3 / 250000, 1e-12);
  EXPECT_LT(s.at(74), s.at(75));
  EXPECT_LT(s.at(76), s.at(75));
}

TEST(Schedule, ShortRunsAreFinite) {
  for (const auto kind : {ScheduleKind::cosine, ScheduleKind::one_cycle, ScheduleKind::constant}) {
    for (const int64_t total : {1, 2, 3}) {
      for (int64_t step = 0; step < total; ++step) {
        const Schedule s{kind, 1.0, 0.1, 100, total};
        EXPECT_GT(s.at(step), 0) << name(kind) << " " << total << " " << step;
        EXPECT_LE(s.at(step), 1.0);
      }
    }
  }
}

TEST(Schedule, NamesGoBothWays) {
  EXPECT_EQ(schedule_kind("one-cycle"), ScheduleKind::one_cycle);
  EXPECT_EQ(name(ScheduleKind::cosine), "cosine");
  EXPECT_THROW(schedule_kind("linear"), Error);
}

}  // namespace
}  // namespace kalmanet::train
