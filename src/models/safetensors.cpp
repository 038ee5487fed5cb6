// Reading safetensors: the header is checked whole before a tensor can be touched.
#include "models/safetensors.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <tuple>

#include "models/json.hpp"

namespace kalmanet::models {
namespace fs = std::filesystem;
namespace {

static_assert(std::endian::native == std::endian::little, "the format's data is little-endian");

struct ElementTypeInfo {
  const char* name;
  int64_t size;
};
// In the order of ElementType.
constexpr std::array<ElementTypeInfo, 15> kElementTypes = {{{"BOOL", 1},
                                                            {"U8", 1},
                                                            {"I8", 1},
                                                            {"F8_E4M3", 1},
                                                            {"F8_E5M2", 1},
                                                            {"I16", 2},
                                                            {"U16", 2},
                                                            {"F16", 2},
                                                            {"BF16", 2},
                                                            {"I32", 4},
                                                            {"U32", 4},
                                                            {"F32", 4},
                                                            {"F64", 8},
                                                            {"I64", 8},
                                                            {"U64", 8}}};

ElementType parse_element_type(const Json& json, const std::string& source,
                               const std::string& tensor) {
  std::string allowed;
  for (size_t i = 0; i < kElementTypes.size(); ++i) {
    if (json.is_string() && json.get_ref<const std::string&>() == kElementTypes[i].name) {
      return static_cast<ElementType>(i);
    }
    allowed += std::string(i ? ", " : "") + kElementTypes[i].name;
  }
  fail(source, "tensor " + tensor + ": dtype is " + shown(json) + "; it must be one of " + allowed,
       ErrorCode::invalid_dtype);
}

// A non-negative integer that fits int64.
int64_t parse_size(const Json& json, const std::string& source, const std::string& what) {
  if (!json.is_number_unsigned() ||
      json.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    fail(source, what + " is " + shown(json) + "; it must be an integer from 0 to 2^63-1");
  }
  return json.get<int64_t>();
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Bytes of a tensor; false where the product leaves int64 (a zero among the sizes hides nothing).
bool checked_bytes(const std::vector<int64_t>& shape, int64_t element_size, int64_t& bytes) {
  int64_t product = element_size;
  bool empty = false;
  for (const int64_t size : shape) {
    if (size == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, size, &product)) {
      return false;
    }
  }
  bytes = empty ? 0 : product;
  return true;
}

TensorInfo parse_tensor(const std::string& name, const Json& json, uint64_t data_bytes,
                        const std::string& source) {
  const std::string shown_name = in_quotes(name);
  if (!json.is_object()) {
    fail(source, "tensor " + shown_name + ": its entry is " + shown(json) +
                     "; it must be an object with dtype, shape and data_offsets");
  }
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!json.contains(key))
      fail(source, "tensor " + shown_name + ": key \"" + key + "\" is missing");
  }
  if (json.size() != 3) {
    fail(source, "tensor " + shown_name +
                     ": has keys that the format does not know; only dtype, shape and "
                     "data_offsets are allowed");
  }
  TensorInfo info;
  info.name = name;
  info.dtype = parse_element_type(json.at("dtype"), source, shown_name);

  const Json& shape = json.at("shape");
  constexpr size_t kMaxRank = 64;
  if (!shape.is_array() || shape.size() > kMaxRank) {
    fail(source, "tensor " + shown_name + ": shape is " + shown(shape) +
                     "; it must be an array of at most 64 sizes");
  }
  for (const Json& size : shape) {
    info.shape.push_back(
        parse_size(size, source, "tensor " + shown_name + ": a size in its shape"));
  }
  int64_t bytes = 0;
  if (!checked_bytes(info.shape, size_of(info.dtype), bytes)) {
    fail(source,
         "tensor " + shown_name + ": shape " + shape_text(info.shape) +
             " has more bytes than 64-bit integers count",
         ErrorCode::invalid_shape);
  }

  const Json& offsets = json.at("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2) {
    fail(source, "tensor " + shown_name + ": data_offsets is " + shown(offsets) +
                     "; it must be [begin, end]");
  }
  const std::string what = "tensor " + shown_name + ": an offset";
  info.begin = static_cast<uint64_t>(parse_size(offsets[0], source, what));
  info.end = static_cast<uint64_t>(parse_size(offsets[1], source, what));
  if (info.begin > info.end || info.end > data_bytes) {
    fail(source, "tensor " + shown_name + ": data_offsets are " + shown(offsets) +
                     "; they must ascend and stay within the file's " + std::to_string(data_bytes) +
                     " bytes of data (is the file cut short?)");
  }
  if (info.end - info.begin != static_cast<uint64_t>(bytes)) {
    fail(source, "tensor " + shown_name + ": data_offsets " + shown(offsets) + " span " +
                     std::to_string(info.end - info.begin) + " bytes, but " +
                     std::string(kalmanet::models::name(info.dtype)) + " " +
                     shape_text(info.shape) + " takes " + std::to_string(bytes));
  }
  return info;
}

}  // namespace

const char* name(ElementType type) noexcept {
  return kElementTypes[static_cast<size_t>(type)].name;
}
int64_t size_of(ElementType type) noexcept {
  return kElementTypes[static_cast<size_t>(type)].size;
}

