// Rows of a caller's tensor, of any dtype and stride, to and from adjacent numbers of the kernels'
// storage type: for the operations whose kernels take adjacent rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/dispatch.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet::cpu {

// to[c] = element at + c * stride of an array, c < n. S is double for float64 arrays, else float.
template <class S>
void read_strided(DType dtype, const void* data, int64_t at, int64_t stride, int64_t n, S* to) {
  if constexpr (std::is_same_v<S, float>) {
    if (dtype != DType::float32) {
      kernels().convert.load(dtype, static_cast<const uint16_t*>(data) + at, stride, n, to);
      return;
    }
  }
  const S* from = static_cast<const S*>(data) + at;
  for (int64_t c = 0; c < n; ++c) to[c] = from[c * stride];
}

// The other way, rounded once.
template <class S>
void write_strided(const S* from, int64_t n, DType dtype, void* data, int64_t at, int64_t stride) {
  if constexpr (std::is_same_v<S, float>) {
    if (dtype != DType::float32) {
      kernels().convert.store(dtype, from, n, static_cast<uint16_t*>(data) + at, stride);
      return;
    }
  }
  S* to = static_cast<S*>(data) + at;
  for (int64_t c = 0; c < n; ++c) to[c * stride] = from[c];
}

// The address of number `at` of an array.
inline const void* shifted(const void* data, DType dtype, int64_t at) {
  return static_cast<const char*>(data) + at * size_of(dtype);
}
inline void* shifted(void* data, DType dtype, int64_t at) {
  return static_cast<char*>(data) + at * size_of(dtype);
}

// Rows of a tensor: element (r, c) is number r * row_stride + c * stride from data. Void is void or
// const void.
template <class Void>
struct Plane {
  Void* data = nullptr;
  DType dtype = DType::float32;
  int64_t row_stride = 0;
  int64_t stride = 0;

  bool defined() const { return data != nullptr; }
  // Whether kernels of storage type S can take the rows where they lie.
  template <class S>
  bool dense() const {
    return stride == 1 && dtype == DTypeOf<S>::value;
  }
  // Row r of a dense plane.
  template <class S>
  auto row(int64_t r) const {
    using Element = std::conditional_t<std::is_const_v<Void>, const S, S>;
    return static_cast<Element*>(data) + r * row_stride;
  }
  template <class S>
  void read(int64_t r, int64_t n, S* to) const {
    read_strided(dtype, data, r * row_stride, stride, n, to);
  }
  template <class S>
  void write(const S* from, int64_t n, int64_t r) const {
    write_strided(from, n, dtype, data, r * row_stride, stride);
  }
  // `count` rows of n elements from row r on, in one go where nothing lies between them.
  template <class S>
  void read_rows(int64_t r, int64_t count, int64_t n, S* to) const {
    if (stride == 1 && row_stride == n) return read(r, count * n, to);
    for (int64_t i = 0; i < count; ++i) read(r + i, n, to + i * n);
  }
  template <class S>
  void write_rows(const S* from, int64_t count, int64_t n, int64_t r) const {
    if (stride == 1 && row_stride == n) return write(from, count * n, r);
    for (int64_t i = 0; i < count; ++i) write(from + i * n, n, r + i);
  }
};

}  // namespace kalmanet::cpu
