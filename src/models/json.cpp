// JSON reading with limits: depth, duplicate keys, UTF-8; and messages that name key and value.
#include "models/json.hpp"

#include <cmath>
#include <sstream>

namespace kalmanet::models {

void fail(const std::string& source, const std::string& message, ErrorCode code) {
  throw Error(code, source, message);
}

std::string in_quotes(std::string_view text) {
  constexpr size_t kShown = 60;
  std::string out = "\"";
  for (size_t i = 0; i < text.size() && i < kShown; ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20 || c == 0x7f) {  // never let a file's bytes steer a terminal
      static constexpr char kHex[] = "0123456789abcdef";
      out += "\\x";
      out += kHex[c >> 4];
      out += kHex[c & 15];
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + (text.size() > kShown ? "...\"" : "\"");
}

std::string shown(const Json& value) {
  if (value.is_string()) return in_quotes(value.get_ref<const std::string&>());
  if (value.is_object()) return "an object";
  if (value.is_array()) {
    return value.size() <= 8 && value.dump().size() <= 60
               ? value.dump()
               : "an array of " + std::to_string(value.size()) + " values";
  }
  return value.dump();
}

Json parse_json(std::string_view text, const std::string& source) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
      case Json::parse_event_t::array_start:
        if (depth >= kMaxJsonDepth) {
          fail(source, "JSON nested deeper than " + std::to_string(kMaxJsonDepth) +
                           " levels; not accepted");
        }
        if (event == Json::parse_event_t::object_start) keys.emplace_back();
        break;
      case Json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case Json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        if (!keys.back().insert(key).second) {
          fail(source, "key " + in_quotes(key) + " stands twice in one JSON object; give it once");
        }
        break;
      }
      default:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check);
  } catch (const Json::exception& e) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    std::string what = e.what();
    if (const size_t end = what.find("] "); end != std::string::npos) what.erase(0, end + 2);
    constexpr size_t kShown = 200;
    if (what.size() > kShown) what = what.substr(0, kShown) + "...";
    for (char& c : what) {
      if (static_cast<unsigned char>(c) < 0x20) c = ' ';
    }
    fail(source, "not valid JSON: " + what);
  }
}

ObjectReader::ObjectReader(const Json& object, std::string source, std::string prefix)
    : object_(object), source_(std::move(source)), prefix_(std::move(prefix)) {
  if (!object_.is_object()) {
    fail(source_, (prefix_.empty() ? std::string("the file")
                                   : "key \"" + prefix_.substr(0, prefix_.size() - 1) + "\"") +
                      " is " + shown(object_) + "; it must be a JSON object");
  }
}

const Json* ObjectReader::raw(const char* key) {
  const auto it = object_.find(key);
  if (it == object_.end()) return nullptr;
  read_.insert(key);
  return &*it;
}

const Json* ObjectReader::find(const char* key) {
  const Json* value = raw(key);
  return value != nullptr && !value->is_null() ? value : nullptr;
}

void ObjectReader::reject(const char* key, const std::string& allowed, ErrorCode code) const {
  fail(source_, "key \"" + prefix_ + key + "\" is " + shown(object_.at(key)) + "; " + allowed,
       code);
}

void ObjectReader::require(const char* key) const {
  if (!object_.contains(key) || object_.at(key).is_null()) {
    fail(source_, "key \"" + prefix_ + key + "\" is missing; the model cannot be built without it");
  }
}

bool ObjectReader::get(const char* key, bool& value) {
  const Json* json = find(key);
  if (json == nullptr) return false;
  if (!json->is_boolean()) reject(key, "it must be true or false");
  value = json->get<bool>();
  return true;
}

bool ObjectReader::get(const char* key, int64_t& value, int64_t low, int64_t high) {
  const Json* json = find(key);
  if (json == nullptr) return false;
  const std::string allowed =
      "it must be an integer from " + std::to_string(low) + " to " + std::to_string(high);
  if (!json->is_number_integer()) reject(key, allowed);
  // Above int64's range the parser keeps an unsigned value.
  if (json->is_number_unsigned() &&
      json->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    reject(key, allowed);
  }
  const auto given = json->get<int64_t>();
  if (given < low || given > high) reject(key, allowed);
  value = given;
  return true;
}

bool ObjectReader::get(const char* key, std::optional<int64_t>& value, int64_t low, int64_t high) {
  int64_t given = 0;
  if (!get(key, given, low, high)) return false;
  value = given;
  return true;
}

bool ObjectReader::get(const char* key, double& value, double low, double high, bool low_open) {
  const Json* json = find(key);
  if (json == nullptr) return false;
  std::ostringstream allowed;
  allowed << "it must be a number " << (low_open ? "above " : "from ") << low
          << (low_open ? " and at most " : " to ") << high;
  if (!json->is_number()) reject(key, allowed.str());
  const auto given = json->get<double>();
  const bool inside = low_open ? given > low && given <= high : given >= low && given <= high;
  if (!std::isfinite(given) || !inside) reject(key, allowed.str());
  value = given;
  return true;
}

bool ObjectReader::get(const char* key, std::string& value) {
  const Json* json = find(key);
  if (json == nullptr) return false;
  if (!json->is_string()) reject(key, "it must be a string");
  value = json->get<std::string>();
  return true;
}

bool ObjectReader::get_choice(const char* key, std::string& value,
                              const std::vector<std::string>& allowed) {
  const Json* json = find(key);
  if (json == nullptr) return false;
  std::string list;
  for (const std::string& a : allowed) {
    if (json->is_string() && json->get_ref<const std::string&>() == a) {
      value = a;
      return true;
    }
    list += (list.empty() ? "\"" : ", \"") + a + "\"";
  }
  reject(key, (allowed.size() == 1 ? "it must be " : "it must be one of ") + list);
}

ExtraKeys ObjectReader::rest() const {
  ExtraKeys extra;
  for (const auto& [key, value] : object_.items()) {
    if (!read_.contains(key)) extra.emplace(key, value.dump());
  }
  return extra;
}

}  // namespace kalmanet::models
