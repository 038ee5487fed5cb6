// The gradients of the `exact` oracle against central finite differences of its forward, in
// float64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "reference/run.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

constexpr double kBound = 1e-6;

double inner(const Tensor<double>& a, const Tensor<double>& b) {
  const std::vector<double> x = a.values(), y = b.values();
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// loss = <d_o, o> + <d_h_final, h_final> + <d_u_final, u_final>
double loss(Case<double>& c, const GkaOptions& options) {
  run_forward<double>(c, options);
  return inner(c.d_o, c.o) + inner(c.d_h_final, c.h_final) + inner(c.d_u_final, c.u_final);
}

// A fourth-order central difference along one direction, for variables of size about `size`: at a
// step of 1e-3 of it, truncation is of the order of 1e-12 and rounding, divided by the step, of
// 1e-13.
double derivative(Case<double>& c, const GkaOptions& options,
                  const std::function<void(double)>& move, double size = 1) {
  const double step = 1e-3 * size;
  const auto at = [&](double offset) {
    move(offset);
    const double value = loss(c, options);
    move(-offset);
    return value;
  };
  return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step);
}

struct Variable {
  const char* tensor;
  Tensor<double>* value;
  Tensor<double>* gradient;
  bool symmetric = false;  // h0: only symmetric moves keep it a state
};

std::vector<Variable> variables(Case<double>& c) {
  std::vector<Variable> all = {
      {"q", &c.q, &c.dq},           {"k", &c.k, &c.dk},
      {"v", &c.v, &c.dv},           {"g", &c.g, &c.dg},
      {"gk", &c.gk, &c.dgk},        {"alpha", &c.alpha, &c.dalpha},
      {"beta", &c.beta, &c.dbeta},  {"ridge_ratio", &c.ridge_ratio, &c.d_ridge_ratio},
      {"h0", &c.h0, &c.d_h0, true}, {"u0", &c.u0, &c.d_u0}};
  std::erase_if(all, [](const Variable& v) { return !v.value->defined(); });
  return all;
}

// Relative difference |gradient - finite difference| / |finite difference| of every input tensor,
// element by element (pairs of mirrored elements for h0).
void check_gradients(CaseSpec spec, const GkaOptions& base, WorstErrors& table) {
  Case<double> c(spec);
  GkaOptions options = base;
  options.ridge_ratio = spec.ridge_ratio;
  options.solver = Solver::direct;
  run_backward<double>(c, options);
  for (const Variable& variable : variables(c)) {
    const std::vector<double> gradient = variable.gradient->values();
    const int64_t K = spec.K;
    std::vector<double> expected, got;
    for (int64_t i = 0; i < std::ssize(gradient); ++i) {
      int64_t mirror = i;
      if (variable.symmetric) {
        const int64_t row = i / K % K, column = i % K;
        if (row < column) continue;
        mirror = i + (column - row) * K + (row - column);
      }
      expected.push_back(derivative(
          c, options,
          [&](double offset) {
            (*variable.value)[i] += offset;
            if (mirror != i) (*variable.value)[mirror] += offset;
          },
          variable.value == &c.ridge_ratio ? spec.ridge_ratio : 1));
      got.push_back(gradient[i] + (mirror != i ? gradient[mirror] : 0.0));
    }
    const double error = relative_error(got, expected);
    table.add(variable.tensor, error);
    double norm = 0;
    for (double e : expected) norm += e * e;
    EXPECT_GT(norm, 0) << variable.tensor << " has no influence: " << describe(spec);
    EXPECT_TRUE(within({"exact oracle's gradient", "", describe(spec)}, variable.tensor, got,
                       expected, kBound));
  }
}

CaseSpec everything() {
  CaseSpec spec;
  spec.T = 7;
  spec.H = 2;
  spec.K = 4;
  spec.V = 3;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.ridge_tensor = spec.h0 = spec.u0 = true;
  spec.memory = 4;
  return spec;
}

// What must be shown, item 1: run with
//   reference_test --gtest_filter='ExactGradients.*'
TEST(ExactGradients, MatchFiniteDifferences) {
  WorstErrors table;
  for (double ridge_ratio : {0.1, 0.02, 0.005}) {
    for (uint64_t seed : {1, 2, 3}) {
      CaseSpec spec = everything();
      spec.ridge_ratio = ridge_ratio;
      spec.seed = seed;
      check_gradients(spec, {}, table);
    }
  }
  table.print(
      "exact oracle, float64: worst relative difference from central finite differences\n"
      "(ridge ratios 0.1, 0.02, 0.005, seeds 1, 2, 3; loss through o and both final states)");
  std::printf("  worst of all     %.2e (bound %.0e)\n", table.worst(), kBound);
  EXPECT_LE(table.worst(), kBound);
}

