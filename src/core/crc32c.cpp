// CRC-32C, eight bytes at a time: one table look-up a byte, all eight independent of each other.
#include "core/crc32c.hpp"

#include <array>

namespace kalmanet::core {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // 0x1EDC6F41 with its bits reversed

// table[n][b]: what byte b adds to the remainder when n zero bytes follow it.
using Tables = std::array<std::array<uint32_t, 256>, 8>;
constexpr Tables make_tables() {
  Tables table{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t remainder = b;
    for (int bit = 0; bit < 8; ++bit) {
      remainder = (remainder >> 1) ^ (remainder & 1 ? kPolynomial : 0);
    }
    table[0][b] = remainder;
  }
  for (size_t n = 1; n < table.size(); ++n) {
    for (size_t b = 0; b < 256; ++b) {
      const uint32_t one_less = table[n - 1][b];
      table[n][b] = (one_less >> 8) ^ table[0][one_less & 0xFF];
    }
  }
  return table;
}
constexpr Tables kTable = make_tables();

}  // namespace

uint32_t crc32c(std::span<const std::byte> bytes, uint32_t before) noexcept {
  uint32_t crc = ~before;
  size_t i = 0;
  const auto at = [&](size_t k) { return std::to_integer<uint32_t>(bytes[k]); };
  for (; i + 8 <= bytes.size(); i += 8) {
    uint32_t sum = 0;
    for (size_t k = 0; k < 8; ++k) {
      // The remainder so far is four bytes long: it meets the first four of the eight.
      const uint32_t byte = at(i + k) ^ (k < 4 ? (crc >> (8 * k)) & 0xFF : 0);
      sum ^= kTable[7 - k][byte];
    }
    crc = sum;
  }
  for (; i < bytes.size(); ++i) crc = (crc >> 8) ^ kTable[0][(crc ^ at(i)) & 0xFF];
  return ~crc;
}

}  // namespace kalmanet::core
