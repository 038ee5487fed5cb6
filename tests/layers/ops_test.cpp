// The differentiable operators against the token loop of plain_gka.hpp and LibTorch's own
// operators.
#include "layers/ops.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "layers/head_norm.hpp"
#include "layers/plain.hpp"
#include "layers/plain_gka.hpp"

namespace kalmanet::test {
namespace {

using layers::ConvResult;
using layers::GkaOpOptions;
using layers::GkaResult;

constexpr int64_t kSeed = 20261123;

struct Problem {
  Tensor q, k, v;
  OptionalTensor g, gk, alpha, beta, ridge, h0, u0;

  std::vector<std::pair<const char*, Tensor>> inputs() const {
    std::vector<std::pair<const char*, Tensor>> all = {{"q", q}, {"k", k}, {"v", v}};
    const std::pair<const char*, const OptionalTensor*> optional[] = {
        {"g", &g},         {"gk", &gk}, {"alpha", &alpha}, {"beta", &beta},
        {"ridge", &ridge}, {"h0", &h0}, {"u0", &u0}};
    for (const auto& [name, tensor] : optional) {
      if (*tensor) all.emplace_back(name, **tensor);
    }
    return all;
  }
  std::vector<Tensor> tensors() const {
    std::vector<Tensor> result;
    for (const auto& [name, tensor] : inputs()) result.push_back(tensor);
    return result;
  }
  Problem map(const std::function<Tensor(const Tensor&)>& f) const {
    const auto each = [&](const OptionalTensor& t) {
      return t ? OptionalTensor(f(*t)) : std::nullopt;
    };
    return {f(q),        f(k),       f(v),        each(g),  each(gk),
            each(alpha), each(beta), each(ridge), each(h0), each(u0)};
  }
  Problem leaves(at::ScalarType type) const {
    return map([type](const Tensor& t) { return t.detach().to(type).requires_grad_(); });
  }
  GkaResult run(const GkaOpOptions& options, const OptionalTensor& cu = {}) const {
    return layers::gka(q, k, v, g, gk, alpha, beta, ridge, h0, u0, cu, options);
  }
  PlainResult plain(int64_t num_iter) const {
    return plain_gka(q, k, v, g, gk, alpha, beta, *ridge, h0, u0,
                     1 / std::sqrt(static_cast<double>(q.size(3))), num_iter);
  }
};

Problem make_problem(int64_t B, int64_t T, int64_t Hq, int64_t Hk, int64_t Hv, int64_t K,
                     int64_t V) {
  torch::manual_seed(kSeed);
  const int64_t H = std::max({Hq, Hk, Hv});
  const auto normal = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); };
  Problem p;
  const auto unit = [](const Tensor& t) { return t / t.norm(2, -1, true); };
  p.q = unit(normal({B, T, Hq, K}));
  p.k = unit(normal({B, T, Hk, K}));
  p.v = normal({B, T, Hv, V});
  p.g = -0.2 * normal({B, T, H}).abs();
  p.gk = -0.2 * normal({B, T, H}).abs();
  p.alpha = normal({B, T, H}).sigmoid();
  p.beta = normal({B, T, H}).sigmoid();
  p.ridge = 0.02 * (0.3 * normal({B, T, H})).exp();
  const Tensor root = 0.3 * normal({B, H, K, 2 * K});
  p.h0 = at::matmul(root, root.transpose(2, 3));
  p.u0 = normal({B, H, K, V});
  return p;
}

struct Arithmetic {
  at::ScalarType type;
  const char* backend;
  double forward_bound, gradient_bound;
};
const Arithmetic kArithmetics[] = {{at::kDouble, "reference", 1e-11, 1e-8},
                                   {at::kFloat, "auto", 1e-5, 1e-4}};

