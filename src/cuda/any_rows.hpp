// Fewer dims than 128, and float16, in the matrix-unit kernels.
//
// Such a kernel is compiled twice. Once for bfloat16 tensors of K = V = 128, of which it then asks
// nothing; and once, its group an AnyRows, for what the job says: K and V multiples of 8 up to 128,
// rows of bfloat16 or float16. That one computes with 128 dims all the same. Those that are missing
// are zeros wherever something is read, and are not written; H is 0 there, what is inverted I, and
// no norm, product or solution knows of them.
#pragma once

#include <type_traits>

#include "cuda/job.hpp"

namespace kalmanet::cuda {

template <class Base>
class AnyRows : public Base {
 public:
  using Base::Base;
};
template <class Group>
inline constexpr bool kAnyRows = false;
template <class Base>
inline constexpr bool kAnyRows<AnyRows<Base>> = true;
template <bool kAny, class Base>
using WithRows = std::conditional_t<kAny, AnyRows<Base>, Base>;

// Which of the two a job takes: f(std::bool_constant).
template <class F>
void with_rows(const GkaJob& job, F&& f) {
  if (job.K == 128 && job.V == 128 && job.q.dtype == DType::bfloat16) {
    f(std::false_type());
  } else {
    f(std::true_type());
  }
}

// Whether so many dims reach so far; a tensor's rows; H's, or U's (`u`).
template <class Group>
KALMANET_KERNEL bool reaches(int64_t dims, int at) {
  return !kAnyRows<Group> || at < dims;
}
template <class Group>
KALMANET_KERNEL bool has_column(const Array& a, int column) {
  return reaches<Group>(a.width, column);
}
template <class Group>
KALMANET_KERNEL bool has_element(const GkaJob& job, bool u, int row, int column) {
  return reaches<Group>(job.K, row) && reaches<Group>(u ? job.V : job.K, column);
}
// Elements of a row that [place][K] has (BackwardJob), and of one of values.
template <class Group>
KALMANET_KERNEL int key_dims(const GkaJob& job) {
  return kAnyRows<Group> ? static_cast<int>(job.K) : 128;
}
template <class Group>
KALMANET_KERNEL int value_dims(const GkaJob& job) {
  return kAnyRows<Group> ? static_cast<int>(job.V) : 128;
}

// Dims that are more than zeros, of keys or of values: products leave the others out.
template <class Group>
KALMANET_KERNEL int most_dims(const GkaJob& job) {
  const int keys = key_dims<Group>(job), values = value_dims<Group>(job);
  return keys > values ? keys : values;
}
// Blocks of 16 rows of what is inverted that are more than I's.
template <class Group>
KALMANET_KERNEL int num_pivots(const GkaJob& job) {
  return (key_dims<Group>(job) + 15) / 16;
}
// What is added to a diagonal before it is inverted: 1, and where no pivot comes the negative
// inverse of that.
template <class Group>
KALMANET_KERNEL float diagonal_one(const GkaJob& job, int row) {
  return reaches<Group>(16 * num_pivots<Group>(job), row) ? 1.0f : -1.0f;
}

// Two neighbours of a tensor's row.
template <class Group>
KALMANET_KERNEL bool is_float16(const Array& a) {
  return kAnyRows<Group> && a.dtype == DType::float16;
}
template <class Group>
KALMANET_KERNEL float low_number(const Array& a, uint32_t both) {
  return is_float16<Group>(a) ? low_float16(both) : low_bfloat16(both);
}
template <class Group>
KALMANET_KERNEL float high_number(const Array& a, uint32_t both) {
  return is_float16<Group>(a) ? high_float16(both) : high_bfloat16(both);
}
template <class Group>
KALMANET_KERNEL uint32_t pack_numbers(const Array& a, float low, float high) {
  return is_float16<Group>(a) ? pack_float16(low, high) : pack_bfloat16(low, high);
}
// A magnitude's bits as those of a bfloat16 (rounded towards 0: infinite where not finite).
template <class Group>
KALMANET_KERNEL uint32_t bfloat16_magnitude(const Array& a, uint32_t bits) {
  return is_float16<Group>(a) ? bits_of(low_float16(bits)) >> 16 : bits;
}

}  // namespace kalmanet::cuda