TEST(ExactGradients, HeadGroupsPackedStridedAndEachOptionAbsent) {
  WorstErrors table;
  CaseSpec grouped = everything();
  grouped.H = 4;
  grouped.Hk = 2;
  grouped.Hv = 1;
  grouped.T = 4;
  check_gradients(grouped, {}, table);

  CaseSpec packed = everything();
  packed.lengths = {3, 0, 1, 4};
  packed.strided = true;
  check_gradients(packed, {}, table);

  for (bool CaseSpec::* option : {&CaseSpec::g, &CaseSpec::gk, &CaseSpec::alpha, &CaseSpec::beta,
                                  &CaseSpec::ridge_tensor, &CaseSpec::h0, &CaseSpec::u0}) {
    CaseSpec spec = everything();
    spec.H = 1;
    spec.T = 5;
    spec.*option = false;
    check_gradients(spec, {}, table);
  }
  table.print("head groups, packed and strided, single options absent:");
}

// One tensor that gates both states: its gradient is the sum of the two.
TEST(ExactGradients, OneTensorForBothGates) {
  CaseSpec spec = everything();
  spec.same_gate = true;
  Case<double> c(spec);
  GkaOptions options;
  options.solver = Solver::direct;
  run_backward<double>(c, options);
  const std::vector<double> dg = c.dg.values(), dgk = c.dgk.values();
  for (int64_t i = 0; i < std::ssize(dg); ++i) {
    const double expected = derivative(c, options, [&](double offset) { c.g[i] += offset; });
    EXPECT_NEAR(dg[i] + dgk[i], expected, 1e-7 * (1 + std::abs(expected))) << "element " << i;
  }
}

// The scalar ridge ratio's gradient is the sum over tokens.
TEST(ExactGradients, ScalarRidgeRatio) {
  CaseSpec spec = everything();
  spec.ridge_tensor = false;
  Case<double> c(spec);
  GkaOptions options;
  options.solver = Solver::direct;
  run_backward<double>(c, options);
  double got = 0;
  for (double d : c.d_ridge_ratio.values()) got += d;
  const double expected = derivative(
      c, options, [&](double offset) { options.ridge_ratio += offset; }, options.ridge_ratio);
  EXPECT_NEAR(got, expected, 1e-7 * std::abs(expected));
}

// bp_lambda = false: the gradient of a forward whose f_t are frozen. They are frozen here by giving
// each token the ratio that keeps lambda_t = a_t f_t at its value while the keys move.
TEST(ExactGradients, FrozenNormWithoutBpLambda) {
  CaseSpec spec = everything();
  spec.H = 1;
  Case<double> c(spec);
  GkaOptions options;
  options.solver = Solver::direct;
  options.bp_lambda = false;
  run_backward<double>(c, options);
  const std::vector<double> a0 = c.ridge_ratio.values();

  const auto norms = [&] {  // f_t of every token, from prefixes' final states
    std::vector<double> f;
    for (int64_t t = 1; t <= spec.T; ++t) {
      GkaInputs in = c.inputs();
      for (ConstView* v :
           {&in.q, &in.k, &in.v, &in.g, &in.gk, &in.alpha, &in.beta, &in.ridge_ratio}) {
        v->size[1] = t;
      }
      GkaOutputs out = c.outputs();
      out.x = out.residual = View{};
      out.o.size[1] = t;
      reference::forward<double>(core::validate_forward(in, out, options), out);
      double sum = 0;
      for (double h : c.h_final.values()) sum += h * h;
      f.push_back(std::sqrt(sum));
    }
    return f;
  };
  const std::vector<double> f0 = norms();
  for (const Variable& variable : variables(c)) {
    if (variable.value == &c.ridge_ratio) continue;
    const std::vector<double> gradient = variable.gradient->values();
    for (int64_t i = 0; i < std::ssize(gradient); i += 3) {
      const int64_t row = i / spec.K % spec.K, column = i % spec.K;
      const int64_t mirror = variable.symmetric ? i + (column - row) * (spec.K - 1) : i;
      const double expected = derivative(c, options, [&](double offset) {
        (*variable.value)[i] += offset;
        if (mirror != i) (*variable.value)[mirror] += offset;
        const std::vector<double> f = norms();
        for (int64_t t = 0; t < spec.T; ++t) c.ridge_ratio[t] = a0[t] * f0[t] / f[t];
      });
      const double got = gradient[i] + (mirror != i ? gradient[mirror] : 0.0);
      EXPECT_NEAR(got, expected, 1e-6 * (1 + std::abs(expected)))
          << variable.tensor << " element " << i;
    }
  }
}

// Taking the forward's x instead of solving again changes nothing.
TEST(ExactGradients, SavedSolutionsGiveTheSameGradients) {
  const CaseSpec spec = everything();
  Case<double> a(spec), b(spec);
  GkaOptions options;
  options.solver = Solver::direct;
  run_backward<double>(a, options);
  run_forward<double>(b, options);
  run_backward<double>(b, options, true);
  for_each_gradient(a, b, [&](const char* tensor, const ConstView& got, const ConstView& expected) {
    EXPECT_TRUE(identical({"backward with saved x", "", describe(spec)}, tensor, got, expected));
  });
}

}  // namespace
}  // namespace kalmanet::testing
