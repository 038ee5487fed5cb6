// The device of that name, or what is missing for it.
#include "models/device.hpp"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/cuda.h>
#include <torch/version.h>

#include <charconv>
#include <sstream>

#include "kalmanet/error.hpp"
#include "torch/anchor.hpp"

namespace kalmanet::models {
namespace {

[[noreturn]] void fail(const std::string& text, const std::string& message,
                       ErrorCode code = ErrorCode::unsupported) {
  throw Error(code, "device", "is \"" + text + "\", " + message);
}

// What the operators' library says of its CUDA backend.
std::string cuda_backend() {
  for (const std::string& line : backend_lines()) {
    if (line.rfind("cuda: ", 0) == 0) return line;
  }
  return "cuda: not available";
}

}  // namespace

std::vector<std::string> backend_lines() {
  kalmanet_torch_anchor();
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("kalmanet::backend_info", "")
                             .typed<std::string()>();
  std::istringstream text(op.call());
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  return lines;
}

at::Device device_named(const std::string& text) {
  if (text == "cpu") return at::kCPU;
  int index = 0;
  if (text != "cuda") {
    constexpr size_t kPrefix = 5;  // "cuda:"
    const char* const end = text.data() + text.size();
    const bool prefixed = text.rfind("cuda:", 0) == 0 && text.size() > kPrefix;
    const auto parsed = prefixed ? std::from_chars(text.data() + kPrefix, end, index)
                                 : std::from_chars_result{nullptr, std::errc::invalid_argument};
    if (parsed.ec != std::errc{} || parsed.ptr != end || index < 0) {
      fail(text, "which names no device; allowed are cpu, cuda and cuda:N",
           ErrorCode::invalid_argument);
    }
  }
  if (!c10::impl::hasDeviceGuardImpl(at::kCUDA)) {
    fail(text, "but this PyTorch (" TORCH_VERSION
               ") is a build for the CPU alone; install one with CUDA (in a checkout: tools/setup "
               "--cuda, then build again), or pass cpu");
  }
  const auto count = static_cast<int>(torch::cuda::device_count());
  if (count == 0) {
    fail(text, "but PyTorch finds no NVIDIA GPU here, or no driver that is new enough; pass cpu");
  }
  if (index >= count) {
    fail(text, "but PyTorch finds " + std::to_string(count) + (count == 1 ? " GPU" : " GPUs") +
                   " here; the last is cuda:" + std::to_string(count - 1));
  }
  const std::string backend = cuda_backend();
  if (backend.find("not available") != std::string::npos) {
    fail(text, "which PyTorch has, but kalmanet has not: " + backend);
  }
  return {at::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

}  // namespace kalmanet::models