TEST(Gka, ForwardIsTheTokenLoop) {
  for (const Arithmetic& arithmetic : kArithmetics) {
    for (const auto& [Hq, Hk, Hv] : {std::tuple(2, 2, 2), {4, 2, 2}, {2, 2, 4}, {4, 1, 2}}) {
      const Problem p = make_problem(2, 9, Hq, Hk, Hv, 5, 3);
      const PlainResult want = p.plain(30);
      GkaOpOptions options;
      options.backend = arithmetic.backend;
      const Problem cast = p.map([&](const Tensor& t) { return t.to(arithmetic.type); });
      const GkaResult got = cast.run(options);
      const std::string what = std::string(arithmetic.backend) + ", heads " + std::to_string(Hq) +
                               " " + std::to_string(Hk) + " " + std::to_string(Hv);
      EXPECT_NEAR_RELATIVE(got.o, want.o, arithmetic.forward_bound, "o, " + what);
      EXPECT_NEAR_RELATIVE(got.h, want.h, arithmetic.forward_bound, "h, " + what);
      EXPECT_NEAR_RELATIVE(got.u, want.u, arithmetic.forward_bound, "u, " + what);
      EXPECT_EQ(got.o.scalar_type(), arithmetic.type);
    }
  }
}

// Every gradient, through o and both states, against autograd through the exact solve. 100
// Chebyshev steps at these ridge ratios are exact to float64's rounding.
TEST(Gka, GradientsAreThoseOfTheExactSolve) {
  for (const Arithmetic& arithmetic : kArithmetics) {
    for (const auto& [Hq, Hk, Hv] : {std::tuple(2, 2, 2), {4, 2, 2}, {2, 2, 4}}) {
      const Problem p = make_problem(2, 7, Hq, Hk, Hv, 4, 3);
      const Problem exact = p.leaves(at::kDouble);
      const PlainResult want = exact.plain(0);
      const std::vector<Tensor> cotangents = {at::randn_like(want.o), at::randn_like(want.h),
                                              at::randn_like(want.u)};
      const auto want_grads =
          torch::autograd::grad({want.o, want.h, want.u}, exact.tensors(), cotangents);
      const Problem leaves = p.leaves(arithmetic.type);
      GkaOpOptions options;
      options.num_iter = 120;
      options.backend = arithmetic.backend;
      const GkaResult got = leaves.run(options);
      std::vector<Tensor> seeds;
      for (const Tensor& c : cotangents) seeds.push_back(c.to(arithmetic.type));
      const auto grads = torch::autograd::grad({got.o, got.h, got.u}, leaves.tensors(), seeds);
      const auto inputs = leaves.inputs();
      for (size_t i = 0; i < inputs.size(); ++i) {
        EXPECT_NEAR_RELATIVE(grads[i], want_grads[i], arithmetic.gradient_bound,
                             std::string("d") + inputs[i].first + ", " + arithmetic.backend);
      }
    }
  }
}

TEST(Gka, GradientThroughOneStateAlone) {
  const Problem p = make_problem(1, 6, 2, 2, 2, 4, 3);
  const Problem exact = p.leaves(at::kDouble), leaves = p.leaves(at::kFloat);
  const PlainResult want = exact.plain(0);
  const GkaResult got = leaves.run({});
  const auto want_k = torch::autograd::grad({want.u.sum()}, {exact.k})[0];
  const auto got_k = torch::autograd::grad({got.u.sum()}, {leaves.k}, {}, true)[0];
  EXPECT_NEAR_RELATIVE(got_k, want_k, 1e-4, "dk from u alone");
  const auto want_gk = torch::autograd::grad({want.h.sum()}, {*exact.gk})[0];
  const auto got_gk = torch::autograd::grad({got.h.sum()}, {*leaves.gk})[0];
  EXPECT_NEAR_RELATIVE(got_gk, want_gk, 1e-4, "dgk from h alone");
}

