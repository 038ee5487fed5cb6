// Reading whole files, mapping them, and writing them so that no partial file has the final name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kalmanet::models {

// The content of a text file of at most `max_bytes`. Throws Error if it is missing, not a regular
// file, unreadable or longer.
std::string read_text(const std::filesystem::path& path, int64_t max_bytes);

// A regular file mapped into memory, read-only. Move-only; unmapped at destruction. The file must
// not be truncated while it is mapped (the system would raise SIGBUS); replacing it by rename, as
// write_file does, is safe.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Writes `parts` one after another as the file `path`: into ".<name>.<random>.tmp" beside it,
// fsync, rename over `path`, fsync of the folder. On any failure (no such folder, no permission, no
// space left) throws Error, and `path` is what it was before. Files that a killed writer left aside
// are removed by the next one.
void write_file(const std::filesystem::path& path,
                const std::vector<std::span<const std::byte>>& parts);
void write_file(const std::filesystem::path& path, std::string_view text);

}  // namespace kalmanet::models
