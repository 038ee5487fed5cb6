// Fuzzer: any bytes as a safetensors file. Either an Error, or a header whose tensors all lie
// within the file, one after another, each with the bytes its dtype and shape say.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "kalmanet/error.hpp"
#include "models/safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kalmanet::models;
  try {
    const auto file = std::as_bytes(std::span(data, size));
    const SafetensorsHeader header = parse_safetensors(file, "fuzz");
    uint64_t end = 0;
    for (const TensorInfo& tensor : header.tensors) {
      if (tensor.begin != end || tensor.end < tensor.begin) std::abort();
      const auto bytes = static_cast<uint64_t>(tensor.numel() * size_of(tensor.dtype));
      if (tensor.end - tensor.begin != bytes) std::abort();
      end = tensor.end;
    }
    if (header.data_begin + end != size) std::abort();
    // Every byte of the data is readable.
    uint64_t sum = 0;
    for (const std::byte b : file.subspan(header.data_begin, end)) sum += static_cast<uint64_t>(b);
    if (sum == UINT64_MAX) std::abort();
  } catch (const kalmanet::Error&) {
  }
  return 0;
}