TEST(Gka, OneTensorForBothDecaysGetsBothGradients) {
  Problem p = make_problem(1, 6, 2, 2, 2, 4, 3).leaves(at::kFloat);
  const GkaResult apart = p.run({});
  const auto grads = torch::autograd::grad({apart.o.sum()}, {*p.g, *p.gk}, {}, true);
  Problem same = p.leaves(at::kFloat);
  same.g = p.gk->detach().requires_grad_();
  same.gk = same.g;
  const auto together = torch::autograd::grad({same.run({}).o.sum()}, {*same.g})[0];
  Problem split = same.leaves(at::kFloat);
  const auto parts = torch::autograd::grad({split.run({}).o.sum()}, {*split.g, *split.gk});
  EXPECT_NEAR_RELATIVE(together, parts[0] + parts[1], 1e-6, "d(g = gk)");
  EXPECT_EQ(grads.size(), 2u);
}

TEST(Gka, RidgeMayBeOneNumber) {
  Problem p = make_problem(2, 6, 2, 2, 2, 4, 3).leaves(at::kFloat);
  const Tensor one = at::full({}, 0.03, at::kFloat).requires_grad_();
  const Tensor each = at::full({2, 6, 2}, 0.03, at::kFloat).requires_grad_();
  p.ridge = one;
  const GkaResult a = p.run({});
  const Tensor d_one = torch::autograd::grad({a.o.square().sum()}, {one})[0];
  p.ridge = each;
  const GkaResult b = p.run({});
  const Tensor d_each = torch::autograd::grad({b.o.square().sum()}, {each})[0];
  EXPECT_TRUE(at::equal(a.o, b.o));
  EXPECT_NEAR_RELATIVE(d_one, d_each.sum(), 1e-5, "d ridge");
  p.ridge.reset();
  GkaOpOptions options;
  options.ridge_ratio = 0.03;
  EXPECT_NEAR_RELATIVE(p.run(options).o, a.o, 1e-6, "ridge_ratio");
}

TEST(Gka, SixteenBitsIsComputedInFloat32AndRoundedOnce) {
  const Problem p = make_problem(2, 9, 4, 2, 2, 8, 6);
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    Problem low = p.map([type](const Tensor& t) { return t.to(type); });
    low.h0 = p.h0->to(at::kFloat);
    low.u0 = p.u0->to(at::kFloat);
    const Problem wide = low.map([](const Tensor& t) { return t.to(at::kFloat); });
    const GkaResult got = low.run({}), want = wide.run({});
    EXPECT_EQ(got.o.scalar_type(), type);
    EXPECT_EQ(got.h.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(got.o, want.o.to(type)));
    EXPECT_TRUE(at::equal(got.h, want.h));
    low.q.requires_grad_();
    const Tensor dq = torch::autograd::grad({low.run({}).o.to(at::kFloat).sum()}, {low.q})[0];
    EXPECT_EQ(dq.scalar_type(), type);
    EXPECT_TRUE(at::isfinite(dq).all().item<bool>());
  }
}

TEST(Gka, StepsEqualTheWholeAndWriteInPlace) {
  for (const Arithmetic& arithmetic : kArithmetics) {
    const Problem p = make_problem(2, 9, 4, 2, 2, 5, 3).map([&](const Tensor& t) {
      return t.to(arithmetic.type);
    });
    GkaOpOptions options;
    options.backend = arithmetic.backend;
    const GkaResult want = p.run(options);
    const Tensor h = p.h0->clone(), u = p.u0->clone();
    std::vector<Tensor> outs;
    for (const auto& [begin, count] : {std::pair(0, 1), {1, 3}, {4, 5}}) {
      const auto cut = [&](const Tensor& t) { return t.narrow(1, begin, count); };
      outs.push_back(layers::gka_step(cut(p.q), cut(p.k), cut(p.v), cut(*p.g), cut(*p.gk),
                                      cut(*p.alpha), cut(*p.beta), cut(*p.ridge), h, u, {},
                                      options));
    }
    EXPECT_NEAR_RELATIVE(at::cat(outs, 1), want.o, arithmetic.forward_bound, "o of steps");
    EXPECT_NEAR_RELATIVE(h, want.h, arithmetic.forward_bound, "h of steps");
    EXPECT_NEAR_RELATIVE(u, want.u, arithmetic.forward_bound, "u of steps");
  }
}

