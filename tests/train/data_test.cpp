// Packing folders, splitting text, drawing windows.
#include "train/data.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

#include "train/helpers.hpp"

namespace kalmanet::train {
namespace {

using test::read_all;
using test::some_text;
using test::write_text;

TEST(PrepareText, AFileIsUsedAsItIs) {
  const TemporaryFolder folder;
  write_text(folder.path() / "a.txt", "hello");
  const TextSource source = prepare_text(folder.path() / "a.txt", folder.path());
  EXPECT_EQ(source.file, folder.path() / "a.txt");
  EXPECT_EQ(source.documents, 1);
}

TEST(PrepareText, AFolderIsPackedOnceWithSeparatorsAndWithoutWhatIsNotText) {
  const TemporaryFolder folder;
  const auto text = folder.path() / "text", run = folder.path() / "run";
  std::filesystem::create_directories(run);
  write_text(text / "a.txt", "alpha");
  write_text(text / "deep" / "b.txt", "beta");
  write_text(text / "c.txt", "gamma");
  write_text(text / "empty.txt", "");
  write_text(text / "image.bin", std::string("a\0b", 3));
  write_text(text / ".hidden", "no");
  write_text(text / ".git" / "x", "no");
  write_text(text / "__pycache__" / "y", "no");
  std::filesystem::create_symlink(text / "a.txt", text / "link.txt");
  const TextSource source = prepare_text(text, run);
  EXPECT_EQ(source.documents, 3);
  EXPECT_EQ(source.skipped, 2);
  std::string packed = read_all(source.file);
  std::multiset<std::string> documents;
  for (size_t begin = 0; begin < packed.size();) {
    const size_t end = packed.find('\0', begin);
    ASSERT_NE(end, std::string::npos);
    documents.insert(packed.substr(begin, end - begin));
    begin = end + 1;
  }
  EXPECT_EQ(documents, (std::multiset<std::string>{"alpha", "beta", "gamma"}));

  // The order depends on names alone, and a pack that is there is used again.
  std::filesystem::create_directories(folder.path() / "other");
  EXPECT_EQ(read_all(prepare_text(text, folder.path() / "other").file), packed);
  write_text(text / "new.txt", "new");
  EXPECT_EQ(read_all(prepare_text(text, run).file), packed);
}

TEST(PrepareText, ErrorsSayWhatToDo) {
  const TemporaryFolder folder;
  write_text(folder.path() / "empty", "");
  write_text(folder.path() / "binary", std::string("a\0b", 3));
  std::filesystem::create_directories(folder.path() / "none");
  const auto message = [&](const char* name) {
    return message_of([&] { prepare_text(folder.path() / name, folder.path()); });
  };
  EXPECT_NE(message("missing").find("no such file or folder"), std::string::npos);
  EXPECT_NE(message("empty").find("is empty"), std::string::npos);
  EXPECT_NE(message("binary").find("looks binary"), std::string::npos);
  EXPECT_NE(message("none").find("holds no text file"), std::string::npos);
}

TEST(TextData, SplitsAtTheTail) {
  const TemporaryFolder folder;
  const std::string text = some_text(10000);
  write_text(folder.path() / "t", text);
  const TextData data(folder.path() / "t", 0.1, 16);
  ASSERT_EQ(data.train().size(), 9000u);
  ASSERT_EQ(data.valid().size(), 1000u);
  EXPECT_TRUE(std::equal(data.train().begin(), data.train().end(),
                         reinterpret_cast<const uint8_t*>(text.data())));
  EXPECT_EQ(data.valid()[0], static_cast<uint8_t>(text[9000]));
}

TEST(TextData, AShortTextStillHoldsAWindowOnEachSideOrIsAnError) {
  const TemporaryFolder folder;
  write_text(folder.path() / "t", some_text(34));
  EXPECT_EQ(TextData(folder.path() / "t", 0.01, 16).valid().size(), 17u);
  write_text(folder.path() / "t", some_text(33));
  EXPECT_NE(message_of([&] { TextData(folder.path() / "t", 0.01, 16); }).find("too short"),
            std::string::npos);
  EXPECT_NE(message_of([&] { TextData(folder.path() / "t", 0.0, 16); }).find("held-out"),
            std::string::npos);
}

TEST(TextData, IdentityTellsTextsApart) {
  const TemporaryFolder folder;
  std::string text = some_text(5000);
  write_text(folder.path() / "a", text);
  text[2500] ^= 1;
  write_text(folder.path() / "b", text);
  const std::string a = TextData(folder.path() / "a", 0.1, 8).identity();
  EXPECT_EQ(a, TextData(folder.path() / "a", 0.3, 16).identity());
  EXPECT_NE(a, TextData(folder.path() / "b", 0.1, 8).identity());
}

TEST(WindowSampler, SequentialWindowsCoverTheTextAndOverlapByOneByte) {
  const std::vector<uint8_t> bytes = {'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'};
  const WindowSampler sampler(bytes, 4, WindowOrder::sequential, 1);
  ASSERT_EQ(sampler.sequential_windows(), 2);
  std::vector<int64_t> window(5);
  sampler.window(0, window.data());
  EXPECT_EQ(window, (std::vector<int64_t>{'a', 'b', 'c', 'd', 'e'}));
  sampler.window(1, window.data());
  EXPECT_EQ(window, (std::vector<int64_t>{'e', 'f', 'g', 'h', 'i'}));
  sampler.window(2, window.data());
  EXPECT_EQ(window[0], 'a');
}

TEST(WindowSampler, RandomWindowsReachEveryStartAboutEquallyOften) {
  const std::vector<uint8_t> bytes(20, 'x');
  constexpr int64_t kContext = 4, kDraws = 16000, kStarts = 16;
  const WindowSampler sampler(bytes, kContext, WindowOrder::random, 7);
  std::vector<int64_t> count(kStarts, 0);
  for (int64_t i = 0; i < kDraws; ++i) {
    const int64_t start = sampler.start_of(i);
    ASSERT_GE(start, 0);
    ASSERT_LT(start, kStarts);
    ++count[static_cast<size_t>(start)];
  }
  // 1000 each, standard deviation 31: five of them.
  for (const int64_t c : count) EXPECT_NEAR(static_cast<double>(c), 1000, 155);
}

TEST(WindowSampler, WindowsDependOnSeedAndIndexAlone) {
  const std::string text = some_text(4000);
  const std::span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  const WindowSampler a(bytes, 8, WindowOrder::random, 1), b(bytes, 8, WindowOrder::random, 1),
      c(bytes, 8, WindowOrder::random, 2);
  int same = 0;
  for (int64_t i = 100; i >= 0; --i) {
    EXPECT_EQ(a.start_of(i), b.start_of(i));
    same += a.start_of(i) == c.start_of(i);
  }
  EXPECT_LT(same, 5);
}

TEST(WindowSampler, SeparatorsAreReadAsEndOfText) {
  const std::vector<uint8_t> bytes = {'a', 0, 'b'};
  std::vector<int64_t> window(3);
  WindowSampler(bytes, 2, WindowOrder::sequential, 0).window(0, window.data());
  EXPECT_EQ(window, (std::vector<int64_t>{'a', 256, 'b'}));
}

}  // namespace
}  // namespace kalmanet::train
