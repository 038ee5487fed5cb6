// The header of a saved state, read as if an enemy had written it.
#include "api/state_header.hpp"

#include <algorithm>
#include <array>
#include <string>

#include "core/check.hpp"
#include "core/crc32c.hpp"
#include "core/text.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::api {
namespace {

// As in PNG, the first bytes show what careless copying does: the 0x89 is lost where only seven
// bits survive, CR LF where line ends are changed, and 0x1A ends a listing on old systems.
constexpr std::array<uint8_t, 8> kMagic = {0x89, 'K', 'N', 'S', 'T', '\r', '\n', 0x1A};
constexpr uint32_t kByteOrder = 0x01020304;
constexpr uint32_t kOtherByteOrder = 0x04030201;

// Where each field begins.
enum Offset : size_t {
  kAtMagic = 0,
  kAtByteOrder = 8,
  kAtVersion = 12,
  kAtHeaderBytes = 16,
  kAtDType = 20,
  kAtSequences = 24,
  kAtHeads = 32,
  kAtKeyDim = 40,
  kAtValueDim = 48,
  kAtPayloadBytes = 56,
  kAtReserved = 64,
  kAtPayloadCrc = 120,
  kAtHeaderCrc = 124,
};

// Unsigned integers at an offset, little endian whatever the machine is.
template <class Unsigned>
void put(HeaderBytes out, size_t at, Unsigned value) {
  for (size_t i = 0; i < sizeof value; ++i) {
    out[at + i] = static_cast<std::byte>(static_cast<uint8_t>(value >> (8 * i)));
  }
}
template <class Unsigned>
Unsigned get(std::span<const std::byte> in, size_t at) {
  Unsigned value = 0;
  for (size_t i = 0; i < sizeof value; ++i) {
    value |= static_cast<Unsigned>(std::to_integer<uint8_t>(in[at + i])) << (8 * i);
  }
  return value;
}

[[noreturn]] void bad(const std::string& message) {
  core::fail(ErrorCode::invalid_data, "buffer", message);
}

}  // namespace

int64_t state_bytes_or_fail(const GkaSavedStateInfo& info, ErrorCode code, const char* argument) {
  const auto sizes = [&] {
    return core::text("a state of N = ", info.num_sequences, " sequences, H = ", info.num_heads,
                      " heads, K = ", info.key_dim, ", V = ", info.value_dim);
  };
  if (info.dtype != DType::float32 && info.dtype != DType::float64) {
    core::fail(code, argument,
               core::text("dtype ", name(info.dtype), " (", static_cast<int>(info.dtype),
                          "); states are float32 or float64"));
  }
  if (info.num_sequences < 0 || info.num_heads < 1 || info.key_dim < 1 || info.value_dim < 1 ||
      info.key_dim > kMaxHeadDim || info.value_dim > kMaxHeadDim) {
    core::fail(code, argument,
               core::text(sizes(), "; must be N >= 0, H >= 1, K and V in 1..", kMaxHeadDim));
  }
  const int64_t head_bytes =
      info.key_dim * (info.key_dim + info.value_dim) * size_of(info.dtype);  // at most 2^20
  int64_t bytes;
  if (__builtin_mul_overflow(info.num_sequences, info.num_heads, &bytes) ||
      __builtin_mul_overflow(bytes, head_bytes, &bytes) ||
      __builtin_add_overflow(bytes, kSavedStateHeaderBytes, &bytes)) {
    core::fail(code, argument, core::text(sizes(), ", more bytes than 63 bits can count"));
  }
  return bytes;
}

