// The oracles against each other and against what they must mean: Kalman filter, truncation bounds,
// packed sequences, head groups, beta, vanished norms, splits.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "kalmanet/error.hpp"
#include "reference/backend.hpp"
#include "reference/kalman_filter.hpp"
#include "reference/run.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

GkaOptions with(Solver solver, double ridge_ratio = 0.02, int num_iter = 30) {
  GkaOptions options;
  options.solver = solver;
  options.ridge_ratio = ridge_ratio;
  options.num_iter = num_iter;
  return options;
}

CaseSpec everything() {
  CaseSpec spec;
  spec.T = 23;
  spec.H = 2;
  spec.K = 6;
  spec.V = 5;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.ridge_tensor = spec.h0 = spec.u0 = true;
  return spec;
}

// The words of one tensor that belong to token t of batch row 0: [H, D] values.
std::vector<double> token(const ConstView& view, int64_t t) {
  ConstView v = view;
  const int64_t offset = t * view.stride[1];
  v.data = view.dtype == DType::float64
               ? static_cast<const void*>(static_cast<const double*>(view.data) + offset)
               : static_cast<const void*>(static_cast<const float*>(view.data) + offset);
  v.size[1] = 1;
  return values(v);
}

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

// ---- One meaning
// -----------------------------------------------------------------------------------

TEST(OneMeaning, PackedEqualsSeparate) {
  CaseSpec spec = everything();
  spec.lengths = {3, 0, 1, 9, 0, 5};
  Case<double> packed(spec), separate(spec);
  const GkaOptions options = with(Solver::chebyshev);
  run_forward<double>(packed, options);
  run_backward<double>(packed, options);
  // The same memory, one sequence at a time: views cut to its tokens and its state row.
  for (size_t n = 0; n < spec.lengths.size(); ++n) {
    const int64_t begin = separate.cu_seqlens[n], length = spec.lengths[n];
    const auto tokens = [&](auto view) {
      if (view.defined()) {
        view.data = (double*)view.data + begin * view.stride[1];
        view.size[1] = length;
      }
      return view;
    };
    const auto state = [&](auto view) {
      if (view.defined()) {
        view.data = (double*)view.data + static_cast<int64_t>(n) * view.stride[0];
        view.size[0] = 1;
      }
      return view;
    };
    GkaInputs in = separate.inputs();
    for (ConstView* v :
         {&in.q, &in.k, &in.v, &in.g, &in.gk, &in.alpha, &in.beta, &in.ridge_ratio}) {
      *v = tokens(*v);
    }
    in.h0 = state(in.h0);
    in.u0 = state(in.u0);
    in.cu_seqlens = {};
    GkaOutputs out = separate.outputs();
    out = {tokens(out.o), state(out.h_final), state(out.u_final), tokens(out.x),
           tokens(out.residual)};
    reference::forward<double>(core::validate_forward(in, out, options), out);
    GkaOutputGrads d_out = separate.output_grads();
    d_out = {tokens(d_out.d_o), state(d_out.d_h_final), state(d_out.d_u_final)};
    GkaInputGrads grads = separate.grads();
    for (View* v : {&grads.dq, &grads.dk, &grads.dv, &grads.dg, &grads.dgk, &grads.dalpha,
                    &grads.dbeta, &grads.d_ridge_ratio}) {
      *v = tokens(*v);
    }
    grads.d_h0 = state(grads.d_h0);
    grads.d_u0 = state(grads.d_u0);
    reference::backward<double>(core::validate_backward(in, {}, d_out, grads, options), {}, d_out,
                                grads);
  }
  const Where where{"packed against separate", "", describe(spec)};
  const auto same = [&](const char* tensor, const ConstView& got, const ConstView& want) {
    EXPECT_TRUE(identical(where, tensor, got, want));
  };
  for_each_output(packed, separate, same);
  for_each_gradient(packed, separate, same);
}

