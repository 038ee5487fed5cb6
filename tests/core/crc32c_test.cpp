// CRC-32C against published values and against its plain twin, one bit at a time.
#include "core/crc32c.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "support/tensor.hpp"

namespace kalmanet {
namespace {

using core::crc32c;

uint32_t simple_crc32c(std::span<const std::byte> bytes) {
  uint32_t crc = ~0u;
  for (std::byte byte : bytes) {
    crc ^= std::to_integer<uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78 : 0);
  }
  return ~crc;
}

std::vector<std::byte> filled(size_t size, int first, int step) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<std::byte>(first + step * static_cast<int>(i));
  }
  return bytes;
}

TEST(Crc32c, PublishedValues) {
  const char* digits = "123456789";
  EXPECT_EQ(crc32c(std::as_bytes(std::span(digits, 9))), 0xE3069283u);
  // RFC 3720, B.4
  EXPECT_EQ(crc32c(filled(32, 0, 0)), 0x8A9136AAu);
  EXPECT_EQ(crc32c(filled(32, 255, 0)), 0x62A8AB43u);
  EXPECT_EQ(crc32c(filled(32, 0, 1)), 0x46DD794Eu);
  EXPECT_EQ(crc32c(filled(32, 31, -1)), 0x113FDB5Cu);
  EXPECT_EQ(crc32c({}), 0u);
}

TEST(Crc32c, EqualsItsPlainTwinAtEveryLengthAndOffset) {
  testing::Random random(7);
  std::vector<std::byte> bytes(300);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random.bits());
  for (size_t offset = 0; offset < 9; ++offset) {
    for (size_t size = 0; size + offset <= 100; ++size) {
      const auto part = std::span<const std::byte>(bytes).subspan(offset, size);
      ASSERT_EQ(crc32c(part), simple_crc32c(part)) << "seed 7, " << size << " bytes at " << offset;
    }
  }
  const std::span<const std::byte> all(bytes);
  for (size_t cut = 0; cut <= all.size(); ++cut) {
    ASSERT_EQ(crc32c(all.subspan(cut), crc32c(all.first(cut))), simple_crc32c(all)) << cut;
  }
}

}  // namespace
}  // namespace kalmanet
