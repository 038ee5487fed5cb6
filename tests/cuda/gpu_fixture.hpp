// For tests that need a GPU: where there is none they are skipped, and say so.
#pragma once

#include <gtest/gtest.h>

#include "kalmanet/backend.hpp"

namespace kalmanet::testing {

class CudaGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const BackendInfo& info : backends()) {
      if (info.backend != Backend::cuda) continue;
      if (!info.available) GTEST_SKIP() << "NOT TESTED, no GPU here: " << info.detail;
    }
  }
};

}  // namespace kalmanet::testing