void encode_header(const StateHeader& header, HeaderBytes out) {
  const GkaSavedStateInfo& info = header.info;
  std::fill(out.begin(), out.end(), std::byte{0});
  for (size_t i = 0; i < kMagic.size(); ++i) out[kAtMagic + i] = static_cast<std::byte>(kMagic[i]);
  put<uint32_t>(out, kAtByteOrder, kByteOrder);
  put<uint32_t>(out, kAtVersion, info.version);
  put<uint32_t>(out, kAtHeaderBytes, kSavedStateHeaderBytes);
  put<uint32_t>(out, kAtDType, static_cast<uint32_t>(info.dtype));
  put<uint64_t>(out, kAtSequences, static_cast<uint64_t>(info.num_sequences));
  put<uint64_t>(out, kAtHeads, static_cast<uint64_t>(info.num_heads));
  put<uint64_t>(out, kAtKeyDim, static_cast<uint64_t>(info.key_dim));
  put<uint64_t>(out, kAtValueDim, static_cast<uint64_t>(info.value_dim));
  put<uint64_t>(out, kAtPayloadBytes, static_cast<uint64_t>(info.bytes - kSavedStateHeaderBytes));
  put<uint32_t>(out, kAtPayloadCrc, header.payload_crc);
  put<uint32_t>(out, kAtHeaderCrc, core::crc32c(out.first(kAtHeaderCrc)));
}

// First what tells a foreign file from ours, then what tells a version that is read otherwise, then
// whether the bytes are those that were written; only then what they say.
StateHeader decode_header(std::span<const std::byte> buffer) {
  const auto magic_byte = [](std::byte a, uint8_t b) { return std::to_integer<uint8_t>(a) == b; };
  const size_t common = std::min(buffer.size(), kMagic.size());
  if (!std::equal(buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(common), kMagic.begin(),
                  magic_byte)) {
    bad("is no saved state: it does not begin with the eight bytes that every one begins with");
  }
  if (std::ssize(buffer) < kSavedStateHeaderBytes) {
    bad(core::text("holds ", buffer.size(), " bytes; the header of a saved state alone has ",
                   kSavedStateHeaderBytes, " (truncated)"));
  }
  const auto in = buffer.first<kSavedStateHeaderBytes>();
  const auto byte_order = get<uint32_t>(in, kAtByteOrder);
  if (byte_order == kOtherByteOrder) {
    bad("is big endian; saved states are little endian on every machine");
  }
  if (byte_order != kByteOrder) {
    bad(core::text("has the byte order mark ", byte_order, "; must be ", kByteOrder, " (damaged)"));
  }
  StateHeader header;
  GkaSavedStateInfo& info = header.info;
  info.version = get<uint32_t>(in, kAtVersion);
  if (info.version != kStateVersion) {
    bad(core::text("is a saved state of version ", info.version, "; this library reads version ",
                   kStateVersion));
  }
  const auto header_crc = get<uint32_t>(in, kAtHeaderCrc);
  if (const uint32_t computed = core::crc32c(in.first(kAtHeaderCrc)); computed != header_crc) {
    bad(core::text("has a damaged header: its checksum is ", computed, ", not ", header_crc,
                   " as it says"));
  }
  if (const auto size = get<uint32_t>(in, kAtHeaderBytes); size != kSavedStateHeaderBytes) {
    bad(core::text("has a header of ", size, " bytes; version ", kStateVersion, " has ",
                   kSavedStateHeaderBytes));
  }
  for (size_t i = kAtReserved; i < kAtPayloadCrc; ++i) {
    if (in[i] != std::byte{0}) bad(core::text("has a header whose reserved byte ", i, " is set"));
  }
  // Numbers beyond int turn into dtypes that do not exist, and those beyond int64 negative.
  info.dtype = static_cast<DType>(static_cast<int>(get<uint32_t>(in, kAtDType)));
  info.num_sequences = static_cast<int64_t>(get<uint64_t>(in, kAtSequences));
  info.num_heads = static_cast<int64_t>(get<uint64_t>(in, kAtHeads));
  info.key_dim = static_cast<int64_t>(get<uint64_t>(in, kAtKeyDim));
  info.value_dim = static_cast<int64_t>(get<uint64_t>(in, kAtValueDim));
  info.bytes = state_bytes_or_fail(info, ErrorCode::invalid_data, "buffer");
  const auto payload = get<uint64_t>(in, kAtPayloadBytes);
  const int64_t expected = info.bytes - kSavedStateHeaderBytes;
  if (payload != static_cast<uint64_t>(expected)) {
    bad(core::text("has a header that says ", payload, " bytes of payload where its sizes make ",
                   expected));
  }
  header.payload_crc = get<uint32_t>(in, kAtPayloadCrc);
  return header;
}

}  // namespace kalmanet::api
