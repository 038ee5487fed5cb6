// Tensors of the stable ABI as kalmanet views, and new tensors for results. Nothing is copied.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kalmanet/kalmanet.hpp"

namespace kalmanet::torch_ops {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A string argument of an operator. Not std::string: LibTorch's conversion to that (seen in 2.13)
// allocates a copy at every call that it never frees: decoding grew by 64 bytes a call.
struct Text : std::string {
  using std::string::string;
};

// `name` is the argument's name in the operator's schema, for the error: kalmanet::Error where the
// tensor has a dtype that no view has, or more than kMaxRank dimensions. An empty tensor gives a
// defined view (its data is never read).
ConstView const_view(const Tensor& tensor, const char* name);
View mutable_view(const Tensor& tensor, const char* name);
// Absent in, absent out.
ConstView const_view(const OptionalTensor& tensor, const char* name);

// Throws Error unless `tensor` has `rank` dimensions; `shape` is how the schema's letters spell it.
void require_rank(const Tensor& tensor, int64_t rank, const char* name, const char* shape);

// The offsets of packed sequences; empty if absent. Error unless int64 of one dimension on the CPU.
std::vector<int64_t> offsets(const OptionalTensor& cu_seqlens);

// int32 [N], contiguous, on any device; empty if absent.
std::span<const int32_t> small_numbers(const OptionalTensor& tensor, const char* name);

// A new contiguous tensor on `like`'s device, not initialised.
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype);
// New uint8 [count] on the CPU, not initialised.
Tensor new_bytes(int64_t count);
// What an operator returns where a result was not asked for: zero elements.
Tensor no_tensor(const Tensor& like);

Solver solver_of(const std::string& text);          // "chebyshev", "direct", "cg", "auto"
Arithmetic arithmetic_of(const std::string& text);  // "standard", "bfloat16"
int num_iter_of(int64_t value);                     // 1 to 1000000, or 0: automatic
Backend backend_of(const std::string& text);        // "auto", "cpu", "reference", "cuda"
// "official", "fla"; `name` is the argument's
QkNorm qk_norm_of(const std::string& text, const char* name);

}  // namespace kalmanet::torch_ops

// (TORCH_ERROR_CODE_CHECK, not its STABLE_ twin: that came with 2.13.)
template <>
struct torch::stable::detail::ToImpl<kalmanet::torch_ops::Text> {
  static kalmanet::torch_ops::Text call(StableIValue value, uint64_t /*extension_build_version*/,
                                        bool /*is_internal*/) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);  // ours to delete
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    kalmanet::torch_ops::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
