// A caller's rows and columns (kernel_table.hpp) as the kernels read and write them.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.hpp"

#define KALMANET_INLINE inline __attribute__((always_inline))

namespace kalmanet::cpu {

// The first element of token t.
template <class S>
KALMANET_INLINE const S* row_of(const Rows& rows, int64_t t) {
  return static_cast<const S*>(rows.data) + t * rows.token_stride;
}
template <class S>
KALMANET_INLINE S* row_of(const OutRows& rows, int64_t t) {
  return static_cast<S*>(rows.data) + t * rows.token_stride;
}

// Token t's number; where there is no column, `absent`.
template <class S>
KALMANET_INLINE S value_at(const Column& column, int64_t t, S absent) {
  return column.data == nullptr ? absent : static_cast<const S*>(column.data)[t * column.stride];
}
template <class S>
KALMANET_INLINE void set_value(const OutColumn& column, int64_t t, double value) {
  static_cast<S*>(column.data)[t * column.stride] = static_cast<S>(value);
}

}  // namespace kalmanet::cpu
