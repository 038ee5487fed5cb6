// The oracles against what they must mean: Kalman filter, linear attention, truncation bounds,
// empty memories, NaN, dtypes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "reference/backend.hpp"
#include "reference/kalman_filter.hpp"
#include "reference/run.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

// ---- What `exact` means ------------------------------------------------------------------------

TEST(ExactOracle, EqualsTheKalmanFilterWithoutGates) {
  CaseSpec spec;
  spec.T = 40;
  spec.H = 1;
  spec.K = 7;
  spec.V = 5;
  spec.ridge_tensor = true;
  for (double lambda : {1.0, 0.1, 0.01}) {
    Case<double> c(spec);
    // a_t = lambda / f_t, with f_t by the definition.
    const std::vector<double> k = c.k.values();
    std::vector<double> H(spec.K * spec.K, 0.0);
    for (int64_t t = 0; t < spec.T; ++t) {
      double f2 = 0;
      for (int64_t i = 0; i < spec.K; ++i) {
        for (int64_t j = 0; j < spec.K; ++j) {
          double& h = H[i * spec.K + j];
          h += k[t * spec.K + i] * k[t * spec.K + j];
          f2 += h * h;
        }
      }
      c.ridge_ratio[t] = lambda / std::sqrt(f2);
    }
    GkaOptions options = with(Solver::direct);
    options.scale = 1;
    run_forward<double>(c, options);
    const std::vector<double> expected =
        reference::kalman_filter(c.q.values(), k, c.v.values(), lambda, spec.T, spec.K, spec.V);
    EXPECT_TRUE(within({"exact oracle", "", "lambda " + std::to_string(lambda)}, "o", c.o.values(),
                       expected, 1e-10));
  }
}

TEST(ExactOracle, ResidualIsRounding) {
  for (double ridge_ratio : {0.1, 0.02, 0.001}) {
    CaseSpec spec = everything();
    spec.ridge_ratio = ridge_ratio;
    Case<double> c(spec);
    run_forward<double>(c, with(Solver::direct, ridge_ratio));
    for (double r : c.residual.values()) EXPECT_LE(r, 1e-12);
  }
}

// alpha = 0 is gated linear attention: o_t = scale U_t^T q_t.
TEST(ExactOracle, AlphaZeroIsLinearAttention) {
  CaseSpec spec = everything();
  spec.u0 = spec.h0 = spec.g = spec.gk = spec.beta = false;
  spec.H = 1;
  Case<double> c(spec);
  c.alpha.fill([](int64_t) { return 0.0; });
  run_forward<double>(c, with(Solver::direct));
  const auto q = c.q.values(), k = c.k.values(), v = c.v.values();
  std::vector<double> expected(spec.T * spec.V, 0.0);
  for (int64_t t = 0; t < spec.T; ++t) {
    for (int64_t s = 0; s <= t; ++s) {
      double qk = 0;
      for (int64_t i = 0; i < spec.K; ++i) qk += q[t * spec.K + i] * k[s * spec.K + i];
      for (int64_t j = 0; j < spec.V; ++j) {
        expected[t * spec.V + j] += qk * v[s * spec.V + j] / std::sqrt(double(spec.K));
      }
    }
  }
  EXPECT_TRUE(
      within({"exact oracle, alpha 0", "", describe(spec)}, "o", c.o.values(), expected, 1e-13));
}

// ---- Truncation of the iterative solvers
// ---------------------------------------------------------

// |x_r - x| <= 2 R^r |x| for every token, at every ridge ratio and number of steps.
TEST(ChebyshevOracle, TruncationIsWithinItsBound) {
  for (double ridge_ratio : {0.1, 0.02, 0.005, 0.001}) {
    for (double correlation : {0.0, 0.8}) {
      CaseSpec spec;
      spec.T = 60;
      spec.H = 2;
      spec.K = 24;
      spec.V = 3;
      spec.gk = true;
      spec.ridge_ratio = ridge_ratio;
      spec.key_correlation = correlation;
      Case<double> exact(spec);
      run_forward<double>(exact, with(Solver::direct, ridge_ratio));
      const double kappa = (1 + ridge_ratio) / ridge_ratio;
      const double R = (std::sqrt(kappa) - 1) / (std::sqrt(kappa) + 1);
      double largest = 0;
      for (int r : {1, 2, 5, 10, 30, 60}) {
        Case<double> c(spec);
        const GkaReport report = run_forward<double>(c, with(Solver::chebyshev, ridge_ratio, r));
        EXPECT_EQ(report.min_iterations, r);
        EXPECT_EQ(report.max_iterations, r);
        const double bound = 2 * std::pow(R, r);
        for (int64_t t = 0; t < spec.T; ++t) {
          const double error = relative_error(token(c.x.view(), t), token(exact.x.view(), t));
          EXPECT_LE(error, bound * std::sqrt(2.0) + 1e-13)  // two heads' vectors side by side
              << "chebyshev(" << r << "), token " << t << ", " << describe(spec);
          if (bound > 1e-9) largest = std::max(largest, error / bound);  // else it is rounding
        }
      }
      // The bound is not idle either: some token comes within a factor of 100 of it.
      EXPECT_GE(largest, 0.01) << describe(spec);
      std::printf("chebyshev, ridge ratio %g, key correlation %g: error / bound <= %.2f\n",
                  ridge_ratio, correlation, largest);
    }
  }
}

