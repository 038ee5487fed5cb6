// Writability checks and fingerprints.
#include "train/files.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>

#include "train/helpers.hpp"

namespace kalmanet::train {
namespace {

using test::write_text;

TEST(Files, RequireWritableMakesTheFolderAndLeavesNothingBehind) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a" / "b";
  require_writable(path, 1 << 16);
  EXPECT_TRUE(std::filesystem::is_directory(path));
  EXPECT_TRUE(std::filesystem::is_empty(path));
}

TEST(Files, RequireWritableNamesAFileInTheWay) {
  const TemporaryFolder folder;
  write_text(folder.path() / "f", "x");
  const std::string message = message_of([&] { require_writable(folder.path() / "f", 1); });
  EXPECT_NE(message.find("cannot create the folder"), std::string::npos) << message;
}

TEST(Files, RequireWritableFindsThatTheRoomIsNotThere) {
  const TemporaryFolder folder;
  // A limit on the size of files stands in for a full disk.
  const auto before = std::signal(SIGXFSZ, SIG_IGN);
  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  rlimit limit = old_limit;
  limit.rlim_cur = 1 << 16;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const std::string message = message_of([&] { require_writable(folder.path(), 1 << 20); });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  std::signal(SIGXFSZ, before);
  EXPECT_NE(message.find("cannot reserve 1.0 MiB"), std::string::npos) << message;
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Files, FingerprintSeesEveryByteAndTheLength) {
  std::string text = test::some_text(1003);
  const uint64_t whole = fingerprint(text.data(), text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    text[i] ^= 1;
    EXPECT_NE(fingerprint(text.data(), text.size()), whole) << "byte " << i;
    text[i] ^= 1;
  }
  EXPECT_NE(fingerprint(text.data(), text.size() - 1), whole);
  const TemporaryFolder folder;
  write_text(folder.path() / "f", text);
  EXPECT_EQ(fingerprint_file(folder.path() / "f"), whole);
}

TEST(Files, DescribeBytes) {
  EXPECT_EQ(describe_bytes(0), "0 B");
  EXPECT_EQ(describe_bytes(1023), "1023 B");
  EXPECT_EQ(describe_bytes(1536), "1.5 KiB");
  EXPECT_EQ(describe_bytes(int64_t{5} << 30), "5.0 GiB");
}

}  // namespace
}  // namespace kalmanet::train
