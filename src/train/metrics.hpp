// The record of a run: one JSON object a line, each flushed as it is written.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace kalmanet::train {

class MetricsFile {
 public:
  // Opens for appending. Lines whose "step" is above `keep_through` (those that a killed run wrote
  // after its last checkpoint) and an unfinished last line are removed first; -1 removes all.
  MetricsFile(const std::filesystem::path& path, int64_t keep_through);
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;

  // Throws std::runtime_error if the line cannot be written (full disk).
  void write(const nlohmann::ordered_json& line);

 private:
  std::filesystem::path path_;
  std::FILE* file_ = nullptr;
};

}  // namespace kalmanet::train
