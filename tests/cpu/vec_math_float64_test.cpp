// The float64 vector functions of every instruction set against the C library in long double.
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

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSubnormalStep = 0x1p-1074;

// Numbers of every exponent and many of the range in which something happens, from a fixed seed.
std::vector<double> sweep() {
  std::mt19937_64 random(1);
  std::vector<double> x = {0.0, -0.0, 1.0, -1.0, 709.78, -708.39, -744.4, kInfinity, -kInfinity};
  while (x.size() < 200000) {
    const double any = std::bit_cast<double>(random());
    if (!std::isnan(any)) x.push_back(any);
  }
  std::uniform_real_distribution<double> wide(-760.0, 760.0), narrow(-3.0, 3.0);
  for (int i = 0; i < 200000; ++i) x.insert(x.end(), {wide(random), narrow(random)});
  return x;
}

// Of a float64 number as large as `exact`.
double ulp(long double exact) {
  const double a = static_cast<double>(std::abs(exact));
  if (a < std::numeric_limits<double>::min()) return kSubnormalStep;
  return std::ldexp(1.0, std::ilogb(std::min(a, std::numeric_limits<double>::max())) - 52);
}

long double sigmoid(long double x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

using Function = void (*)(const double*, double*, int64_t);

std::vector<double> evaluate(Function f, const std::vector<double>& x) {
  std::vector<double> y(x.size() + 16, -7.0);  // what lies behind must stay
  f(x.data(), y.data(), std::ssize(x));
  for (size_t i = x.size(); i < y.size(); ++i) EXPECT_EQ(y[i], -7.0) << "wrote past the end";
  y.resize(x.size());
  return y;
}

// The worst error over the sweep in units of scale(x, exact).
template <class Exact, class Scale>
void check_sweep(const char* what, Function f, double bound, Exact exact, Scale scale) {
  const std::vector<double> x = sweep();
  const std::vector<double> y = evaluate(f, x);
  double worst = 0, worst_at = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double e = exact(static_cast<long double>(x[i]));
    double error;
    if (std::isnan(e)) {
      error = std::isnan(y[i]) ? 0 : kInfinity;
    } else if (static_cast<double>(e) == y[i]) {
      error = 0;
    } else if (std::isinf(y[i])) {
      error = std::abs(e) > std::numeric_limits<double>::max() ? 0 : kInfinity;
    } else {
      error = static_cast<double>(std::abs(y[i] - e)) / scale(x[i], e);
    }
    if (!(error <= worst)) {
      worst = error;
      worst_at = x[i];
    }
  }
  EXPECT_LE(worst, bound) << what << ": error in ulp at x = " << worst_at;
  ::testing::Test::RecordProperty(std::string(what) + "_" + name(instruction_set()) + "_ulp",
                                  std::to_string(worst));
}

TEST(VecMathFloat64, ExpWithinTwoUlp) {
  for_each_instruction_set([] {
    check_sweep(
        "exp", cpu::kernels().norm_float64.math.exp, 2.0, [](long double x) { return std::exp(x); },
        [](double, long double e) { return ulp(e); });
  });
}

TEST(VecMathFloat64, ExpSaturates) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> x = {709.79, 1e4, kInfinity, -745.14, -1e300, -kInfinity, nan, -nan};
  for_each_instruction_set([&] {
    const std::vector<double> y = evaluate(cpu::kernels().norm_float64.math.exp, x);
    for (size_t i : {0, 1, 2}) EXPECT_EQ(y[i], kInfinity) << "exp(" << x[i] << ")";
    for (size_t i : {3, 4, 5}) EXPECT_EQ(y[i], 0.0) << "exp(" << x[i] << ")";
    for (size_t i : {6, 7}) EXPECT_TRUE(std::isnan(y[i])) << "exp(NaN) = " << y[i];
  });
}

TEST(VecMathFloat64, SigmoidWithinThreeUlp) {
  for_each_instruction_set([] {
    check_sweep("sigmoid", cpu::kernels().norm_float64.math.sigmoid, 3.0, sigmoid,
                [](double, long double e) { return ulp(e); });
  });
}

// A subnormal sigmoid is right to half a subnormal step, and is multiplied by x.
double lost_to_subnormals(double x) {
  return std::abs(x) < 800 ? std::abs(x) * kSubnormalStep : 0;
}

TEST(VecMathFloat64, SiluWithinFourUlp) {
  for_each_instruction_set([] {
    check_sweep(
        "silu", cpu::kernels().norm_float64.math.silu, 4.0,
        [](long double x) { return x * sigmoid(x); },
        [](double x, long double e) { return ulp(e) + lost_to_subnormals(x); });
  });
}

// 1 + x (1 - s) cancels near x = -1.28: the error is measured against the two terms' sizes.
TEST(VecMathFloat64, SiluDerivativeWithinSixUlp) {
  for_each_instruction_set([] {
    check_sweep(
        "silu_derivative", cpu::kernels().norm_float64.math.silu_derivative, 6.0,
        [](long double x) { return sigmoid(x) * (1 + x * sigmoid(-x)); },
        [](double x, long double) {
          return ulp(sigmoid(x) * (1 + std::abs(x) * sigmoid(-x))) + lost_to_subnormals(x);
        });
  });
}

TEST(VecMathFloat64, ShortArraysOfEveryLength) {
  for_each_instruction_set([] {
    for (size_t n = 0; n <= 17; ++n) {
      std::vector<double> x(n);
      for (size_t i = 0; i < n; ++i) x[i] = 0.25 * static_cast<double>(i) - 3.0;
      const std::vector<double> y = evaluate(cpu::kernels().norm_float64.math.exp, x);
      for (size_t i = 0; i < n; ++i) {
        EXPECT_NEAR(y[i], std::exp(x[i]), 4e-16 * std::exp(x[i])) << "n = " << n << ", i = " << i;
      }
    }
  });
}

}  // namespace
}  // namespace kalmanet
