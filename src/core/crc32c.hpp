// CRC-32C (Castagnoli): the checksum of saved states.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kalmanet::core {

// Polynomial 0x1EDC6F41, reflected, initial value and final xor all ones: crc32c("123456789") is
// 0xE3069283. `before` is the checksum of the bytes that come before these (0: there are none).
uint32_t crc32c(std::span<const std::byte> bytes, uint32_t before = 0) noexcept;

}  // namespace kalmanet::core
