// Fuzzer: any text as a safetensors index and as a tokenizer.json. Either an Error, or shard names
// that lead nowhere outside their folder.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kalmanet/error.hpp"
#include "models/safetensors.hpp"
#include "models/tokenizer.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kalmanet::models;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    for (const auto& [tensor, shard] : parse_safetensors_index(text, "fuzz").weight_map) {
      const std::filesystem::path path(shard);
      if (path.has_parent_path() || path.is_absolute() || shard == ".." || shard.empty() ||
          shard.find('\0') != std::string::npos) {
        std::abort();
      }
    }
  } catch (const kalmanet::Error&) {
  }
  try {
    ByteTokenizer::parse(text, "fuzz");
  } catch (const kalmanet::Error&) {
  }
  // Whatever the bytes, the stream's output is the same in one piece and byte by byte.
  Utf8Stream whole, single;
  std::string at_once = whole.push(text), one_by_one;
  at_once += whole.finish();
  for (const char c : text) one_by_one += single.push({&c, 1});
  one_by_one += single.finish();
  if (at_once != one_by_one) std::abort();
  return 0;
}
