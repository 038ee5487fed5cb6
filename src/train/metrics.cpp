// JSON lines, cut back to a checkpoint's step when a run is resumed (see metrics.hpp).
#include "train/metrics.hpp"

#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "models/files.hpp"

namespace kalmanet::train {
namespace {

constexpr int64_t kMaxMetricsBytes = int64_t{1} << 32;

// The lines of `text` that are complete, valid and not past `keep_through`.
std::string kept_lines(const std::string& text, int64_t keep_through) {
  std::string kept;
  size_t begin = 0;
  for (;;) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) return kept;
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    const auto parsed = nlohmann::json::parse(line, nullptr, false);
    if (!parsed.is_object() || !parsed.contains("step")) continue;
    if (!parsed["step"].is_number_integer() || parsed["step"].get<int64_t>() > keep_through)
      continue;
    kept += line + "\n";
  }
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t keep_through) : path_(path) {
  if (std::filesystem::is_regular_file(path)) {
    const std::string kept =
        keep_through < 0 ? "" : kept_lines(models::read_text(path, kMaxMetricsBytes), keep_through);
    models::write_file(path, kept);
  }
  file_ = std::fopen(path.c_str(), "ab");
  if (file_ == nullptr) {
    throw std::runtime_error("cannot write " + path.string() + ": " +
                             std::generic_category().message(errno));
  }
}

MetricsFile::~MetricsFile() {
  if (file_ != nullptr) std::fclose(file_);
}

void MetricsFile::write(const nlohmann::ordered_json& line) {
  // NaN and infinity become null: JSON has neither.
  const std::string text = line.dump() + "\n";
  if (std::fwrite(text.data(), 1, text.size(), file_) != text.size() || std::fflush(file_) != 0) {
    throw std::runtime_error("cannot write " + path_.string() + ": " +
                             std::generic_category().message(errno));
  }
}

}  // namespace kalmanet::train
