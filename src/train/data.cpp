// Packing text, splitting it and drawing windows from it (see data.hpp).
#include "train/data.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "train/files.hpp"

namespace kalmanet::train {
namespace {

namespace fs = std::filesystem;

// A text file has no NUL byte. Looking at the first 16 MiB keeps opening huge files quick; a NUL
// further on is read as a document separator.
constexpr size_t kInspectedBytes = size_t{16} << 20;

bool looks_binary(const models::MappedFile& file) {
  const size_t n = std::min(file.bytes().size(), kInspectedBytes);
  return n > 0 && std::memchr(file.bytes().data(), 0, n) != nullptr;
}

struct Candidate {
  uint64_t order;
  std::string name;  // relative to the folder
};

std::vector<Candidate> list_files(const fs::path& folder) {
  std::vector<Candidate> files;
  std::error_code error;
  fs::recursive_directory_iterator it(folder, fs::directory_options::skip_permission_denied, error);
  if (error) {
    throw std::runtime_error("cannot read the folder " + folder.string() + ": " + error.message());
  }
  const fs::recursive_directory_iterator end;
  while (it != end) {
    const std::string leaf = it->path().filename().string();
    const bool hidden = leaf.empty() || leaf[0] == '.' || leaf == "__pycache__" ||
                        leaf == "site-packages" || leaf == "dist-packages";
    if (it->is_symlink(error)) {
      // left out: links can make the walk endless and count a file twice
    } else if (it->is_directory(error)) {
      if (hidden) it.disable_recursion_pending();
    } else if (it->is_regular_file(error) && !hidden) {
      const std::string name = it->path().lexically_relative(folder).generic_string();
      files.push_back({mix64(fingerprint(name.data(), name.size())), name});
    }
    it.increment(error);
    if (error) break;
  }
  std::sort(files.begin(), files.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.order, a.name) < std::tie(b.order, b.name);
  });
  return files;
}

struct FileCloser {
  void operator()(std::FILE* f) const { std::fclose(f); }
};

TextSource pack_folder(const fs::path& folder, const fs::path& cache) {
  fs::path aside = cache;
  aside += ".tmp";
  TextSource source{cache, 0, 0};
  {
    std::unique_ptr<std::FILE, FileCloser> out(std::fopen(aside.c_str(), "wb"));
    if (!out) throw std::runtime_error("cannot create " + aside.string());
    bool good = true;
    for (const Candidate& candidate : list_files(folder)) {
      models::MappedFile text;
      try {
        text = models::MappedFile(folder / candidate.name);
      } catch (const std::exception&) {
        ++source.skipped;  // unreadable: the run does not depend on one file
        continue;
      }
      if (text.bytes().empty() || looks_binary(text)) {
        ++source.skipped;
        continue;
      }
      const size_t n = text.bytes().size();
      good = good && std::fwrite(text.bytes().data(), 1, n, out.get()) == n &&
             std::fputc(kDocumentSeparator, out.get()) != EOF;
      ++source.documents;
    }
    good = good && std::fflush(out.get()) == 0;
    if (!good) {
      out.reset();
      std::error_code ignored;
      fs::remove(aside, ignored);
      throw std::runtime_error("cannot write the packed text " + cache.string() +
                               ": no space left or the folder is not writable");
    }
  }
  if (source.documents == 0) {
    fs::remove(aside);
    throw std::runtime_error("the folder " + folder.string() +
                             " holds no text file; give a file or a folder with text");
  }
  sync_path(aside);
  fs::rename(aside, cache);
  return source;
}

}  // namespace

uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

TextSource prepare_text(const fs::path& text, const fs::path& cache_folder) {
  std::error_code error;
  const fs::path cache = cache_folder / "text.bin";
  const fs::file_status status = fs::status(text, error);
  if (!fs::exists(status)) {
    throw std::runtime_error("text " + text.string() +
                             ": no such file or folder; give a text file or a folder of them");
  }
  if (fs::is_directory(status)) {
    if (fs::exists(cache)) return {cache, 0, 0};
    return pack_folder(text, cache);
  }
  const models::MappedFile file(text);
  if (file.bytes().empty()) {
    throw std::runtime_error("text " + text.string() + " is empty; give a file with text in it");
  }
  if (looks_binary(file)) {
    throw std::runtime_error("text " + text.string() +
                             " has NUL bytes and looks binary; give a text file");
  }
  return {text, 1, 0};
}

TextData::TextData(const fs::path& file, double held_out, int64_t context)
    : file_(std::make_shared<models::MappedFile>(file)) {
  if (!(held_out > 0 && held_out < 1)) {
    throw std::runtime_error("held-out fraction " + std::to_string(held_out) +
                             ": must lie between 0 and 1, for example 0.1");
  }
  const auto total = static_cast<int64_t>(file_->bytes().size());
  // The tail must hold a window even of a short text; a long one gives exactly its fraction.
  const auto tail = std::max(static_cast<int64_t>(static_cast<double>(total) * held_out),
                             std::min(total, context + 1));
  if (total - tail < context + 1) {
    throw std::runtime_error("text " + file.string() + " has " + std::to_string(total) +
                             " bytes: too short for a training and a validation window of " +
                             std::to_string(context) +
                             " + 1 bytes each; give more text or a "
                             "smaller context");
  }
  const std::span<const uint8_t> all(reinterpret_cast<const uint8_t*>(file_->bytes().data()),
                                     file_->bytes().size());
  train_ = all.first(static_cast<size_t>(total - tail));
  valid_ = all.last(static_cast<size_t>(tail));
}

std::string TextData::identity() const {
  const std::byte* data = file_->bytes().data();
  const size_t n = file_->bytes().size(), block = std::min(n, size_t{1} << 20);
  uint64_t h = fingerprint(data, block);
  h = fingerprint(data + (n - block) / 2, block, h);
  h = fingerprint(data + (n - block), block, h);
  char text[64];
  std::snprintf(text, sizeof text, "%zu-%016llx", n, static_cast<unsigned long long>(h));
  return text;
}

WindowSampler::WindowSampler(std::span<const uint8_t> bytes, int64_t context, WindowOrder order,
                             uint64_t seed)
    : bytes_(bytes), context_(context), order_(order), seed_(seed) {
  const auto n = static_cast<int64_t>(bytes.size());
  if (context < 1 || n < context + 1) {
    throw std::runtime_error("a window of context " + std::to_string(context) +
                             " does not fit into " + std::to_string(n) + " bytes");
  }
  sequential_ = (n - 1) / context;
}

int64_t WindowSampler::start_of(int64_t index) const {
  if (order_ == WindowOrder::sequential) return (index % sequential_) * context_;
  // Starts 0 .. n - context - 1. The modulo's bias is below n / 2^64.
  const auto starts = static_cast<uint64_t>(bytes_.size()) - static_cast<uint64_t>(context_);
  return static_cast<int64_t>(mix64(mix64(seed_) ^ static_cast<uint64_t>(index)) % starts);
}

void WindowSampler::window(int64_t index, int64_t* out) const {
  const uint8_t* p = bytes_.data() + start_of(index);
  for (int64_t i = 0; i <= context_; ++i) out[i] = token_of(p[i]);
}

}  // namespace kalmanet::train
