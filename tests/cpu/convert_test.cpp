// Rows of 16-bit numbers of every instruction set against the plain conversions (core/half.hpp),
// bit for bit.
#include "cpu/convert.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "core/half.hpp"
#include "cpu/arrays.hpp"
#include "cpu/dispatch.hpp"

namespace kalmanet {
namespace {

using testing::for_each_instruction_set;

constexpr DType kHalves[] = {DType::bfloat16, DType::float16};

uint16_t plain(DType dtype, float value) {
  return dtype == DType::bfloat16 ? core::to_bfloat16(value) : core::to_float16(value);
}

// Every 1009th float32, and the ties between all neighbours with the float32 beside them.
std::vector<float> sweep(DType dtype) {
  std::vector<float> x;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1009) {
    x.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  for (uint32_t i = 0; i < 65535; ++i) {
    const uint16_t two[] = {static_cast<uint16_t>(i), static_cast<uint16_t>(i + 1)};
    const double low = core::load_float(dtype, two, 0), high = core::load_float(dtype, two, 1);
    const auto middle = static_cast<float>((low + high) / 2);
    x.insert(x.end(), {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e38f)});
  }
  return x;
}

TEST(Convert, EveryNumberIsLoaded) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for_each_instruction_set([&] {
    for (DType dtype : kHalves) {
      std::vector<float> got(all.size());
      cpu::kernels().convert.load(dtype, all.data(), 1, std::ssize(all), got.data());
      for (size_t i = 0; i < all.size(); ++i) {
        const float expected = core::load_float(dtype, all.data(), static_cast<int64_t>(i));
        ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(expected))
            << name(dtype) << " " << i << ": " << got[i] << ", expected " << expected;
      }
    }
  });
}

TEST(Convert, AllOfFloat32IsStored) {
  for (DType dtype : kHalves) {
    const std::vector<float> x = sweep(dtype);
    for_each_instruction_set([&] {
      std::vector<uint16_t> got(x.size());
      cpu::kernels().convert.store(dtype, x.data(), std::ssize(x), got.data(), 1);
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(got[i], plain(dtype, x[i])) << name(dtype) << " of " << x[i];
      }
    });
  }
}

// Lengths around every register width, strides of every kind; what lies between is not touched.
TEST(Convert, AnyLengthAndStride) {
  constexpr int64_t kLongest = 40;
  constexpr uint16_t kGap = 0x1234;
  for_each_instruction_set([&] {
    const cpu::ConvertKernels& convert = cpu::kernels().convert;
    for (DType dtype : kHalves) {
      for (int64_t n = 0; n <= kLongest; ++n) {
        for (int64_t stride : {1, 2, 5, -1, -3}) {
          const int64_t reach = kLongest * std::abs(stride);
          std::vector<uint16_t> memory(static_cast<size_t>(2 * reach + 1), kGap);
          uint16_t* const base = memory.data() + reach;
          std::vector<float> from(static_cast<size_t>(n)), back(static_cast<size_t>(n) + 16, -7.0f);
          for (int64_t i = 0; i < n; ++i) {
            from[static_cast<size_t>(i)] = 0.3f * static_cast<float>(i) - 2.1f;
          }
          convert.store(dtype, from.data(), n, base, stride);
          convert.load(dtype, base, stride, n, back.data());
          for (int64_t i = 0; i < n; ++i) {
            const uint16_t expected = plain(dtype, from[static_cast<size_t>(i)]);
            ASSERT_EQ(base[i * stride], expected) << name(dtype) << " n=" << n << " i=" << i;
            ASSERT_EQ(back[static_cast<size_t>(i)], core::load_float(dtype, &expected, 0));
            base[i * stride] = kGap;
          }
          EXPECT_EQ(std::count(memory.begin(), memory.end(), kGap), std::ssize(memory))
              << name(dtype) << " n=" << n << " stride=" << stride << ": wrote between";
          EXPECT_EQ(std::count(back.begin() + n, back.end(), -7.0f), 16)
              << name(dtype) << " n=" << n << " stride=" << stride << ": wrote past the end";
        }
      }
    }
  });
}

}  // namespace
}  // namespace kalmanet
