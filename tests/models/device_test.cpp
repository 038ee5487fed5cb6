// Devices by name: those that are there, and what the error says of those that are not.
#include "models/device.hpp"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <gtest/gtest.h>
#include <torch/cuda.h>

#include "kalmanet/error.hpp"
#include "support/message_of.hpp"

namespace kalmanet::models {
namespace {

std::string refusal(const std::string& name) {
  return message_of([&] { device_named(name); });
}

TEST(Device, TheCpuIsAlwaysThere) {
  EXPECT_EQ(device_named("cpu"), at::Device(at::kCPU));
}

TEST(Device, OtherTextsNameNone) {
  for (const char* name : {"", "gpu", "cuda:", "cuda:x", "cuda:1x", "cuda:-1", "cuda:99999999999",
                           "CUDA", "cpu:0", "mps"}) {
    EXPECT_NE(refusal(name).find("allowed are cpu, cuda and cuda:N"), std::string::npos)
        << name << ": " << refusal(name);
    EXPECT_NE(refusal(name).find('"' + std::string(name) + '"'), std::string::npos)
        << refusal(name);
  }
}

TEST(Device, AMissingGpuIsSaidSo) {
  if (torch::cuda::device_count() > 0) {
    const int there = static_cast<int>(torch::cuda::device_count());
    EXPECT_EQ(device_named("cuda"), at::Device(at::kCUDA, 0));
    EXPECT_NE(refusal("cuda:" + std::to_string(there)).find("the last is cuda:"),
              std::string::npos);
    return;
  }
  for (const char* name : {"cuda", "cuda:0", "cuda:3"}) {
    const std::string message = refusal(name);
    const char* expected = c10::impl::hasDeviceGuardImpl(at::kCUDA)
                               ? "finds no NVIDIA GPU here"
                               : "is a build for the CPU alone";
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_NE(message.find("device: "), std::string::npos) << message;
    EXPECT_NE(message.find("pass cpu"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace kalmanet::models