// Head groups read shared heads; expanding them by hand gives the same, and the shared head's
// gradient is the sum.
TEST(OneMeaning, HeadGroupsEqualExpandedHeads) {
  CaseSpec spec = everything();
  spec.H = 6;
  spec.Hq = 3;
  spec.Hk = 2;
  spec.Hv = 6;
  Case<double> grouped(spec);
  CaseSpec full = spec;
  full.Hq = full.Hk = full.Hv = 0;
  Case<double> expanded(full);
  const auto expand = [&](const Tensor<double>& from, Tensor<double>& to, int64_t heads,
                          int64_t dim) {
    const std::vector<double> values = from.values();
    to.fill([&](int64_t i) {
      const int64_t d = i % dim, h = i / dim % spec.H, t = i / dim / spec.H;
      return values[(t * heads + h / (spec.H / heads)) * dim + d];
    });
  };
  expand(grouped.q, expanded.q, 3, spec.K);
  expand(grouped.k, expanded.k, 2, spec.K);
  expand(grouped.v, expanded.v, 6, spec.V);
  for (auto member :
       {&Case<double>::g, &Case<double>::gk, &Case<double>::alpha, &Case<double>::beta,
        &Case<double>::ridge_ratio, &Case<double>::h0, &Case<double>::u0, &Case<double>::d_o,
        &Case<double>::d_h_final, &Case<double>::d_u_final}) {
    (expanded.*member).assign((grouped.*member).values());
  }
  const GkaOptions options = with(Solver::direct);
  run_forward<double>(grouped, options);
  run_forward<double>(expanded, options);
  const Where where{"head groups", "", describe(spec)};
  for_each_output(grouped, expanded,
                  [&](const char* tensor, const ConstView& got, const ConstView& want) {
                    EXPECT_TRUE(identical(where, tensor, got, want));
                  });
  run_backward<double>(grouped, options);
  run_backward<double>(expanded, options);
  const auto summed = [&](const Tensor<double>& from, int64_t heads, int64_t dim) {
    const std::vector<double> values = from.values();
    std::vector<double> sum(values.size() / spec.H * heads, 0.0);
    for (size_t i = 0; i < values.size(); ++i) {
      const int64_t d = i % dim, h = i / dim % spec.H, t = i / dim / spec.H;
      sum[(t * heads + h / (spec.H / heads)) * dim + d] += values[i];
    }
    return sum;
  };
  EXPECT_TRUE(within(where, "dq", grouped.dq.values(), summed(expanded.dq, 3, spec.K), 1e-14));
  EXPECT_TRUE(within(where, "dk", grouped.dk.values(), summed(expanded.dk, 2, spec.K), 1e-14));
  EXPECT_TRUE(within(where, "dv", grouped.dv.values(), summed(expanded.dv, 6, spec.V), 1e-14));
  EXPECT_TRUE(identical(where, "dgk", grouped.dgk.view(), expanded.dgk.view()));
}

TEST(OneMeaning, BetaEqualsPremultipliedKeysAndValues) {
  CaseSpec spec = everything();
  Case<double> with_beta(spec);
  CaseSpec without = spec;
  without.beta = false;
  Case<double> multiplied(without);
  const std::vector<double> beta = with_beta.beta.values();
  for (auto member : {&Case<double>::q, &Case<double>::g, &Case<double>::gk, &Case<double>::alpha,
                      &Case<double>::ridge_ratio, &Case<double>::h0, &Case<double>::u0}) {
    (multiplied.*member).assign((with_beta.*member).values());
  }
  const std::vector<double> k = with_beta.k.values(), v = with_beta.v.values();
  multiplied.k.fill([&](int64_t i) { return k[i] * beta[i / spec.K]; });
  multiplied.v.fill([&](int64_t i) { return v[i] * beta[i / spec.V]; });
  run_forward<double>(with_beta, with(Solver::direct));
  run_forward<double>(multiplied, with(Solver::direct));
  for_each_output(with_beta, multiplied,
                  [&](const char* tensor, const ConstView& got, const ConstView& want) {
                    EXPECT_TRUE(identical({"beta", "", describe(spec)}, tensor, got, want));
                  });
}

// Awkward layouts change nothing and nothing is written between their elements.
TEST(OneMeaning, StridedEqualsDense) {
  CaseSpec spec = everything();
  spec.B = 2;
  Case<double> dense(spec);
  spec.strided = true;
  Case<double> strided(spec);
  for (Case<double>* c : {&dense, &strided}) {
    run_forward<double>(*c, with(Solver::chebyshev));
    run_backward<double>(*c, with(Solver::chebyshev));
  }
  const auto same = [&](const char* tensor, const ConstView& got, const ConstView& want) {
    EXPECT_TRUE(identical({"strided", "", describe(spec)}, tensor, got, want));
  };
  for_each_output(strided, dense, same);
  for_each_gradient(strided, dense, same);
  EXPECT_TRUE(strided.gaps_intact());
}

TEST(OneMeaning, WholeEqualsContinuationInPlace) {
  CaseSpec spec = everything();
  Case<double> whole(spec), parts(spec);
  const GkaOptions options = with(Solver::chebyshev);
  run_forward<double>(whole, options);
  // 10 tokens, then one at a time, the states updated in place.
  GkaOutputs out = parts.outputs();
  out.h_final = parts.h0.view();
  out.u_final = parts.u0.view();
  for (int64_t begin = 0, length = 10; begin < spec.T; begin += length, length = 1) {
    const auto cut = [&](auto view) {
      view.data = (double*)view.data + begin * view.stride[1];
      view.size[1] = length;
      return view;
    };
    GkaInputs in = parts.inputs();
    for (ConstView* v :
         {&in.q, &in.k, &in.v, &in.g, &in.gk, &in.alpha, &in.beta, &in.ridge_ratio}) {
      *v = cut(*v);
    }
    const GkaOutputs part = {cut(out.o), out.h_final, out.u_final, cut(out.x), cut(out.residual)};
    reference::gka_backend().step(core::validate_forward(in, part, options), part);
  }
  const Where where{"continuation", "", describe(spec)};
  EXPECT_TRUE(identical(where, "o", parts.o.view(), whole.o.view()));
  EXPECT_TRUE(identical(where, "h_final", parts.h0.view(), whole.h_final.view()));
  EXPECT_TRUE(identical(where, "u_final", parts.u0.view(), whole.u_final.view()));
}