TEST(ChebyshevOracle, AutomaticStepsReachTheTolerance) {
  for (double tolerance : {1e-3, 1e-5, 1e-8}) {
    CaseSpec spec = everything();
    spec.T = 100;
    spec.ridge_ratio = 0.002;
    Case<double> exact(spec), c(spec);
    run_forward<double>(exact, with(Solver::direct));
    GkaOptions options = with(Solver::chebyshev, 0.02, kAutoNumIter);
    options.tolerance = tolerance;
    options.chunk_size = 16;
    const GkaReport report = run_forward<double>(c, options);
    EXPECT_TRUE(within({"chebyshev(auto)", "", describe(spec)}, "x", c.x.view(), exact.x.view(),
                       tolerance));
    // Per chunk, hence between the counts of the largest and the smallest ratio there is.
    EXPECT_GE(report.min_iterations, chebyshev_num_iter(4 * spec.ridge_ratio, tolerance));
    EXPECT_LE(report.max_iterations, chebyshev_num_iter(spec.ridge_ratio, tolerance));
    EXPECT_LE(report.min_iterations, report.max_iterations);
  }
}

// The count of one chunk and head does not depend on what else is in the batch.
TEST(ChebyshevOracle, AutomaticStepsIgnoreNeighbours) {
  CaseSpec spec = everything();
  spec.B = 2;
  spec.h0 = spec.u0 = false;
  Case<double> a(spec), b(spec);
  const int64_t half = spec.T * spec.H;
  for (int64_t i = half; i < 2 * half; ++i) b.ridge_ratio[i] = 1e-4;  // row 1 only
  GkaOptions options = with(Solver::chebyshev, 0.02, kAutoNumIter);
  options.tolerance = 1e-3;
  run_forward<double>(a, options);
  run_forward<double>(b, options);
  ConstView first_a = a.o.view(), first_b = b.o.view();
  first_a.size[0] = first_b.size[0] = 1;
  EXPECT_TRUE(identical({"chebyshev(auto), row 0", "", describe(spec)}, "o", first_b, first_a));
}

// In exact arithmetic K steps are enough, and fewer converge at least as fast as Chebyshev's bound
// (in the norm of the system, which costs sqrt(kappa) here).
TEST(ConjugateGradientOracle, ConvergesToTheExactSolution) {
  CaseSpec spec = everything();
  spec.K = 24;
  Case<double> exact(spec), c(spec);
  run_forward<double>(exact, with(Solver::direct));
  run_forward<double>(c, with(Solver::cg, 0.02, 40));
  EXPECT_TRUE(within({"cg(40)", "", describe(spec)}, "x", c.x.view(), exact.x.view(), 1e-12));
  const double kappa = 51, R = (std::sqrt(kappa) - 1) / (std::sqrt(kappa) + 1);
  for (int r : {3, 6, 12}) {
    run_forward<double>(c, with(Solver::cg, 0.02, r));
    EXPECT_TRUE(within({"cg(" + std::to_string(r) + ")", "", describe(spec)}, "x", c.x.view(),
                       exact.x.view(), 2 * std::sqrt(kappa) * std::pow(R, r)));
  }
  run_forward<double>(c, with(Solver::cg, 0.02, 1));
  EXPECT_GT(relative_error(c.x.view(), exact.x.view()), 1e-3) << "one step cannot be exact";
}

TEST(Solvers, NumIterZeroMeansAutomaticForCgToo) {
  CaseSpec spec = everything();
  Case<double> exact(spec), c(spec);
  run_forward<double>(exact, with(Solver::direct));
  run_forward<double>(c, with(Solver::cg, 0.02, kAutoNumIter));
  EXPECT_TRUE(within({"cg(auto)", "", describe(spec)}, "x", c.x.view(), exact.x.view(), 1e-5));
}

