// Metrics lines: appended, flushed, and cut back when a run goes on from a checkpoint.
#include "train/metrics.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "train/helpers.hpp"

namespace kalmanet::train {
namespace {

using test::read_all;

TEST(Metrics, EachLineIsThereAtOnce) {
  const TemporaryFolder folder;
  MetricsFile file(folder.path() / "m", -1);
  file.write({{"step", 1}, {"loss", 2.5}});
  EXPECT_EQ(read_all(folder.path() / "m"), "{\"step\":1,\"loss\":2.5}\n");
  file.write({{"step", 2}, {"loss", std::numeric_limits<double>::quiet_NaN()}});
  EXPECT_EQ(read_all(folder.path() / "m"),
            "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":null}\n");
}

TEST(Metrics, LinesPastTheCheckpointAndAnUnfinishedOneAreRemoved) {
  const TemporaryFolder folder;
  test::write_text(folder.path() / "m",
                   "{\"step\":1}\n{\"step\":2}\nnonsense\n{\"step\":3}\n{\"step\":2,\"lo");
  MetricsFile(folder.path() / "m", 2).write({{"step", 3}});
  EXPECT_EQ(read_all(folder.path() / "m"), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
  MetricsFile(folder.path() / "m", -1).write({{"step", 0}});
  EXPECT_EQ(read_all(folder.path() / "m"), "{\"step\":0}\n");
}

TEST(Metrics, AFullDiskIsAnError) {
  MetricsFile file("/dev/full", 0);
  EXPECT_THROW(file.write({{"step", 1}}), std::runtime_error);
}

}  // namespace
}  // namespace kalmanet::train