TEST(Gka, DoubleBackwardIsAnError) {
  const Problem p = make_problem(1, 4, 1, 1, 1, 3, 3).leaves(at::kFloat);
  EXPECT_ERROR(torch::autograd::grad({p.run({}).o.sum()}, {p.q}, {}, true, /*create_graph=*/true),
               "gka: the backward pass itself is not differentiable");
}

TEST(Gka, ErrorsNameTheArgument) {
  const Problem p = make_problem(2, 4, 2, 2, 2, 3, 3);
  GkaOpOptions options;
  EXPECT_EQ(p.run(options).o.scalar_type(), at::kDouble);
  Problem f = p.map([](const Tensor& t) { return t.to(at::kFloat); });
  options.solver = "newton";
  EXPECT_ERROR(f.run(options), "solver: ");
  Problem bad = f;
  bad.k = f.k.narrow(3, 0, 2);
  EXPECT_ERROR(bad.run({}), "k: ");
  bad = f;
  bad.q = f.q.to(at::kLong);
  EXPECT_ERROR(bad.run({}), "q: ");
  EXPECT_ERROR(f.run({}, at::tensor({0, 4}, at::kLong)), "cu_seqlens");
  EXPECT_ERROR(f.run({}, at::tensor({0, 4}, at::kInt)), "cu_seqlens: ");
}

// ---- convolution and norm: float32 operators against plain LibTorch in float64 ----

TEST(CausalConv, MatchesPlainInAllResultsAndGradients) {
  torch::manual_seed(kSeed);
  for (const bool packed : {false, true}) {
    for (const bool silu : {true, false}) {
      const int64_t N = packed ? 4 : 2;
      const OptionalTensor cu =
          packed ? OptionalTensor(at::tensor({0, 1, 1, 3, 11}, at::kLong)) : std::nullopt;
      const auto leaf = [](at::IntArrayRef sizes) {
        return at::randn(sizes, at::kDouble).requires_grad_();
      };
      const std::vector<Tensor> exact = {leaf({packed ? 1 : 2, 11, 19}), leaf({19, 1, 4}),
                                         leaf({N, 19, 4})};
      std::vector<Tensor> single;
      for (const Tensor& t : exact) {
        single.push_back(t.detach().to(at::kFloat).requires_grad_());
      }
      const ConvResult want =
          layers::plain_causal_conv(exact[0], exact[1], exact[2], cu, silu, true);
      const ConvResult got = layers::causal_conv(single[0], single[1], single[2], cu, silu, true);
      EXPECT_NEAR_RELATIVE(got.y, want.y, 1e-6, "y");
      EXPECT_NEAR_RELATIVE(got.final_state, want.final_state, 1e-6, "final state");
      const Tensor dy = at::randn_like(want.y), ds = at::randn_like(want.final_state);
      const auto want_grads = torch::autograd::grad({want.y, want.final_state}, exact, {dy, ds});
      const auto grads = torch::autograd::grad({got.y, got.final_state}, single,
                                               {dy.to(at::kFloat), ds.to(at::kFloat)});
      const char* names[] = {"dx", "dweight", "dstate"};
      for (int i = 0; i < 3; ++i) EXPECT_NEAR_RELATIVE(grads[i], want_grads[i], 1e-5, names[i]);
      // Without gradients and without a final state: the same y.
      const at::NoGradGuard no_grad;
      const ConvResult again = layers::causal_conv(single[0], single[1], single[2], cu, silu);
      EXPECT_TRUE(at::equal(again.y, got.y));
      EXPECT_FALSE(again.final_state.defined());
    }
  }
}