// The gradients of chebyshev(r) are the implicit ones: those of `exact` up to the truncation of x
// and z.
TEST(ChebyshevOracle, GradientsApproachTheExactOnes) {
  const CaseSpec spec = everything();
  Case<double> exact(spec), c(spec);
  run_backward<double>(exact, with(Solver::direct));
  run_backward<double>(c, with(Solver::chebyshev, 0.02, 120));
  for_each_gradient(c, exact, [&](const char* tensor, const ConstView& got, const ConstView& want) {
    EXPECT_TRUE(within({"backward chebyshev(120)", "", describe(spec)}, tensor, got, want, 1e-10));
  });
  run_backward<double>(c, with(Solver::chebyshev, 0.02, 5));
  EXPECT_GT(relative_error(c.dk.view(), exact.dk.view()), 1e-5) << "5 steps cannot be exact";
}

// ---- Where nothing is remembered
// -------------------------------------------------------------------

// f_t <= 2^-60 counts as zero: x_t = 0, no gradient through it, never NaN.
TEST(VanishedNorm, GivesZeroSolutionsAndFiniteGradients) {
  for (Solver solver : {Solver::direct, Solver::chebyshev, Solver::cg}) {
    CaseSpec spec = everything();
    spec.h0 = spec.u0 = spec.beta = false;
    spec.H = 1;
    Case<double> c(spec);
    // Tokens 0..3: keys of zeros; 4..5: keys of 2^-31, so that f is about 2^-61; then real ones.
    const std::vector<double> k = c.k.values();
    c.k.fill([&](int64_t i) {
      const int64_t t = i / spec.K;
      return t < 4 ? 0.0 : t < 6 ? k[i] * 0x1p-31 : k[i];
    });
    run_forward<double>(c, with(solver));
    run_backward<double>(c, with(solver));
    const Where where{std::string("vanished norm, ") + name(solver), "", describe(spec)};
    for (int64_t t = 0; t < spec.T; ++t) {
      double norm = 0;
      for (double x : token(c.x.view(), t)) norm += x * x;
      EXPECT_EQ(norm == 0, t < 6) << "token " << t << ", " << name(solver);
      if (t < 6) {
        EXPECT_EQ(token(c.residual.view(), t)[0], 0);
        EXPECT_EQ(token(c.d_ridge_ratio.view(), t)[0], 0);
      }
    }
    const auto finite = [&](const char* tensor, const ConstView& view, const ConstView&) {
      for (double e : values(view)) EXPECT_TRUE(std::isfinite(e)) << tensor << ' ' << name(solver);
    };
    for_each_output(c, c, finite);
    for_each_gradient(c, c, finite);
    // dq = (1 - alpha) dm there, and alpha multiplies -q alone: o = scale U^T (1 - alpha) q.
    const std::vector<double> alpha = c.alpha.values(), q = c.q.values();
    for (int64_t t = 4; t < 6; ++t) {
      std::vector<double> U(spec.K * spec.V, 0.0), expected(spec.V, 0.0);
      const std::vector<double> keys = c.k.values(), v = c.v.values(), g = c.g.values();
      for (int64_t s = 4; s <= t; ++s) {
        for (int64_t i = 0; i < spec.K; ++i) {
          for (int64_t j = 0; j < spec.V; ++j) {
            U[i * spec.V + j] =
                std::exp(g[s]) * U[i * spec.V + j] + keys[s * spec.K + i] * v[s * spec.V + j];
          }
        }
      }
      for (int64_t i = 0; i < spec.K; ++i) {
        for (int64_t j = 0; j < spec.V; ++j) {
          expected[j] +=
              (1 - alpha[t]) * q[t * spec.K + i] * U[i * spec.V + j] / std::sqrt(double(spec.K));
        }
      }
      EXPECT_TRUE(within(where, "o", token(c.o.view(), t), expected, 1e-12));
    }
  }
}

// A NaN is never hidden: it shows in what depends on it, and in nothing else.
TEST(NotANumber, ShowsDownstreamOnly) {
  CaseSpec spec = everything();
  spec.H = 2;
  for (Solver solver : {Solver::direct, Solver::chebyshev, Solver::cg}) {
    Case<double> clean(spec), c(spec);
    run_forward<double>(clean, with(solver));
    c.k[(10 * spec.H + 1) * spec.K + 2] = std::nan("");  // token 10, head 1
    run_forward<double>(c, with(solver));
    for (int64_t t = 0; t < spec.T; ++t) {
      const std::vector<double> got = token(c.o.view(), t), want = token(clean.o.view(), t);
      const std::vector<double> x = token(c.x.view(), t);
      for (int64_t j = 0; j < spec.H * spec.V; ++j) {
        const bool hit = t >= 10 && j >= spec.V;
        if (hit) {
          EXPECT_TRUE(std::isnan(got[j])) << name(solver) << " token " << t;
          EXPECT_TRUE(std::isnan(x[spec.K + j - spec.V]))
              << "x hides it, " << name(solver) << " token " << t;
        } else {
          EXPECT_EQ(got[j], want[j]) << name(solver) << " token " << t;
        }
      }
    }
  }
}

