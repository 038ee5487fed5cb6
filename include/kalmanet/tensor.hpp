// Strided views: how callers hand tensors to the library. A view owns nothing.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

#include "kalmanet/export.hpp"

namespace kalmanet {

enum class DType { float32, float64, bfloat16, float16 };

KALMANET_API const char* name(DType dtype) noexcept;
KALMANET_API int64_t size_of(DType dtype) noexcept;  // bytes an element

inline constexpr int kMaxRank = 4;
using Extents = std::array<int64_t, kMaxRank>;

// A tensor of up to four dimensions. Strides count elements, may be zero (an expanded input) or
// negative. A view whose data is null is "absent": that is how optional arguments are left out.
template <class Void>
struct BasicView {
  Void* data = nullptr;
  DType dtype = DType::float32;
  int rank = 0;
  Extents size{};
  Extents stride{};

  bool defined() const noexcept { return data != nullptr; }
  int64_t numel() const noexcept {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= size[d];
    return n;
  }
};

struct View : BasicView<void> {};

struct ConstView : BasicView<const void> {
  ConstView() = default;
  ConstView(const View& v)  // NOLINT(google-explicit-constructor): read access to what is writable
  {
    data = v.data;
    dtype = v.dtype;
    rank = v.rank;
    size = v.size;
    stride = v.stride;
  }
};

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};

namespace detail {
template <class V>
V fill_dense(V view, std::initializer_list<int64_t> sizes) {
  view.rank = static_cast<int>(sizes.size());
  int d = 0;
  for (int64_t s : sizes) view.size[d++] = s;
  int64_t stride = 1;
  for (d = view.rank - 1; d >= 0; --d) {
    view.stride[d] = stride;
    stride *= view.size[d];
  }
  return view;
}
}  // namespace detail

// A row-major contiguous view of `sizes` (at most kMaxRank of them) over `data`.
template <class T>
View dense(T* data, std::initializer_list<int64_t> sizes) {
  View v;
  v.data = data;
  v.dtype = DTypeOf<T>::value;
  return detail::fill_dense(v, sizes);
}
template <class T>
ConstView dense(const T* data, std::initializer_list<int64_t> sizes) {
  ConstView v;
  v.data = data;
  v.dtype = DTypeOf<T>::value;
  return detail::fill_dense(v, sizes);
}
// The same over memory of any dtype.
inline View dense(void* data, DType dtype, std::initializer_list<int64_t> sizes) {
  View v;
  v.data = data;
  v.dtype = dtype;
  return detail::fill_dense(v, sizes);
}
inline ConstView dense(const void* data, DType dtype, std::initializer_list<int64_t> sizes) {
  ConstView v;
  v.data = data;
  v.dtype = dtype;
  return detail::fill_dense(v, sizes);
}

}  // namespace kalmanet