int64_t TensorInfo::numel() const noexcept {
  int64_t n = 1;
  for (const int64_t size : shape) {
    if (size == 0) return 0;  // before the others can overflow
    n *= size;
  }
  return n;
}

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& source) {
  constexpr uint64_t kLengthBytes = 8;
  if (file.size() < kLengthBytes) {
    fail(source, "has " + std::to_string(file.size()) +
                     " bytes; a safetensors file begins with 8 bytes that say its header's length");
  }
  uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  if (length > kMaxHeaderBytes) {
    fail(source, "its first 8 bytes claim a header of " + std::to_string(length) +
                     " bytes; at most " + std::to_string(kMaxHeaderBytes) +
                     " are allowed (is it a safetensors file?)");
  }
  if (length > file.size() - kLengthBytes) {
    fail(source, "claims a header of " + std::to_string(length) + " bytes but has only " +
                     std::to_string(file.size() - kLengthBytes) +
                     " after the first 8 (is the file cut short?)");
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  if (text.empty() || text.front() != '{') {
    fail(source, "its header must be a JSON object and begin with '{' (is it a safetensors file?)");
  }

  SafetensorsHeader header;
  header.data_begin = kLengthBytes + length;
  const uint64_t data_bytes = file.size() - header.data_begin;
  const Json json = parse_json(text, source);
  for (const auto& [key, value] : json.items()) {
    if (key != "__metadata__") {
      header.tensors.push_back(parse_tensor(key, value, data_bytes, source));
      continue;
    }
    if (!value.is_object()) {
      fail(source, "__metadata__ is " + shown(value) + "; it must be an object of strings");
    }
    for (const auto& [meta_key, meta_value] : value.items()) {
      if (!meta_value.is_string()) {
        fail(source, "__metadata__ key " + in_quotes(meta_key) + " is " + shown(meta_value) +
                         "; every value must be a string");
      }
      header.metadata.emplace(meta_key, meta_value.get<std::string>());
    }
  }

  // Together the tensors must be the data, byte for byte: nothing shared, nothing hidden.
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  uint64_t end = 0;
  std::string before = "the start of the data";
  for (const TensorInfo& tensor : header.tensors) {
    if (tensor.begin != end) {
      fail(source, "tensor " + in_quotes(tensor.name) + " begins at byte " +
                       std::to_string(tensor.begin) + " of the data, " +
                       (tensor.begin < end ? "overlapping " : "leaving a hole after ") + before +
                       " (byte " + std::to_string(end) + "); tensors must lie one after another");
    }
    end = tensor.end;
    before = "tensor " + in_quotes(tensor.name);
  }
  if (end != data_bytes) {
    fail(source, "has " + std::to_string(data_bytes) + " bytes of data, but its tensors take " +
                     std::to_string(end) + "; extra bytes are not allowed");
  }
  return header;
}

SafetensorsFile::SafetensorsFile(const fs::path& path)
    : path_(path), file_(path), header_(parse_safetensors(file_.bytes(), path.string())) {
  for (size_t i = 0; i < header_.tensors.size(); ++i) by_name_.emplace(header_.tensors[i].name, i);
}

TensorView SafetensorsFile::view(const TensorInfo& info) const {
  return {&info, file_.bytes().subspan(header_.data_begin + info.begin, info.end - info.begin)};
}

std::optional<TensorView> SafetensorsFile::find(const std::string& name) const {
  const auto it = by_name_.find(name);
  if (it == by_name_.end()) return std::nullopt;
  return view(header_.tensors[it->second]);
}

void write_safetensors(const fs::path& path, std::vector<TensorToWrite> tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorToWrite& a, const TensorToWrite& b) {
    const int64_t size_a = size_of(a.dtype), size_b = size_of(b.dtype);
    return size_a != size_b ? size_a > size_b : a.name < b.name;
  });
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  std::vector<std::span<const std::byte>> parts(2);
  uint64_t end = 0;
  for (const TensorToWrite& tensor : tensors) {
    int64_t bytes = 0;
    const bool counted = std::all_of(tensor.shape.begin(), tensor.shape.end(),
                                     [](int64_t size) { return size >= 0; }) &&
                         checked_bytes(tensor.shape, size_of(tensor.dtype), bytes);
    if (!counted || static_cast<uint64_t>(bytes) != tensor.data.size()) {
      fail(path.string(),
           "tensor " + in_quotes(tensor.name) + ": " + name(tensor.dtype) + " " +
               shape_text(tensor.shape) + " does not take the " +
               std::to_string(tensor.data.size()) + " bytes given",
           ErrorCode::invalid_shape);
    }
    if (tensor.name == "__metadata__" || json.contains(tensor.name)) {
      fail(path.string(), "tensor name " + in_quotes(tensor.name) +
                              (tensor.name == "__metadata__" ? " belongs to the format itself"
                                                             : " is given twice"));
    }
    json[tensor.name] = {{"dtype", name(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"data_offsets", {end, end + tensor.data.size()}}};
    end += tensor.data.size();
    parts.push_back(tensor.data);
  }
  std::string header;
  try {
    header = json.dump();
  } catch (const Json::exception&) {
    fail(path.string(), "a tensor name or a metadata text is not valid UTF-8");
  }
  header.resize((header.size() + 7) / 8 * 8, ' ');
  if (header.size() > kMaxHeaderBytes) {
    fail(path.string(), "the header would take " + std::to_string(header.size()) +
                            " bytes; the format allows " + std::to_string(kMaxHeaderBytes));
  }
  const uint64_t length = header.size();
  parts[0] = std::as_bytes(std::span(&length, 1));
  parts[1] = std::as_bytes(std::span(header.data(), header.size()));
  write_file(path, parts);
}

}  // namespace kalmanet::models
