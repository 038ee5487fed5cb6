// Tensor to view, and the strings of the schemas to enumerations.
#include "torch/views.hpp"

#include <string>

namespace kalmanet::torch_ops {
namespace {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  switch (type) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      throw Error(ErrorCode::invalid_dtype, name,
                  std::string("has dtype ") + torch::headeronly::toString(type) +
                      "; allowed are float32, float64, bfloat16 and float16");
  }
}

int32_t shim_dtype(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return aoti_torch_dtype_float64();
    case DType::bfloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::float16:
      return aoti_torch_dtype_float16();
    case DType::float32:
      break;
  }
  return aoti_torch_dtype_float32();
}

// A view without data means "absent", and PyTorch gives empty tensors no data: they get this.
alignas(64) unsigned char empty_tensor_data[64];

template <class V>
V describe(V view, const Tensor& tensor, const char* name) {
  view.dtype = dtype_of(tensor, name);
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (sizes.size() > static_cast<size_t>(kMaxRank)) {
    throw Error(ErrorCode::invalid_shape, name,
                "has " + std::to_string(sizes.size()) + " dimensions; at most 4 are allowed");
  }
  view.rank = static_cast<int>(sizes.size());
  for (int d = 0; d < view.rank; ++d) {
    view.size[d] = sizes[d];
    view.stride[d] = strides[d];
  }
  if (view.data == nullptr) view.data = empty_tensor_data;
  return view;
}

}  // namespace

ConstView const_view(const Tensor& tensor, const char* name) {
  ConstView view;
  view.data = tensor.const_data_ptr();
  return describe(view, tensor, name);
}

View mutable_view(const Tensor& tensor, const char* name) {
  View view;
  view.data = tensor.mutable_data_ptr();
  return describe(view, tensor, name);
}

ConstView const_view(const OptionalTensor& tensor, const char* name) {
  return tensor ? const_view(*tensor, name) : ConstView{};
}

void require_rank(const Tensor& tensor, int64_t rank, const char* name, const char* shape) {
  if (tensor.dim() == rank) return;
  std::string given;
  for (const int64_t size : tensor.sizes()) {
    given += (given.empty() ? "" : ", ") + std::to_string(size);
  }
  throw Error(ErrorCode::invalid_shape, name,
              "must have the " + std::to_string(rank) + " dimensions " + shape + ", got shape [" +
                  given + "]");
}

std::vector<int64_t> offsets(const OptionalTensor& cu_seqlens) {
  if (!cu_seqlens) return {};
  const Tensor& tensor = *cu_seqlens;
  if (tensor.scalar_type() != ScalarType::Long) {
    throw Error(
        ErrorCode::invalid_dtype, "cu_seqlens",
        std::string("has dtype ") + torch::headeronly::toString(tensor.scalar_type()) +
            "; it must be int64 (cumulative token counts from 0 to T, one more than sequences)");
  }
  if (!tensor.is_cpu()) {
    throw Error(ErrorCode::invalid_argument, "cu_seqlens",
                "must be on the CPU, whatever the device of q; pass cu_seqlens.cpu()");
  }
  require_rank(tensor, 1, "cu_seqlens", "[N+1]");
  const int64_t count = tensor.size(0);
  if (count < 2) {
    throw Error(ErrorCode::invalid_shape, "cu_seqlens",
                "needs at least 2 offsets (one sequence), got " + std::to_string(count));
  }
  const auto* data = static_cast<const int64_t*>(tensor.const_data_ptr());
  const int64_t stride = tensor.stride(0);
  std::vector<int64_t> result(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) result[static_cast<size_t>(i)] = data[i * stride];
  return result;
}

std::span<const int32_t> small_numbers(const OptionalTensor& tensor, const char* name) {
  if (!tensor) return {};
  if (tensor->scalar_type() != ScalarType::Int) {
    throw Error(ErrorCode::invalid_dtype, name,
                std::string("has dtype ") + torch::headeronly::toString(tensor->scalar_type()) +
                    "; it must be int32");
  }
  require_rank(*tensor, 1, name, "[N]");
  const int64_t count = tensor->size(0);
  if (count > 1 && tensor->stride(0) != 1) {
    throw Error(ErrorCode::invalid_shape, name, "must be contiguous");
  }
  return {static_cast<const int32_t*>(tensor->const_data_ptr()), static_cast<size_t>(count)};
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) {
  int64_t strides[kMaxRank];
  int64_t stride = 1;
  auto size = sizes.end();
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    --size;
    strides[d] = stride;
    stride *= *size > 0 ? *size : 1;
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides, shim_dtype(dtype), device_type,
                                                  device_index, &handle));
  return Tensor(handle);
}

Tensor new_bytes(int64_t count) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor no_tensor(const Tensor& like) {
  return new_tensor(like, {0}, DType::float32);
}

Solver solver_of(const std::string& text) {
  for (const Solver solver : {Solver::chebyshev, Solver::direct, Solver::cg, Solver::automatic}) {
    if (text == name(solver)) return solver;
  }
  throw Error(ErrorCode::invalid_argument, "solver",
              "is \"" + text + "\"; allowed are \"chebyshev\", \"direct\", \"cg\" and \"auto\"");
}

Arithmetic arithmetic_of(const std::string& text) {
  for (const Arithmetic arithmetic : {Arithmetic::standard, Arithmetic::bfloat16}) {
    if (text == name(arithmetic)) return arithmetic;
  }
  throw Error(ErrorCode::invalid_argument, "arithmetic",
              "is \"" + text + "\"; allowed are \"standard\" and \"bfloat16\"");
}

int num_iter_of(int64_t value) {
  if (value < 0 || value > 1'000'000) {
    throw Error(ErrorCode::invalid_argument, "num_iter",
                "is " + std::to_string(value) +
                    "; allowed are 1 to 1000000, or 0 to choose it from ridge and tolerance");
  }
  return static_cast<int>(value);
}

Backend backend_of(const std::string& text) {
  if (text == "auto") return Backend::automatic;
  for (const Backend backend : {Backend::cpu, Backend::reference, Backend::cuda}) {
    if (text == name(backend)) return backend;
  }
  throw Error(ErrorCode::invalid_argument, "backend",
              "is \"" + text + "\"; allowed are \"auto\", \"cpu\", \"reference\" and \"cuda\"");
}

QkNorm qk_norm_of(const std::string& text, const char* name) {
  if (text == "official") return QkNorm::official;
  if (text == "fla") return QkNorm::fla;
  throw Error(ErrorCode::invalid_argument, name,
              "is \"" + text + "\"; allowed are \"official\" and \"fla\"");
}

}  // namespace kalmanet::torch_ops
