// Hardened JSON reading for this room's files, and typed access that names what was wrong.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "kalmanet/error.hpp"
#include "models/config.hpp"

namespace kalmanet::models {

using Json = nlohmann::json;

// Deeper nesting has no use in these files, and bounding it bounds the recursion of every visitor.
inline constexpr int kMaxJsonDepth = 32;

// Strict JSON, UTF-8, one value, no key twice in an object. Throws Error beginning with `source`.
Json parse_json(std::string_view text, const std::string& source);

// For messages: escaped, in quotes, cut at 60 characters.
std::string in_quotes(std::string_view text);
std::string shown(const Json& value);

[[noreturn]] void fail(const std::string& source, const std::string& message,
                       ErrorCode code = ErrorCode::invalid_argument);

// Reads the keys of one object; what nobody asked for is left in rest(). Every getter changes its
// target only where the key is there and not null, and returns whether it was.
class ObjectReader {
 public:
  // `prefix` stands before each key in messages: "gka_config." or nothing.
  ObjectReader(const Json& object, std::string source, std::string prefix = {});

  bool get(const char* key, bool& value);
  bool get(const char* key, int64_t& value, int64_t low, int64_t high);
  bool get(const char* key, std::optional<int64_t>& value, int64_t low, int64_t high);
  // low < value <= high where low_open, else low <= value <= high.
  bool get(const char* key, double& value, double low, double high, bool low_open = false);
  bool get(const char* key, std::string& value);
  bool get_choice(const char* key, std::string& value, const std::vector<std::string>& allowed);
  // The value itself (null included), marked as read; nullptr if absent.
  const Json* raw(const char* key);
  bool has(const char* key) const { return object_.contains(key); }
  void require(const char* key) const;
  ExtraKeys rest() const;

  // "source: key "prefix.key" is <value>; <allowed>".
  [[noreturn]] void reject(const char* key, const std::string& allowed,
                           ErrorCode code = ErrorCode::invalid_argument) const;

 private:
  const Json* find(const char* key);  // null counts as absent

  const Json& object_;
  std::string source_;
  std::string prefix_;
  std::set<std::string> read_;
};

}  // namespace kalmanet::models
