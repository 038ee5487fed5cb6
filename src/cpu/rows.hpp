// A caller's rows and columns (kernel_table.hpp) as the kernels read and write them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/half.hpp"
#include "cpu/convert.hpp"
#include "cpu/kernel_table.hpp"
#include "kalmanet/gka.hpp"

#define KALMANET_INLINE inline __attribute__((always_inline))

namespace kalmanet::cpu {

// Element c of a row is data[c * stride].
template <class S>
struct RowOf {
  const S* data;
  int64_t stride;
};

// `width` elements of token t's row in the kernels' storage type: where they lie if they are of it,
// else converted into `room`.
template <class Vec, class S>
KALMANET_INLINE RowOf<S> read_row(const Rows& rows, int64_t t, int64_t width, S* room) {
  const int64_t at = t * rows.token_stride;
  if constexpr (std::is_same_v<S, float>) {
    if (rows.dtype != DType::float32) {
      const auto* from = static_cast<const uint16_t*>(rows.data) + at;
      load_halves<Vec>(rows.dtype, from, rows.stride, width, room);
      return {room, 1};
    }
  }
  return {static_cast<const S*>(rows.data) + at, rows.stride};
}

// Whether the rows hold numbers of the storage type: then they are written where they lie.
template <class S>
KALMANET_INLINE bool holds(const OutRows& rows) {
  return rows.dtype == DTypeOf<S>::value;
}
template <class S>
KALMANET_INLINE S* row_of(const OutRows& rows, int64_t t) {
  return static_cast<S*>(rows.data) + t * rows.token_stride;
}

// Token t's row of any other dtype <- `width` adjacent numbers, rounded once. (What is added up
// over heads is added up in the storage type, so `accumulate` is not for these: gka_backward.cpp.)
template <class Vec, class S>
KALMANET_INLINE void write_row(const OutRows& rows, int64_t t, int64_t width, const S* from) {
  if constexpr (std::is_same_v<S, float>) {
    auto* to = static_cast<uint16_t*>(rows.data) + t * rows.token_stride;
    store_halves<Vec>(rows.dtype, from, width, to, rows.stride);
  }
}

// Token t's number; where there is no column, `absent`.
template <class S>
KALMANET_INLINE S value_at(const Column& column, int64_t t, S absent) {
  if (column.data == nullptr) return absent;
  if constexpr (std::is_same_v<S, float>) {
    if (column.dtype != DType::float32) {
      return core::load_float(column.dtype, column.data, t * column.stride);
    }
  }
  return static_cast<const S*>(column.data)[t * column.stride];
}
template <class S>
KALMANET_INLINE void set_value(const OutColumn& column, int64_t t, double value) {
  if (column.dtype == DTypeOf<S>::value) {
    static_cast<S*>(column.data)[t * column.stride] = static_cast<S>(value);
  } else {
    core::store_element(column.dtype, column.data, t * column.stride, value);
  }
}

}  // namespace kalmanet::cpu
