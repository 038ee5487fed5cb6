// The header of a saved state: 128 bytes, little endian (docs/state-format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kalmanet/error.hpp"
#include "kalmanet/state.hpp"

namespace kalmanet::api {

inline constexpr uint32_t kStateVersion = 1;

struct StateHeader {
  GkaSavedStateInfo info;
  uint32_t payload_crc = 0;
};

using HeaderBytes = std::span<std::byte, kSavedStateHeaderBytes>;

// Fills all 128 bytes, the header's own checksum included.
void encode_header(const StateHeader& header, HeaderBytes out);

// Throws Error(invalid_data) unless `buffer` begins with a whole, undamaged header of a version
// that is known here, whose sizes make sense and agree with each other.
StateHeader decode_header(std::span<const std::byte> buffer);

// As gka_saved_state_bytes, but complains as `code` about `argument`.
int64_t state_bytes_or_fail(const GkaSavedStateInfo& info, ErrorCode code, const char* argument);

}  // namespace kalmanet::api
