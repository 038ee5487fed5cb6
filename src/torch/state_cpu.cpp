// Saved states (docs/state-format.md) as tensors of bytes.
#include <cstring>
#include <span>
#include <string>
#include <tuple>

#include "torch/views.hpp"

namespace kalmanet::torch_ops {
namespace {

Tensor save_state_cpu(const Tensor& h, const Tensor& u) {
  require_rank(h, 4, "h", "[N,H,K,K]");
  require_rank(u, 4, "u", "[N,H,K,V]");
  const ConstView hv = const_view(h, "h"), uv = const_view(u, "u");
  const int64_t bytes = gka_saved_state_bytes(hv.dtype, h.size(0), h.size(1), h.size(2), u.size(3));
  Tensor buffer = new_bytes(bytes);
  gka_save_state(hv, uv,
                 {static_cast<std::byte*>(buffer.mutable_data_ptr()), static_cast<size_t>(bytes)});
  return buffer;
}

std::span<const std::byte> bytes_of(const Tensor& buffer) {
  require_rank(buffer, 1, "buffer", "[bytes]");
  if (buffer.scalar_type() != torch::headeronly::ScalarType::Byte || buffer.stride(0) != 1) {
    throw Error(ErrorCode::invalid_dtype, "buffer", "must be contiguous uint8");
  }
  return {static_cast<const std::byte*>(buffer.const_data_ptr()),
          static_cast<size_t>(buffer.size(0))};
}

Tensor saved_state_bytes_cpu(const Tensor& buffer) {
  const int64_t bytes = gka_saved_state_info(bytes_of(buffer)).bytes;
  Tensor result = new_bytes(static_cast<int64_t>(sizeof bytes));
  std::memcpy(result.mutable_data_ptr(), &bytes, sizeof bytes);
  return result;
}

std::tuple<Tensor, Tensor> load_state_cpu(const Tensor& buffer) {
  const std::span<const std::byte> data = bytes_of(buffer);
  const GkaSavedStateInfo info = gka_saved_state_info(data);
  if (static_cast<int64_t>(data.size()) < info.bytes) {
    // Before memory is taken: a damaged header may ask for any amount.
    throw Error(ErrorCode::invalid_data, "buffer",
                "is truncated: the state has " + std::to_string(info.bytes) + " bytes, given are " +
                    std::to_string(data.size()));
  }
  const int64_t N = info.num_sequences, H = info.num_heads, K = info.key_dim, V = info.value_dim;
  Tensor h = new_tensor(buffer, {N, H, K, K}, info.dtype);
  Tensor u = new_tensor(buffer, {N, H, K, V}, info.dtype);
  gka_load_state(data, mutable_view(h, "h"), mutable_view(u, "u"));
  return {h, u};
}

}  // namespace
}  // namespace kalmanet::torch_ops

STABLE_TORCH_LIBRARY_IMPL(kalmanet, CPU, m) {
  m.impl("save_state", TORCH_BOX(&kalmanet::torch_ops::save_state_cpu));
  m.impl("saved_state_bytes", TORCH_BOX(&kalmanet::torch_ops::saved_state_bytes_cpu));
  m.impl("load_state", TORCH_BOX(&kalmanet::torch_ops::load_state_cpu));
}