// ---- Dtypes
// ------------------------------------------------------------------------------------------

// float32 tensors are computed in float64 and rounded once; the naive float32 version is not.
TEST(Float32, IsRoundedOnceByTheOracle) {
  CaseSpec spec = everything();
  spec.K = 32;
  Case<float> c(spec), naive(spec);
  Case<double> d = to_double(c);
  const GkaOptions options = with(Solver::chebyshev);
  run_forward<double>(c, options);
  run_forward<double>(d, options);
  run_forward<float>(naive, options);
  const Where where{"oracle on float32", "", describe(spec)};
  EXPECT_TRUE(within(where, "o", c.o.view(), d.o.view(), 0x1p-24));
  EXPECT_TRUE(within(where, "h_final", c.h_final.view(), d.h_final.view(), 0x1p-24));
  const double error = relative_error(naive.o.view(), d.o.view());
  EXPECT_GT(error, 0x1p-24) << "the naive version does not run in float32";
  EXPECT_LT(error, 1e-4);
  std::printf("naive float32 chebyshev(30), %s: error of o %.2e\n", describe(spec).c_str(), error);

  run_backward<double>(c, options);
  run_backward<double>(d, options);
  run_backward<float>(naive, options);
  for_each_gradient(c, d, [&](const char* tensor, const ConstView& got, const ConstView& want) {
    EXPECT_TRUE(within(where, tensor, got, want, 0x1p-24));
  });
  for_each_gradient(naive, d, [&](const char* tensor, const ConstView& got, const ConstView& want) {
    EXPECT_TRUE(within({"naive float32 backward", "", describe(spec)}, tensor, got, want, 1e-3));
  });
}

// A Cholesky factorisation a token in plain float32: what a direct solver of that precision is held
// to.
TEST(Float32, NaiveCholeskyIsNearTheExactOracle) {
  for (double ridge_ratio : {0.02, 0.001}) {
    CaseSpec spec = everything();
    spec.K = 48;
    spec.T = 100;
    spec.ridge_tensor = false;
    spec.ridge_ratio = ridge_ratio;
    Case<float> naive(spec);
    Case<double> exact = to_double(naive);
    run_forward<float>(naive, with(Solver::direct, ridge_ratio));
    run_forward<double>(exact, with(Solver::direct, ridge_ratio));
    const double error = relative_error(naive.o.view(), exact.o.view());
    EXPECT_GT(error, 0x1p-24) << describe(spec);
    EXPECT_LT(error, 1e-4) << describe(spec);
    std::printf("naive float32 Cholesky, %s: error of o %.2e\n", describe(spec).c_str(), error);
  }
}

// 16-bit tensors too: computed in float64 on the rounded inputs, every result rounded once.
template <class T, class G>
void check_sixteen_bits() {
  CaseSpec spec = everything();
  spec.Hk = 1;  // a gradient summed over heads is one result
  Case<T, G> c(spec);
  Case<double> d = to_double(c);
  const GkaOptions options = with(Solver::direct);
  run_forward<double>(c, options);
  run_forward<double>(d, options);
  const Where where{std::string("oracle on ") + name(DTypeOf<T>::value), "", describe(spec)};
  const auto exactly = [&](const char* tensor, const ConstView& got, const ConstView& want) {
    std::vector<double> expected = values(want);
    for (double& e : expected) {
      if (got.dtype == DType::float32) e = static_cast<float>(e);
      if (got.dtype == DTypeOf<T>::value) e = T(e);
    }
    EXPECT_TRUE(within(where, tensor, values(got), expected, 0));
  };
  for_each_output(c, d, exactly);
  exactly("x", c.x.view(), d.x.view());
  exactly("residual", c.residual.view(), d.residual.view());
  run_backward<double>(c, options);
  run_backward<double>(d, options);
  for_each_gradient(c, d, exactly);
  EXPECT_TRUE(c.gaps_intact());
}

TEST(SixteenBits, AreRoundedOnceByTheOracle) {
  check_sixteen_bits<BFloat16, BFloat16>();
  check_sixteen_bits<Float16, Float16>();
  check_sixteen_bits<BFloat16, float>();
  check_sixteen_bits<Float16, float>();
}

}  // namespace
}  // namespace kalmanet::testing
