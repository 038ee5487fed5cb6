// Saved states: the two tensors row by row, behind a header with checksums.
#include "kalmanet/state.hpp"

#include <array>
#include <bit>
#include <cstring>

#include "api/state_header.hpp"
#include "core/check.hpp"
#include "core/crc32c.hpp"
#include "core/text.hpp"

namespace kalmanet {
namespace {

// An element as it lies in the file: little endian. Its own inverse.
template <class Unsigned>
Unsigned little_endian(Unsigned value) {
  if constexpr (std::endian::native == std::endian::little) return value;
  Unsigned swapped = 0;
  for (size_t i = 0; i < sizeof value; ++i) {
    swapped = static_cast<Unsigned>((swapped << 8) | ((value >> (8 * i)) & 0xFF));
  }
  return swapped;
}

// Calls f(offset in elements) for every row of a [N,H,rows,cols] view, in order.
template <class F>
void for_each_row(const ConstView& view, F&& f) {
  for (int64_t n = 0; n < view.size[0]; ++n) {
    for (int64_t h = 0; h < view.size[1]; ++h) {
      for (int64_t r = 0; r < view.size[2]; ++r) {
        f(n * view.stride[0] + h * view.stride[1] + r * view.stride[2]);
      }
    }
  }
}

// Elements are moved as integers of their size: no bit of a NaN changes on the way.
template <class Unsigned>
std::byte* write_tensor(const ConstView& view, std::byte* to) {
  const auto* data = static_cast<const std::byte*>(view.data);
  const int64_t cols = view.size[3], stride = view.stride[3];
  constexpr auto size = static_cast<int64_t>(sizeof(Unsigned));
  const bool dense = stride == 1 && std::endian::native == std::endian::little;
  for_each_row(view, [&](int64_t row) {
    const std::byte* const from = data + row * size;
    if (dense) {
      std::memcpy(to, from, static_cast<size_t>(cols * size));
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        Unsigned value;
        std::memcpy(&value, from + c * stride * size, sizeof value);
        value = little_endian(value);
        std::memcpy(to + c * size, &value, sizeof value);
      }
    }
    to += cols * size;
  });
  return to;
}

template <class Unsigned>
const std::byte* read_tensor(const std::byte* from, const View& view) {
  auto* data = static_cast<std::byte*>(view.data);
  const int64_t cols = view.size[3], stride = view.stride[3];
  constexpr auto size = static_cast<int64_t>(sizeof(Unsigned));
  const bool dense = stride == 1 && std::endian::native == std::endian::little;
  for_each_row(view, [&](int64_t row) {
    std::byte* const to = data + row * size;
    if (dense) {
      std::memcpy(to, from, static_cast<size_t>(cols * size));
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        Unsigned value;
        std::memcpy(&value, from + c * size, sizeof value);
        value = little_endian(value);
        std::memcpy(to + c * stride * size, &value, sizeof value);
      }
    }
    from += cols * size;
  });
  return from;
}

}  // namespace

int64_t gka_saved_state_bytes(DType dtype, int64_t num_sequences, int64_t num_heads,
                              int64_t key_dim, int64_t value_dim) {
  const ErrorCode code = dtype == DType::float32 || dtype == DType::float64
                             ? ErrorCode::invalid_shape
                             : ErrorCode::invalid_dtype;
  return api::state_bytes_or_fail(
      {api::kStateVersion, dtype, num_sequences, num_heads, key_dim, value_dim, 0}, code, "state");
}

int64_t gka_save_state(const ConstView& h, const ConstView& u, std::span<std::byte> buffer) {
  core::check_required("h", h, {{"N", {}}, {"H", {}}, {"K", {}}, {"K", {}}});
  core::check_tensor("h", h, {{"N", {}}, {"H", {}}, {"K", h.size[2]}, {"K", h.size[2]}});
  core::check_required("u", u, {{"N", h.size[0]}, {"H", h.size[1]}, {"K", h.size[2]}, {"V", {}}},
                       "as h");
  core::check_dtype("u", u, h.dtype, "as h");
  api::StateHeader header;
  header.info = {api::kStateVersion, h.dtype, h.size[0], h.size[1], h.size[2], u.size[3], 0};
  header.info.bytes = gka_saved_state_bytes(h.dtype, h.size[0], h.size[1], h.size[2], u.size[3]);
  const int64_t bytes = header.info.bytes;
  if (std::ssize(buffer) < bytes) {
    core::fail(ErrorCode::invalid_argument, "buffer",
               core::text("holds ", buffer.size(), " bytes; this state takes ", bytes));
  }
  const auto payload =
      buffer.subspan(kSavedStateHeaderBytes, static_cast<size_t>(bytes - kSavedStateHeaderBytes));
  if (h.dtype == DType::float64) {
    write_tensor<uint64_t>(u, write_tensor<uint64_t>(h, payload.data()));
  } else {
    write_tensor<uint32_t>(u, write_tensor<uint32_t>(h, payload.data()));
  }
  header.payload_crc = core::crc32c(payload);
  api::encode_header(header, buffer.first<kSavedStateHeaderBytes>());
  return bytes;
}

GkaSavedStateInfo gka_saved_state_info(std::span<const std::byte> buffer) {
  return api::decode_header(buffer).info;
}

void gka_load_state(std::span<const std::byte> buffer, const View& h, const View& u) {
  const api::StateHeader header = api::decode_header(buffer);
  const GkaSavedStateInfo& info = header.info;
  if (std::ssize(buffer) < info.bytes) {
    core::fail(ErrorCode::invalid_data, "buffer",
               core::text("holds ", buffer.size(), " bytes of a saved state of ", info.bytes,
                          " (truncated)"));
  }
  const auto check = [&](const char* argument, const View& view, const char* letter, int64_t cols) {
    core::check_required(argument, view, {{"N", {}}, {"H", {}}, {"K", {}}, {letter, {}}});
    core::check_writable(
        argument, view,
        {{"N", info.num_sequences}, {"H", info.num_heads}, {"K", info.key_dim}, {letter, cols}},
        "as saved");
    core::check_dtype(argument, view, info.dtype, "as saved");
  };
  check("h", h, "K", info.key_dim);
  check("u", u, "V", info.value_dim);
  core::check_distinct(std::array<core::Named, 2>{{{"h", h}, {"u", u}}}, {}, {});
  const auto payload = buffer.subspan(kSavedStateHeaderBytes,
                                      static_cast<size_t>(info.bytes - kSavedStateHeaderBytes));
  if (const uint32_t computed = core::crc32c(payload); computed != header.payload_crc) {
    core::fail(ErrorCode::invalid_data, "buffer",
               core::text("has damaged values: their checksum is ", computed, ", not ",
                          header.payload_crc, " as the header says"));
  }
  if (info.dtype == DType::float64) {
    read_tensor<uint64_t>(read_tensor<uint64_t>(payload.data(), h), u);
  } else {
    read_tensor<uint32_t>(read_tensor<uint32_t>(payload.data(), h), u);
  }
}

}  // namespace kalmanet
