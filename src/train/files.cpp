// Room, durability and fingerprints (see files.hpp).
#include "train/files.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "models/files.hpp"

namespace kalmanet::train {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const std::string& what, const fs::path& path, int error) {
  throw std::runtime_error(what + " " + path.string() + ": " +
                           std::generic_category().message(error));
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

void sync_path(const fs::path& path) {
  Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) fail("cannot open", path, errno);
  // Some file systems cannot sync a folder and say EINVAL: then there is nothing to wait for.
  if (::fsync(fd.get()) != 0 && errno != EINVAL) fail("cannot sync", path, errno);
}

void require_writable(const fs::path& folder, int64_t bytes) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error || !fs::is_directory(folder)) {
    throw std::runtime_error("cannot create the folder " + folder.string() + ": " +
                             (error ? error.message() : "a file of that name is in the way") +
                             "; choose another one");
  }
  const fs::path probe = folder / ".space.tmp";
  Descriptor fd(::open(probe.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (fd.get() < 0) {
    throw std::runtime_error("cannot write into " + folder.string() + ": " +
                             std::generic_category().message(errno) +
                             "; choose a folder that you may write to");
  }
  const int reserved = bytes > 0 ? ::posix_fallocate(fd.get(), 0, bytes) : 0;
  fs::remove(probe, error);
  if (reserved != 0 && reserved != EOPNOTSUPP && reserved != EINVAL) {
    throw std::runtime_error("cannot reserve " + describe_bytes(bytes) + " in " + folder.string() +
                             ": " + std::generic_category().message(reserved) +
                             "; free some space or choose another folder");
  }
}

uint64_t fingerprint(const void* data, size_t bytes, uint64_t seed) {
  constexpr uint64_t kPrime = 0x100000001b3ULL;
  const auto* p = static_cast<const unsigned char*>(data);
  uint64_t h = seed;
  while (bytes >= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    h = (h ^ word) * kPrime;
    h ^= h >> 32;  // FNV alone never carries a word's high bits down
    p += 8;
    bytes -= 8;
  }
  for (; bytes > 0; --bytes, ++p) h = (h ^ *p) * kPrime;
  return h;
}

uint64_t fingerprint_file(const fs::path& path) {
  const models::MappedFile file(path);
  return fingerprint(file.bytes().data(), file.bytes().size());
}

std::string describe_bytes(int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text.data();
}

}  // namespace kalmanet::train
