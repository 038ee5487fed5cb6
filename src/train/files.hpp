// What a run asks of the file system beyond models/files.hpp: that there is room before hours of
// training, that folders are durable, and that damage is found.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace kalmanet::train {

// fsync of a file, or of a folder (which makes the renames inside it durable). Throws
// std::runtime_error.
void sync_path(const std::filesystem::path& path);

// Creates `folder` (and its parents) if needed and makes sure that `bytes` can be written there
// now: reserves a file of that size and removes it. One call finds a missing permission, a full
// disk, a quota and a file-size limit. Throws std::runtime_error with what to do.
void require_writable(const std::filesystem::path& folder, int64_t bytes);

// A 64-bit fingerprint of bytes (FNV-1a over 8-byte words): finds damage, not malice.
uint64_t fingerprint(const void* data, size_t bytes, uint64_t seed = 0xcbf29ce484222325ULL);
// The same of a file's content.
uint64_t fingerprint_file(const std::filesystem::path& path);

// "12 B", "3.4 KiB", "1.2 MiB".
std::string describe_bytes(int64_t bytes);

}  // namespace kalmanet::train
