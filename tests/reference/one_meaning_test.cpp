// One meaning: packed, separate, split, strided and grouped problems give the oracle's same answer.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "reference/backend.hpp"
#include "reference/run.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

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

}  // namespace
}  // namespace kalmanet::testing
