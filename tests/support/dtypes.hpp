// The dtypes as C++ types: float, double, and two 16-bit types of the tests' own, converted by the
// formats' definition in float64 arithmetic. Nothing here is shared with the library's conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kalmanet/tensor.hpp"

namespace kalmanet::testing {

// A sign, kExponent bits of exponent, kFraction of fraction, as IEEE 754 has them.
template <int kExponent, int kFraction>
class Half {
 public:
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kSpecial = (1 << kExponent) - 1;  // the exponent of infinity and NaN

  Half() = default;
  explicit Half(double value) : bits_(round(value)) {}
  static Half from_bits(uint16_t bits) {
    Half h;
    h.bits_ = bits;
    return h;
  }
  uint16_t bits() const { return bits_; }

  operator double() const {  // NOLINT(google-explicit-constructor): exact
    const int exponent = (bits_ >> kFraction) & kSpecial;
    const int fraction = bits_ & ((1 << kFraction) - 1);
    const double sign = (bits_ >> 15) != 0 ? -1.0 : 1.0;
    if (exponent == kSpecial) {
      const double infinity = std::numeric_limits<double>::infinity();
      return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * infinity;
    }
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - kBias - kFraction);
    return sign * std::ldexp((1 << kFraction) + fraction, exponent - kBias - kFraction);
  }

 private:
  static uint16_t round(double value) {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) {
      return static_cast<uint16_t>(sign | (kSpecial << kFraction) | (1 << (kFraction - 1)));
    }
    const double magnitude = std::abs(value);
    // The distance of the numbers around it: by its exponent, which is at least the smallest.
    int exponent = magnitude == 0 || std::isinf(magnitude) ? 1 - kBias : std::ilogb(magnitude);
    exponent = exponent < 1 - kBias ? 1 - kBias : exponent;
    const double step = std::ldexp(1.0, exponent - kFraction);
    const double count = std::nearbyint(magnitude / step);  // ties to even; exact otherwise
    const double largest = std::ldexp(2.0 - std::ldexp(1.0, -kFraction), kBias);
    if (!(count * step <= largest)) return static_cast<uint16_t>(sign | (kSpecial << kFraction));
    // Numbers in a row have bits in a row.
    const int bits = ((exponent + kBias - 1) << kFraction) + static_cast<int>(count);
    return static_cast<uint16_t>(sign | bits);
  }

  uint16_t bits_ = 0;
};

using BFloat16 = Half<8, 7>;
using Float16 = Half<5, 10>;

template <class T>
inline constexpr bool kIsHalf = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

// Half the distance from 1 to the next number.
template <class T>
inline constexpr double kRoundoff = std::is_same_v<T, double>    ? 0x1p-53
                                    : std::is_same_v<T, float>   ? 0x1p-24
                                    : std::is_same_v<T, Float16> ? 0x1p-11
                                                                 : 0x1p-8;

// What states are kept in beside tensors of T.
template <class T>
using StateOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(T()) for each dtype.
template <class F>
void for_each_dtype(F&& f) {
  f(float());
  f(double());
  f(BFloat16());
  f(Float16());
}

}  // namespace kalmanet::testing

namespace kalmanet {
template <>
struct DTypeOf<testing::BFloat16> {
  static constexpr DType value = DType::bfloat16;
};
template <>
struct DTypeOf<testing::Float16> {
  static constexpr DType value = DType::float16;
};
}  // namespace kalmanet

template <int kExponent, int kFraction>
struct std::numeric_limits<kalmanet::testing::Half<kExponent, kFraction>> {
  static kalmanet::testing::Half<kExponent, kFraction> quiet_NaN() {
    return kalmanet::testing::Half<kExponent, kFraction>(std::numeric_limits<double>::quiet_NaN());
  }
};
