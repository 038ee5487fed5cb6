// The C ABI of saved states.
#include <cstddef>
#include <span>

#include "api/c_error.hpp"
#include "api/c_structs.hpp"
#include "kalmanet/state.hpp"

using namespace kalmanet;

namespace {

// Null counts as empty, and the reader says then how many bytes it misses.
template <class Byte, class Void>
std::span<Byte> bytes_of(Void* buffer, size_t size) {
  return {static_cast<Byte*>(buffer), buffer ? size : 0};
}

}  // namespace

kalmanet_status kalmanet_gka_saved_state_bytes(int32_t dtype, int64_t num_sequences,
                                               int64_t num_heads, int64_t key_dim,
                                               int64_t value_dim, int64_t* bytes) {
  return api::guarded([&] {
    api::require(bytes, "bytes");
    *bytes = gka_saved_state_bytes(static_cast<DType>(dtype), num_sequences, num_heads, key_dim,
                                   value_dim);
  });
}

kalmanet_status kalmanet_gka_save_state(const kalmanet_tensor* h, const kalmanet_tensor* u,
                                        void* buffer, size_t buffer_size, int64_t* written) {
  return api::guarded([&] {
    const int64_t bytes = gka_save_state(api::const_view(h), api::const_view(u),
                                         bytes_of<std::byte>(buffer, buffer_size));
    if (written) *written = bytes;
  });
}

kalmanet_status kalmanet_gka_read_saved_state_info(const void* buffer, size_t buffer_size,
                                                   kalmanet_gka_saved_state_info* info) {
  return api::guarded([&] {
    api::require(info, "info");
    api::write_info(gka_saved_state_info(bytes_of<const std::byte>(buffer, buffer_size)), info);
  });
}

kalmanet_status kalmanet_gka_load_state(const void* buffer, size_t buffer_size,
                                        const kalmanet_tensor* h, const kalmanet_tensor* u) {
  return api::guarded([&] {
    gka_load_state(bytes_of<const std::byte>(buffer, buffer_size), api::view(h), api::view(u));
  });
}
