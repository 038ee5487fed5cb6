// GoogleTest assertions on tensors whose failures say operation, problem, instruction set, error
// and bound.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "kalmanet/gka.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

// What is being compared: "gka_forward", "avx2", describe(spec).
struct Where {
  std::string operation;
  std::string instruction_set;  // empty: does not matter
  std::string problem;
};

inline std::string text(const Where& where, const std::string& tensor) {
  std::ostringstream out;
  out << where.operation << " " << tensor;
  if (!where.instruction_set.empty()) out << " [" << where.instruction_set << "]";
  out << ", " << where.problem;
  return out.str();
}

// Relative error of `got` against `expected` at most `bound`: EXPECT_TRUE(within(...)).
inline ::testing::AssertionResult within(const Where& where, const std::string& tensor,
                                         const std::vector<double>& got,
                                         const std::vector<double>& expected, double bound) {
  const double error = relative_error(got, expected);
  if (error <= bound) return ::testing::AssertionSuccess();
  std::ostringstream out;
  out << text(where, tensor) << ": relative error " << error << " > bound " << bound;
  if (got.size() != expected.size()) {
    out << "; " << got.size() << " elements, expected " << expected.size();
  } else if (!got.empty()) {
    size_t worst = 0;
    const auto distance = [&](size_t i) {
      const double d = std::abs(got[i] - expected[i]);
      return std::isnan(d) ? INFINITY : d;
    };
    for (size_t i = 1; i < got.size(); ++i) {
      if (distance(i) > distance(worst)) worst = i;
    }
    out << "; worst at element " << worst << ": " << got[worst] << ", expected " << expected[worst];
  }
  return ::testing::AssertionFailure() << out.str();
}
inline ::testing::AssertionResult within(const Where& where, const std::string& tensor,
                                         const ConstView& got, const ConstView& expected,
                                         double bound) {
  return within(where, tensor, values(got), values(expected), bound);
}

// The same numbers, bit for bit (NaN included, as long as it has the same bits).
inline ::testing::AssertionResult identical(const Where& where, const std::string& tensor,
                                            const ConstView& got, const ConstView& expected) {
  const std::vector<double> a = values(got), b = values(expected);
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure()
           << text(where, tensor) << ": " << a.size() << " elements, expected " << b.size();
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(double)) != 0) {
      return ::testing::AssertionFailure() << text(where, tensor) << ": element " << i << " is "
                                           << a[i] << ", expected exactly " << b[i];
    }
  }
  return ::testing::AssertionSuccess();
}

// The worst error a tensor had over many problems, to print at the end of a test.
class WorstErrors {
 public:
  void add(const std::string& tensor, double error) {
    double& worst = worst_[tensor];
    worst = std::max(worst, error);
  }
  void print(const char* title) const {
    std::printf("%s\n", title);
    for (const auto& [tensor, error] : worst_) std::printf("  %-16s %.2e\n", tensor.c_str(), error);
    std::fflush(stdout);
  }
  double worst() const {
    double w = 0;
    for (const auto& [tensor, error] : worst_) w = std::max(w, error);
    return w;
  }

 private:
  std::map<std::string, double> worst_;
};

// The named tensors of two Cases side by side, absent ones left out: f(name, got, expected).
template <class A, class GA, class B, class GB, class F>
void for_each_output(const Case<A, GA>& got, const Case<B, GB>& expected, F&& f) {
  f("o", got.o.view(), expected.o.view());
  f("h_final", got.h_final.view(), expected.h_final.view());
  f("u_final", got.u_final.view(), expected.u_final.view());
}
template <class A, class GA, class B, class GB, class F>
void for_each_gradient(const Case<A, GA>& got, const Case<B, GB>& expected, F&& f) {
  const auto call = [&](const char* tensor, const auto& a, const auto& b) {
    if (a.defined()) f(tensor, a.view(), b.view());
  };
  call("dq", got.dq, expected.dq);
  call("dk", got.dk, expected.dk);
  call("dv", got.dv, expected.dv);
  call("dg", got.dg, expected.dg);
  call("dgk", got.dgk, expected.dgk);
  call("dalpha", got.dalpha, expected.dalpha);
  call("dbeta", got.dbeta, expected.dbeta);
  call("d_ridge_ratio", got.d_ridge_ratio, expected.d_ridge_ratio);
  call("d_h0", got.d_h0, expected.d_h0);
  call("d_u0", got.d_u0, expected.d_u0);
}

}  // namespace kalmanet::testing
