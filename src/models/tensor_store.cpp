// A model's tensors wherever they lie: one safetensors file, or the shards that an index names.
#include <algorithm>

#include "models/json.hpp"
#include "models/safetensors.hpp"

namespace kalmanet::models {
namespace fs = std::filesystem;
namespace {

constexpr int64_t kMaxIndexBytes = 100'000'000;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

// A shard lies beside its index: a name from a file must never lead anywhere else.
void check_shard_name(const std::string& shard, const std::string& tensor,
                      const std::string& source) {
  const bool plain = !shard.empty() && shard != "." && shard != ".." &&
                     shard.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos &&
                     shard.size() <= 255 && shard.ends_with(".safetensors");
  if (!plain) {
    fail(source, "tensor " + in_quotes(tensor) + ": shard " + in_quotes(shard) +
                     " is not allowed; it must be the plain name of a .safetensors file in the "
                     "index's own folder");
  }
}

fs::path resolve(const fs::path& path) {
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) return path;
  for (const char* name : {kSingleFile, kIndexFile}) {
    if (fs::exists(path / name, ignored)) return path / name;
  }
  fail(path.string(), std::string("has neither ") + kSingleFile + " nor " + kIndexFile +
                          "; give a model's folder or a .safetensors file");
}

}  // namespace

SafetensorsIndex parse_safetensors_index(std::string_view json_text, const std::string& source) {
  const Json json = parse_json(json_text, source);
  ObjectReader reader(json, source);
  SafetensorsIndex index;
  if (const Json* metadata = reader.raw("metadata"); metadata != nullptr && !metadata->is_null()) {
    ObjectReader(*metadata, source, "metadata.")
        .get("total_size", index.total_size, 0, std::numeric_limits<int64_t>::max());
  }
  reader.require("weight_map");
  const Json& map = *reader.raw("weight_map");
  if (!map.is_object()) {
    reader.reject("weight_map", "it must be an object from tensor names to shard file names");
  }
  for (const auto& [tensor, shard] : map.items()) {
    if (!shard.is_string()) {
      fail(source, "tensor " + in_quotes(tensor) + ": shard is " + shown(shard) +
                       "; it must be a file name");
    }
    check_shard_name(shard.get_ref<const std::string&>(), tensor, source);
    index.weight_map.emplace(tensor, shard.get<std::string>());
  }
  if (index.weight_map.empty()) fail(source, "\"weight_map\" names no tensor");
  return index;
}

TensorStore::TensorStore(const fs::path& path) {
  const fs::path file = resolve(path);
  if (!file.string().ends_with(".json")) {
    files_.emplace_back(file);
    for (const TensorInfo& tensor : files_[0].tensors()) file_of_.emplace(tensor.name, 0);
    return;
  }
  const std::string source = file.string();
  const SafetensorsIndex index = parse_safetensors_index(read_text(file, kMaxIndexBytes), source);
  std::map<std::string, size_t> shards;
  for (const auto& [tensor, shard] : index.weight_map) {
    if (shards.contains(shard)) continue;
    const fs::path shard_path = file.parent_path() / shard;
    std::error_code ignored;
    if (!fs::exists(shard_path, ignored)) {
      fail(source, "shard " + in_quotes(shard) + " is missing (tensor " + in_quotes(tensor) +
                       " lies there); put it beside the index");
    }
    shards.emplace(shard, files_.size());
    files_.emplace_back(shard_path);
  }
  for (const auto& [tensor, shard] : index.weight_map) {
    const size_t i = shards.at(shard);
    if (!files_[i].find(tensor)) {
      std::string elsewhere;
      for (const SafetensorsFile& other : files_) {
        if (other.find(tensor))
          elsewhere = "; it is in " + in_quotes(other.path().filename().string());
      }
      fail(source, "tensor " + in_quotes(tensor) + " is not in shard " + in_quotes(shard) +
                       ", where the index places it" + elsewhere);
    }
    file_of_.emplace(tensor, i);
  }
  for (const SafetensorsFile& shard : files_) {
    for (const TensorInfo& tensor : shard.tensors()) {
      const auto it = index.weight_map.find(tensor.name);
      if (it == index.weight_map.end() || it->second != shard.path().filename().string()) {
        fail(source, "shard " + in_quotes(shard.path().filename().string()) + " holds tensor " +
                         in_quotes(tensor.name) + ", which the index does not place there");
      }
    }
  }
  // total_size is not compared: published indices count shared tensors in several ways.
}

std::vector<std::string> TensorStore::names() const {
  std::vector<std::string> names;
  for (const auto& entry : file_of_) names.push_back(entry.first);
  std::sort(names.begin(), names.end());
  return names;
}

std::optional<TensorView> TensorStore::find(const std::string& name) const {
  const auto it = file_of_.find(name);
  if (it == file_of_.end()) return std::nullopt;
  return files_[it->second].find(name);
}

int64_t TensorStore::total_bytes() const noexcept {
  int64_t bytes = 0;
  for (const SafetensorsFile& file : files_) {
    for (const TensorInfo& tensor : file.tensors()) {
      bytes += static_cast<int64_t>(tensor.end - tensor.begin);
    }
  }
  return bytes;
}

int64_t TensorStore::num_elements() const noexcept {
  int64_t n = 0;
  for (const SafetensorsFile& file : files_) {
    for (const TensorInfo& tensor : file.tensors()) n += tensor.numel();
  }
  return n;
}

}  // namespace kalmanet::models