// The gradient of a whole sequence is that of its second part, then of its first with the gradients
// of the states in between. Longer than the blocks in which the backward recomputes its states.
TEST(OneMeaning, GradientsChainThroughTheStates) {
  CaseSpec spec = everything();
  spec.T = 75;
  const int64_t cut = 41;
  Case<double> whole(spec), parts(spec);
  const GkaOptions options = with(Solver::direct);
  run_backward<double>(whole, options);

  const auto part = [&](auto view, bool second) {
    if (second) view.data = (double*)view.data + cut * view.stride[1];
    view.size[1] = second ? spec.T - cut : cut;
    return view;
  };
  Case<double> middle(
      spec);  // h_final, u_final: the states at the cut; d_h0, d_u0: their gradients
  for (int pass = 0; pass < 3; ++pass) {  // forward of the first; backward of the second, the first
    const bool second = pass == 1;
    GkaInputs in = parts.inputs();
    for (ConstView* v :
         {&in.q, &in.k, &in.v, &in.g, &in.gk, &in.alpha, &in.beta, &in.ridge_ratio}) {
      *v = part(*v, second);
    }
    if (pass == 0) {
      const GkaOutputs out = {
          part(parts.o.view(), false), middle.h_final.view(), middle.u_final.view(), {}, {}};
      reference::forward<double>(core::validate_forward(in, out, options), out);
      continue;
    }
    GkaOutputGrads d_out = parts.output_grads();
    GkaInputGrads grads = parts.grads();
    d_out.d_o = part(d_out.d_o, second);
    for (View* v : {&grads.dq, &grads.dk, &grads.dv, &grads.dg, &grads.dgk, &grads.dalpha,
                    &grads.dbeta, &grads.d_ridge_ratio}) {
      *v = part(*v, second);
    }
    if (second) {
      in.h0 = middle.h_final.view();
      in.u0 = middle.u_final.view();
      grads.d_h0 = middle.d_h0.view();
      grads.d_u0 = middle.d_u0.view();
    } else {
      d_out.d_h_final = middle.d_h0.view();
      d_out.d_u_final = middle.d_u0.view();
    }
    reference::backward<double>(core::validate_backward(in, {}, d_out, grads, options), {}, d_out,
                                grads);
  }
  for_each_gradient(parts, whole, [&](const char* tensor, const auto& got, const auto& want) {
    EXPECT_TRUE(within({"backward in two parts", "", describe(spec)}, tensor, got, want, 1e-13));
  });
}

TEST(OneMeaning, NoTokensPassTheStatesThrough) {
  CaseSpec spec = everything();
  spec.T = 0;
  Case<double> c(spec);
  run_forward<double>(c, with(Solver::chebyshev));
  EXPECT_TRUE(identical({"T = 0", "", describe(spec)}, "h_final", c.h_final.view(), c.h0.view()));
  EXPECT_TRUE(identical({"T = 0", "", describe(spec)}, "u_final", c.u_final.view(), c.u0.view()));
  run_backward<double>(c, with(Solver::chebyshev));
  EXPECT_TRUE(identical({"T = 0", "", describe(spec)}, "d_h0", c.d_h0.view(), c.d_h_final.view()));
  EXPECT_TRUE(identical({"T = 0", "", describe(spec)}, "d_u0", c.d_u0.view(), c.d_u_final.view()));

  spec.B = 0;
  spec.T = 5;
  Case<double> none(spec);
  const GkaReport report = run_forward<double>(none, with(Solver::chebyshev));
  EXPECT_EQ(report.max_iterations, 0);
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

TEST(Backend, RefusesSixteenBits) {
  CaseSpec spec;
  Case<float> c(spec);
  const GkaOutputs out = c.outputs();
  core::GkaProblem problem = core::validate_forward(c.inputs(), out, {});
  EXPECT_EQ(reference::gka_backend().refuses(problem), "");
  problem.dtype = DType::bfloat16;
  EXPECT_NE(reference::gka_backend().refuses(problem).find("bfloat16"), std::string::npos);
}

}  // namespace
}  // namespace kalmanet::testing
