// Fuzzer: any text as a config.json. Either an Error, or a config that is valid, whose parameters
// can be counted, and that reads back as itself.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kalmanet/error.hpp"
#include "models/config.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kalmanet::models;
  ModelConfig config;
  try {
    config = parse_config({reinterpret_cast<const char*>(data), size}, "fuzz");
  } catch (const kalmanet::Error&) {
    return 0;
  }
  // From here on nothing may be refused.
  const std::string once = to_json(config);
  if (to_json(parse_config(once, "again")) != once) std::abort();
  if (config.num_hidden_layers <= 64 && num_parameters(config) <= 0) std::abort();
  if (state_bytes(config, INT64_MAX) < 0 || kv_cache_bytes(config, INT64_MAX) < 0) std::abort();
  return 0;
}
