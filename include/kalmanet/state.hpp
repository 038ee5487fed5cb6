// Saving a layer's states to bytes and loading them again: to park a conversation, move it to
// another machine, or go on tomorrow. docs/state-format.md describes every byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kalmanet/export.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet {

inline constexpr int64_t kSavedStateHeaderBytes = 128;

// What the header of a saved state says.
struct GkaSavedStateInfo {
  uint32_t version = 0;  // of the format
  DType dtype = DType::float32;
  int64_t num_sequences = 0, num_heads = 0, key_dim = 0, value_dim = 0;  // N, H, K, V
  int64_t bytes = 0;                                                     // header and payload
};

// Bytes that save_state writes for states [N,H,K,K] and [N,H,K,V] (float32 or float64; N >= 0,
// H >= 1, K and V in 1..256). Throws Error on anything else, or where no int64 holds the number.
KALMANET_API int64_t gka_saved_state_bytes(DType dtype, int64_t num_sequences, int64_t num_heads,
                                           int64_t key_dim, int64_t value_dim);

// Writes h [N,H,K,K] and u [N,H,K,V], of one dtype (float32 or float64) and any strides, into
// `buffer`, which may be larger and lie at any address. Returns the bytes written. Throws Error,
// with nothing written, where the tensors do not fit each other or the buffer is too small.
KALMANET_API int64_t gka_save_state(const ConstView& h, const ConstView& u,
                                    std::span<std::byte> buffer);

// Reads and checks a header; the payload may be missing. `buffer` may go on behind the saved state:
// several of them in a row are read one after the other, `bytes` apart. Throws
// Error(invalid_data) that says what is wrong: not a saved state, truncated, another byte order, a
// newer version, a damaged header, sizes that no state has.
KALMANET_API GkaSavedStateInfo gka_saved_state_info(std::span<const std::byte> buffer);

// Reads a saved state, bit for bit, into h [N,H,K,K] and u [N,H,K,V], which have the saved sizes
// and dtype and any strides. Throws Error, with nothing written, where gka_saved_state_info would,
// where the payload is truncated or its checksum differs (both invalid_data), and where the views
// do not fit what was saved. Never reads past the buffer, whatever its bytes say.
KALMANET_API void gka_load_state(std::span<const std::byte> buffer, const View& h, const View& u);

}  // namespace kalmanet
