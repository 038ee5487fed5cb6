// Whole files, memory maps, and atomic replacement on POSIX systems.
#include "models/files.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include "kalmanet/error.hpp"

namespace kalmanet::models {
namespace fs = std::filesystem;
namespace {

[[noreturn]] void fail_file(const fs::path& path, const std::string& message) {
  throw Error(ErrorCode::invalid_argument, path.string(), message);
}

// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  // 0, or the error of close(2): a network file system may report a lost write only there.
  int close() {
    const int fd = std::exchange(fd_, -1);
    return fd >= 0 && ::close(fd) != 0 ? errno : 0;
  }

 private:
  int fd_;
};

struct OpenFile {
  Descriptor fd;
  size_t size;
};

OpenFile open_regular(const fs::path& path) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer. It means nothing to a regular file.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const int error = errno;
    fail_file(path, error == ENOENT ? std::string("no such file")
                                    : std::string("cannot be opened: ") + std::strerror(error));
  }
  struct stat info{};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    fail_file(path, S_ISDIR(info.st_mode) ? "is a folder; a file is needed" : "not a regular file");
  }
  return {Descriptor(fd), static_cast<size_t>(info.st_size)};
}

}  // namespace

std::string read_text(const fs::path& path, int64_t max_bytes) {
  const OpenFile file = open_regular(path);
  if (file.size > static_cast<uint64_t>(max_bytes)) {
    fail_file(path, "has " + std::to_string(file.size) + " bytes; at most " +
                        std::to_string(max_bytes) + " are accepted for a file of this kind");
  }
  std::string text(file.size, '\0');
  size_t filled = 0;
  while (filled < text.size()) {
    const ssize_t n = ::read(file.fd.get(), text.data() + filled, text.size() - filled);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_file(path, std::string("cannot be read: ") + std::strerror(errno));
    if (n == 0) break;  // it shrank meanwhile
    filled += static_cast<size_t>(n);
  }
  text.resize(filled);
  return text;
}

MappedFile::MappedFile(const fs::path& path) {
  const OpenFile file = open_regular(path);
  if (file.size == 0) return;
  void* data = ::mmap(nullptr, file.size, PROT_READ, MAP_PRIVATE, file.fd.get(), 0);
  if (data == MAP_FAILED) {
    fail_file(path, std::string("cannot be mapped into memory: ") + std::strerror(errno));
  }
  data_ = static_cast<const std::byte*>(data);
  size_ = file.size;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

namespace {

// Files aside are locked by their writer for as long as it lives, so one that can be locked was
// left by a writer that was killed.
void remove_abandoned(const fs::path& folder, const std::string& prefix) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) || !name.ends_with(".tmp")) continue;
    const Descriptor fd(
        ::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    if (fd.get() >= 0 && ::flock(fd.get(), LOCK_EX | LOCK_NB) == 0) ::unlink(entry.path().c_str());
  }
}

// Makes and locks a new file aside. `aside` becomes its path.
int open_aside(const fs::path& folder, const std::string& prefix, fs::path& aside) {
  std::random_device random;
  for (int attempt = 0; attempt < 100; ++attempt) {
    const uint64_t number = (uint64_t{random()} << 32) | random();
    aside = folder / (prefix + std::to_string(number) + ".tmp");
    // 0666 and not mkstemp's 0600: the user's umask decides who may read a model.
    const int fd = ::open(aside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) {
      if (errno == EEXIST) continue;
      return -1;
    }
    struct stat info{};
    ::flock(fd, LOCK_EX);  // where locks do not exist, abandoned files merely stay
    // Another writer's remove_abandoned may have come between open and flock.
    if (::fstat(fd, &info) == 0 && info.st_nlink > 0) return fd;
    ::close(fd);
  }
  errno = EEXIST;
  return -1;
}

int write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const size_t piece = std::min<size_t>(bytes.size(), size_t{1} << 30);
    const ssize_t n = ::write(fd, bytes.data(), piece);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : EIO;
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
  return 0;
}

}  // namespace

void write_file(const fs::path& path, const std::vector<std::span<const std::byte>>& parts) {
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  const std::string name = path.filename().string();
  if (name.empty() || name == "." || name == "..")
    fail_file(path, "not the name of a file to write");
  const std::string prefix = "." + name + ".";
  remove_abandoned(folder, prefix);

  fs::path aside;
  const int opened = open_aside(folder, prefix, aside);
  if (opened < 0) {
    const int error = errno;
    fail_file(path, "cannot be written: " + std::string(std::strerror(error)) + " (folder " +
                        folder.string() +
                        "); choose a folder that exists and that you may write to");
  }
  Descriptor fd(opened);
  int error = 0;
  size_t total = 0;
  for (const auto& part : parts) {
    total += part.size();
    if (error == 0) error = write_all(fd.get(), part);
  }
  if (error == 0 && ::fsync(fd.get()) != 0) error = errno;
  if (error == 0 && ::rename(aside.c_str(), path.c_str()) != 0) error = errno;
  const int close_error = fd.close();
  if (error == 0) error = close_error;
  if (error != 0) {
    ::unlink(aside.c_str());
    const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
    fail_file(path, "cannot be written: " + std::string(std::strerror(error)) +
                        (full ? " (" + std::to_string(total) + " bytes needed; free some space)"
                              : std::string()) +
                        "; what was there before is untouched");
  }
  // The rename itself survives a power cut only once the folder is on disk.
  const Descriptor folder_fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder_fd.get() >= 0) ::fsync(folder_fd.get());
}

void write_file(const fs::path& path, std::string_view text) {
  write_file(path, {std::as_bytes(std::span(text.data(), text.size()))});
}

}  // namespace kalmanet::models
