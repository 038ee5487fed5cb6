// The safetensors format: 8 bytes of header length (little-endian), a JSON header that says each
// tensor's dtype, shape and place, then the data. Read through a memory map, validated in full
// before any tensor can be touched; written aside and renamed; sharded models through their index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "models/files.hpp"

namespace kalmanet::models {

// No torch here, hence the format's own element types.
enum class ElementType {
  boolean,
  u8,
  i8,
  f8_e4m3,
  f8_e5m2,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  f64,
  i64,
  u64
};
const char* name(ElementType type) noexcept;  // as in the file: "F32", "BF16", ...
int64_t size_of(ElementType type) noexcept;   // bytes an element

struct TensorInfo {
  std::string name;
  ElementType dtype = ElementType::f32;
  std::vector<int64_t> shape;  // empty: a scalar
  uint64_t begin = 0;          // bytes from the start of the data section
  uint64_t end = 0;
  int64_t numel() const noexcept;
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // by place in the file
  std::map<std::string, std::string> metadata;
  uint64_t data_begin = 0;  // bytes from the start of the file
};

inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

// `file`: the whole file. Refuses: a header length beyond the file or kMaxHeaderBytes, invalid
// UTF-8 or JSON, keys given twice, unknown dtypes, negative or overflowing shapes, offsets that are
// out of range, overlap, leave holes or do not match dtype and shape, data of another length.
// Throws kalmanet::Error, beginning with `source`.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& source);

// A tensor in a mapped file: valid as long as the file object lives. Data may be unaligned.
struct TensorView {
  const TensorInfo* info = nullptr;
  std::span<const std::byte> data;
};

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  const std::filesystem::path& path() const noexcept { return path_; }
  const std::vector<TensorInfo>& tensors() const noexcept { return header_.tensors; }
  const std::map<std::string, std::string>& metadata() const noexcept { return header_.metadata; }
  std::optional<TensorView> find(const std::string& name) const;
  TensorView view(const TensorInfo& info) const;

 private:
  std::filesystem::path path_;
  MappedFile file_;
  SafetensorsHeader header_;
  std::unordered_map<std::string, size_t> by_name_;
};

// model.safetensors.index.json: which shard holds which tensor.
struct SafetensorsIndex {
  std::map<std::string, std::string> weight_map;  // tensor name -> plain file name
  std::optional<int64_t> total_size;              // metadata.total_size, bytes of data
};
// Refuses shard names that are not plain file names (folders, "..", absolute paths). Throws Error.
SafetensorsIndex parse_safetensors_index(std::string_view json_text, const std::string& source);

// All tensors of a model: one file, or the shards of an index.
class TensorStore {
 public:
  // A .safetensors file, an index file, or a folder with model.safetensors or
  // model.safetensors.index.json. Throws Error for a missing shard, a tensor that is not in the
  // shard the index names, or one that the index does not name.
  explicit TensorStore(const std::filesystem::path& path);
  const std::vector<SafetensorsFile>& files() const noexcept { return files_; }
  std::vector<std::string> names() const;  // sorted
  std::optional<TensorView> find(const std::string& name) const;
  int64_t total_bytes() const noexcept;
  int64_t num_elements() const noexcept;

 private:
  std::vector<SafetensorsFile> files_;
  std::unordered_map<std::string, size_t> file_of_;
};

struct TensorToWrite {
  std::string name;
  ElementType dtype = ElementType::f32;
  std::vector<int64_t> shape;
  std::span<const std::byte> data;  // row-major; must outlive the call
};
// Largest elements first, then by name; the header padded with spaces, so that every tensor is
// aligned to its element. Atomic, like write_file. Throws Error: sizes that do not match, names
// given twice or "__metadata__", and whatever the file system refuses.
void write_safetensors(const std::filesystem::path& path, std::vector<TensorToWrite> tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace kalmanet::models
