// The plain conversions of 16-bit numbers against the formats' definition (support/dtypes.hpp):
// every number there is, every tie, and a sweep over all of float32.
#include "core/half.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "support/dtypes.hpp"

namespace kalmanet {
namespace {

using testing::BFloat16;
using testing::Float16;

template <class T>
float from(uint16_t bits) {
  return std::is_same_v<T, BFloat16> ? core::from_bfloat16(bits) : core::from_float16(bits);
}
template <class T>
uint16_t to(float value) {
  return std::is_same_v<T, BFloat16> ? core::to_bfloat16(value) : core::to_float16(value);
}

// The bits of `value` rounded, expected and got; failures name both.
template <class T>
void expect_rounded(float value) {
  const uint16_t expected = T(value).bits(), got = to<T>(value);
  EXPECT_EQ(got, expected) << name(DTypeOf<T>::value) << " of " << value << " (" << std::hexfloat
                           << value << ")";
}

template <class T>
class HalfTest : public ::testing::Test {};
using Halves = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(HalfTest, Halves);

TYPED_TEST(HalfTest, EveryNumberThereAndBack) {
  using T = TypeParam;
  constexpr uint16_t kQuiet = std::is_same_v<T, BFloat16> ? 0x40 : 0x200;
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const double expected = T::from_bits(bits);
    const float got = from<T>(bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << i;
      ASSERT_EQ(std::signbit(got), bits >= 0x8000) << i;
      ASSERT_EQ(to<T>(got), bits | kQuiet) << i;
    } else {
      ASSERT_EQ(got, expected) << i;
      ASSERT_EQ(std::signbit(got), bits >= 0x8000) << i;
      ASSERT_EQ(to<T>(got), bits) << i;
    }
  }
}

// Between each two neighbours: the middle, exactly a float32, and the float32 on either side of it.
TYPED_TEST(HalfTest, EveryTie) {
  using T = TypeParam;
  for (uint32_t i = 0; i < 65535; ++i) {
    const T low = T::from_bits(static_cast<uint16_t>(i));
    const T high = T::from_bits(static_cast<uint16_t>(i + 1));
    if (!std::isfinite(double{low}) || std::isnan(double{high})) continue;
    // Beyond the largest number the next one would be as far away as the one before it.
    const double step = double{low} - double{T::from_bits(static_cast<uint16_t>(i - 1))};
    const double above = std::isinf(double{high}) ? double{low} + step : double{high};
    const auto middle = static_cast<float>((double{low} + above) / 2);
    for (float f : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 2 * middle)}) {
      expect_rounded<T>(f);
    }
    if (this->HasFailure()) return;
  }
}

TYPED_TEST(HalfTest, SweepOverFloat32) {
  using T = TypeParam;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1009) {
    const float f = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (std::isnan(f)) {
      ASSERT_TRUE(std::isnan(double{T::from_bits(to<T>(f))})) << bits;
      ASSERT_EQ(to<T>(f) >> 15, bits >> 31) << bits;
    } else {
      expect_rounded<T>(f);
    }
    if (this->HasFailure()) return;
  }
}

TYPED_TEST(HalfTest, EndsOfTheRange) {
  using T = TypeParam;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (float f :
       {0.0f,         kInfinity,  65504.0f,        65519.996f,      65520.0f,        65536.0f,
        1e30f,        3.3895e38f, 0x1.fefffep127f, 0x1.ffp127f,     0x1.fffffep127f, 0x1p-14f,
        0x1.ffcp-15f, 0x1p-24f,   0x1p-25f,        0x1.000002p-25f, 0x1.8p-24f,      0x1p-126f,
        0x1p-133f,    0x1p-134f,  0x1.8p-133f,     0x1p-149f}) {
    expect_rounded<T>(f);
    expect_rounded<T>(-f);
  }
}

// float64 results are rounded once: just beside a tie, where going by way of float32 would make
// them one.
TYPED_TEST(HalfTest, FromFloat64Once) {
  using T = TypeParam;
  const auto expect = [](double value) {
    uint16_t got = 0;
    core::store_element(DTypeOf<T>::value, &got, 0, value);
    EXPECT_EQ(got, T(value).bits()) << std::hexfloat << value;
  };
  for (uint32_t i = 0; i < 65535; i += 7) {
    const double low = T::from_bits(static_cast<uint16_t>(i));
    const double high = T::from_bits(static_cast<uint16_t>(i + 1));
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const double middle = (low + high) / 2;
    for (double value :
         {low, middle, middle * (1 - 0x1p-40), middle * (1 + 0x1p-40), low + (high - low) * 0.3}) {
      expect(value);
    }
    if (this->HasFailure()) return;
  }
  for (double value : {1e300, -1e300, 1e-300, -1e-300, 0.0, -0.0, 65519.999999999, 65520.0,
                       std::numeric_limits<double>::infinity(), 5e-324}) {
    expect(value);
  }
  uint16_t nan = 0;
  core::store_element(DTypeOf<T>::value, &nan, 0, std::numeric_limits<double>::quiet_NaN());
  EXPECT_TRUE(std::isnan(double{T::from_bits(nan)}));
}

TEST(Elements, OfEveryDtypeByIndex) {
  testing::for_each_dtype([]<class T>(T) {
    T array[3] = {T(1.5), T(-0.375), T(8)};
    const DType dtype = DTypeOf<T>::value;
    EXPECT_EQ(core::load_element(dtype, array, 1), -0.375) << name(dtype);
    core::store_element(dtype, array, 2, -96);
    EXPECT_EQ(static_cast<double>(array[2]), -96) << name(dtype);
    EXPECT_EQ(static_cast<double>(array[0]), 1.5) << name(dtype);
    EXPECT_EQ(core::load_float(dtype, array, 0), 1.5f) << name(dtype);
    EXPECT_EQ(core::is_half(dtype), sizeof(T) == 2) << name(dtype);
  });
}

}  // namespace
}  // namespace kalmanet