TEST(CausalConv, StepsEqualTheWhole) {
  torch::manual_seed(kSeed);
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const Tensor x = at::randn({2, 7, 10}, type), weight = at::randn({10, 1, 4}, type);
    const ConvResult whole = layers::causal_conv(x, weight, {}, {}, true, true);
    const Tensor state = at::zeros({2, 10, 4}, type);
    for (int64_t t = 0; t < 7; ++t) {
      const Tensor y = layers::causal_conv_step(x.select(1, t), weight, state);
      EXPECT_NEAR_RELATIVE(y, whole.y.select(1, t), 1e-6, "y");
    }
    EXPECT_NEAR_RELATIVE(state, whole.final_state, 1e-6, "state");
  }
}

TEST(GatedRmsNorm, MatchesPlain) {
  torch::manual_seed(kSeed);
  for (const bool gated : {true, false}) {
    const auto leaf = [](at::IntArrayRef sizes) {
      return at::randn(sizes, at::kDouble).requires_grad_();
    };
    std::vector<Tensor> exact = {leaf({2, 5, 3, 19}), leaf({19})};
    if (gated) exact.push_back(leaf({2, 5, 3, 19}));
    std::vector<Tensor> single;
    for (const Tensor& t : exact) single.push_back(t.detach().to(at::kFloat).requires_grad_());
    const auto gate = [gated](const std::vector<Tensor>& from) {
      return gated ? OptionalTensor(from[2]) : std::nullopt;
    };
    const Tensor want = layers::plain_gated_rms_norm(exact[0], gate(exact), exact[1], 1e-6);
    const Tensor got = layers::gated_rms_norm(single[0], gate(single), single[1], 1e-6);
    EXPECT_NEAR_RELATIVE(got, want, 1e-6, "y");
    const Tensor dy = at::randn_like(want);
    const auto want_grads = torch::autograd::grad({want}, exact, {dy});
    const auto grads = torch::autograd::grad({got}, single, {dy.to(at::kFloat)});
    for (size_t i = 0; i < exact.size(); ++i) {
      EXPECT_NEAR_RELATIVE(grads[i], want_grads[i], 1e-5, "gradient " + std::to_string(i));
    }
  }
  EXPECT_ERROR(layers::gated_rms_norm(at::ones({2, 3}), at::ones({2, 4}), at::ones({3})), "gate: ");
}

TEST(UnitHeads, OneOperatorIsLibTorchs) {
  torch::manual_seed(kSeed);
  for (const auto& [width, kind] : std::initializer_list<std::pair<int64_t, const char*>>{
           {1, "official"}, {7, "official"}, {32, "official"}, {100, "official"}, {33, "fla"}}) {
    Tensor exact = at::randn({3, 5, 2, width}, at::kDouble);
    exact[0][0][0].zero_();     // the gradient of |t| is 0 there
    exact[0][1][0].mul_(1e-6);  // where eps matters
    exact.requires_grad_();
    const Tensor single = exact.detach().to(at::kFloat).requires_grad_();
    const Tensor want = layers::unit_heads(exact, kind), got = layers::unit_heads(single, kind);
    EXPECT_NEAR_RELATIVE(got, want, 1e-6, "y");
    const Tensor dy = at::randn_like(want);
    const Tensor dt = torch::autograd::grad({want}, {exact}, {dy})[0];
    const Tensor dt32 = torch::autograd::grad({got}, {single}, {dy.to(at::kFloat)})[0];
    // Row by row: the zero and the tiny rows' gradients are 1e6 times the others'.
    for (const auto& [a, b, t] : {std::tuple(0, 0, 0), {0, 1, 0}, {0, 1, 1}, {2, 4, 1}}) {
      if (width > 1 || (a == 0 && b == 0 && t == 0)) {  // at width 1 it is eps / |t|, all rounding
        EXPECT_NEAR_RELATIVE(dt32[a][b][t], dt[a][b][t], 1e-5, "gradient of row");
      }
    }
    const at::NoGradGuard no_grad;
    EXPECT_TRUE(at::equal(layers::unit_heads(single, kind), got));
    EXPECT_NEAR_RELATIVE(layers::unit_heads(single.transpose(1, 2), kind), want.transpose(1, 2),
                         1e-6, "transposed");
  }
}

}  // namespace
}  // namespace kalmanet::test
