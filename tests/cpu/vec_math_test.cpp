// The vector functions of every instruction set against the C library in float64.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cpu/arrays.hpp"
#include "cpu/dispatch.hpp"

namespace kalmanet {
namespace {

using testing::for_each_instruction_set;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kSmallestNormal = std::numeric_limits<float>::min();
constexpr double kLargest = std::numeric_limits<float>::max();
constexpr double kSubnormalStep = 0x1p-149;

// Every 1009th float (a prime: all exponents, varied mantissas, both signs) and every 211th of
// those with 2^-4 <= |x| < 128, where something happens. 1.9 million numbers without the NaNs.
std::vector<float> sweep() {
  std::vector<float> x;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1009) {
    const float f = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (!std::isnan(f)) x.push_back(f);
  }
  const uint32_t first = std::bit_cast<uint32_t>(0x1p-4f), last = std::bit_cast<uint32_t>(128.0f);
  for (uint32_t bits = first; bits < last; bits += 211) {
    x.push_back(std::bit_cast<float>(bits));
    x.push_back(-x.back());
  }
  for (float special : {0.0f, -0.0f, 1.0f, -1.0f, kInfinity, -kInfinity}) x.push_back(special);
  return x;
}

// Of a float32 number as large as `exact`.
double ulp(double exact) {
  const double a = std::abs(exact);
  if (a < kSmallestNormal) return kSubnormalStep;
  return std::ldexp(1.0, std::ilogb(std::min(a, kLargest)) - 23);
}

double sigmoid(double x) {
  return x < 0 ? std::exp(x) / (1.0 + std::exp(x)) : 1.0 / (1.0 + std::exp(-x));
}

using Function = void (*)(const float*, float*, int64_t);

std::vector<float> evaluate(Function f, const std::vector<float>& x) {
  // Behind the last element a number that must stay: the length is no multiple of any vector's.
  std::vector<float> y(x.size() + 16, -7.0f);
  f(x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = x.size(); i < y.size(); ++i) EXPECT_EQ(y[i], -7.0f) << "wrote past the end";
  y.resize(x.size());
  return y;
}

// The worst error over the sweep in units of scale(x, exact).
template <class Exact, class Scale>
void check_sweep(const char* what, Function f, double bound, Exact exact, Scale scale) {
  const std::vector<float> x = sweep();
  const std::vector<float> y = evaluate(f, x);
  double worst = 0;
  float worst_at = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double e = exact(static_cast<double>(x[i]));
    double error;
    if (std::isnan(e)) {
      error = std::isnan(y[i]) ? 0 : std::numeric_limits<double>::infinity();
    } else if (e == y[i]) {
      error = 0;
    } else if (std::isinf(y[i])) {
      // Rounded to infinity: right where float32 has no number within the bound.
      error = std::abs(e) > kLargest - bound * ulp(kLargest)
                  ? 0
                  : std::numeric_limits<double>::infinity();
    } else {
      error = std::abs(y[i] - e) / scale(static_cast<double>(x[i]), e);
    }
    if (!(error <= worst)) {
      worst = error;
      worst_at = x[i];
    }
    if (std::isnan(worst)) break;
  }
  EXPECT_TRUE(worst <= bound) << what << ": error " << worst << " ulp at x = " << worst_at << " ("
                              << std::hexfloat << worst_at << "), bound " << std::defaultfloat
                              << bound;
  ::testing::Test::RecordProperty(std::string(what) + "_" + name(instruction_set()) + "_ulp",
                                  std::to_string(worst));
}

TEST(VecMath, ExpWithinTwoUlp) {
  for_each_instruction_set([] {
    check_sweep(
        "exp", cpu::kernels().norm.math.exp, 2.0, [](double x) { return std::exp(x); },
        [](double, double e) { return ulp(e); });
  });
}

TEST(VecMath, ExpSaturates) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> x = {89.0f,      1e4f,    kInfinity, -104.0f,    -1e4f,
                                -kInfinity, 3.4e38f, -3.4e38f,  nan,        -nan,
                                0.0f,       -0.0f,   88.72283f, -87.33655f, 1e-45f};
  for_each_instruction_set([&] {
    const std::vector<float> y = evaluate(cpu::kernels().norm.math.exp, x);
    for (size_t i : {0, 1, 2, 6}) EXPECT_EQ(y[i], kInfinity) << "exp(" << x[i] << ")";
    for (size_t i : {3, 4, 5, 7}) EXPECT_EQ(y[i], 0.0f) << "exp(" << x[i] << ")";
    for (size_t i : {8, 9}) EXPECT_TRUE(std::isnan(y[i])) << "exp(NaN) = " << y[i];
    for (size_t i : {10, 11, 14}) EXPECT_EQ(y[i], 1.0f) << "exp(" << x[i] << ")";
    EXPECT_TRUE(std::isfinite(y[12]) && y[12] > 3.4e38f) << "exp(" << x[12] << ") = " << y[12];
    EXPECT_GE(y[13], 1.17e-38f) << "exp(" << x[13] << ")";
  });
}

TEST(VecMath, SigmoidWithinThreeUlp) {
  for_each_instruction_set([] {
    check_sweep("sigmoid", cpu::kernels().norm.math.sigmoid, 3.0, sigmoid,
                [](double, double e) { return ulp(e); });
  });
}

// A subnormal sigmoid is right to half a subnormal step, and is multiplied by x.
double lost_to_subnormals(double x) {
  return std::abs(x) < 200 ? std::abs(x) * kSubnormalStep : 0;
}

TEST(VecMath, SiluWithinFourUlp) {
  for_each_instruction_set([] {
    check_sweep(
        "silu", cpu::kernels().norm.math.silu, 4.0, [](double x) { return x * sigmoid(x); },
        [](double x, double e) { return ulp(e) + lost_to_subnormals(x); });
  });
}

// 1 + x (1 - s) cancels near x = -1.28: the error is measured against the two terms' sizes.
TEST(VecMath, SiluDerivativeWithinSixUlp) {
  for_each_instruction_set([] {
    check_sweep(
        "silu_derivative", cpu::kernels().norm.math.silu_derivative, 6.0,
        [](double x) { return sigmoid(x) * (1.0 + x * sigmoid(-x)); },
        [](double x, double) {
          return ulp(sigmoid(x) * (1.0 + std::abs(x) * sigmoid(-x))) + lost_to_subnormals(x);
        });
  });
}

TEST(VecMath, ShortArraysOfEveryLength) {
  for_each_instruction_set([] {
    for (size_t n = 0; n <= 33; ++n) {
      std::vector<float> x(n);
      for (size_t i = 0; i < n; ++i) x[i] = 0.25f * static_cast<float>(i) - 3.0f;
      const std::vector<float> y = evaluate(cpu::kernels().norm.math.exp, x);
      for (size_t i = 0; i < n; ++i) {
        EXPECT_NEAR(y[i], std::exp(x[i]), 2e-7 * std::exp(x[i])) << "n = " << n << ", i = " << i;
      }
    }
  });
}

}  // namespace
}  // namespace kalmanet
