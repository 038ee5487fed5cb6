// GatedKalmaNet against the layer written once more in plain LibTorch: outputs, every gradient,
// every switch, initialisation, clear errors.
#include "layers/gated_kalmanet.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "layers/small_layer.hpp"

namespace kalmanet::test {
namespace {

// DESIGN's layer, line by line, in the dtype of `layer`'s parameters (float64 here). num_iter 0:
// exact solve.
Tensor plain_layer(layers::GatedKalmaNetImpl& layer, const Tensor& x, int64_t num_iter) {
  const auto& o = layer.options();
  auto parameters = layer.named_parameters();
  const auto p = [&](const std::string& name) { return parameters[name].to(x.scalar_type()); };
  const int64_t B = x.size(0), T = x.size(1), K = o.head_dim, V = o.head_v_dim(),
                H = o.expanded_heads(), W = o.conv_size;
  const auto project = [&](const std::string& name) {
    Tensor y = at::matmul(x, p(name + ".weight").t());
    return parameters.contains(name + ".bias") ? y + p(name + ".bias") : y;
  };
  const auto convolve = [&](const Tensor& in, const std::string& name) {
    const Tensor weight = p(name + ".weight").squeeze(1);  // [D,W]
    const Tensor padded = at::constant_pad_nd(in, {0, 0, W - 1, 0});
    Tensor y = at::zeros_like(in);
    for (int64_t j = 0; j < W; ++j) y = y + padded.narrow(1, j, T) * weight.select(1, j);
    return at::silu(y);
  };
  const auto normalise = [&](const Tensor& t) {
    const Tensor squares = t.square().sum(-1, true);
    return o.qk_norm == "fla" ? t / (squares + 1e-6).sqrt() : t / (squares.sqrt() + 1e-6);
  };
  const Tensor q = normalise(convolve(project("q_proj"), "q_conv1d").view({B, T, o.num_heads, K}));
  const Tensor k = normalise(convolve(project("k_proj"), "k_conv1d").view({B, T, o.k_heads(), K}));
  Tensor v = project("v_proj");
  if (o.use_v_conv) v = convolve(v, "v_conv1d");
  v = v.view({B, T, o.v_heads(), V});
  OptionalTensor beta, alpha, g, gk;
  if (o.use_beta_gate) beta = at::sigmoid(project("b_proj")) + 1e-6;
  if (o.fixed_alpha) {
    alpha = at::full({B, T, H}, *o.fixed_alpha, x.options());
  } else if (o.use_alpha_connection) {
    alpha = at::sigmoid(project("alpha_proj"));
  }
  if (o.use_forgetting_gate) {
    g = -p("A_log").exp() * at::softplus(project("a_proj") + p("dt_bias"));
    if (o.use_forgetting_gate_kk) gk = g;
  }
  const Tensor ridge =
      o.learned_ridge ? at::clamp(project("ridge_proj"), std::log(1.2e-4), std::log(0.135)).exp()
                      : at::full({B, T, H}, o.ridge_ratio, x.options());
  const double scale = o.gla_rescale ? 1 / std::sqrt(static_cast<double>(K)) : 1.0;
  const Tensor out = plain_gka(q, k, v, g, gk, alpha, beta, ridge, {}, {}, scale, num_iter).o;
  Tensor y = out / (out.square().mean(-1, true) + o.norm_eps).sqrt() * p("o_norm.weight");
  if (o.use_gate) y = y * at::silu(project("g_proj").view({B, T, H, V}));
  return at::matmul(y.reshape({B, T, H * V}), p("o_proj.weight").t());
}

TEST(GatedKalmaNet, IsTheLayerOfTheEquations) {
  const at::NoGradGuard no_grad;
  for (auto& [name, options] : variants()) {
    GatedKalmaNet exact = make_layer(options, at::kDouble);
    const Tensor x = make_input(options, 2, 9, at::kDouble);
    const Tensor want = plain_layer(*exact, x, 30);
    EXPECT_NEAR_RELATIVE(make_layer(options)->forward(x.to(at::kFloat)), want, 2e-5, name);
    options.backend = "reference";
    EXPECT_NEAR_RELATIVE(make_layer(options, at::kDouble)->forward(x), want, 1e-10,
                         name + ", float64");
  }
}

TEST(GatedKalmaNet, LearnedRidgeFollowsTheToleranceDownToSmallRidges) {
  GatedKalmaNetOptions options = small_options();
  options.learned_ridge = true;
  options.tolerance = 1e-6;
  for (const double bias : {std::log(0.01), std::log(0.001), -20.0, 20.0}) {
    GatedKalmaNet exact = make_layer(options, at::kDouble), single = make_layer(options);
    {
      const at::NoGradGuard no_grad;
      EXPECT_NEAR(exact->named_parameters()["ridge_proj.bias"][0].item<double>(), std::log(0.01),
                  1e-6);
      exact->named_parameters()["ridge_proj.bias"].fill_(bias);
      single->named_parameters()["ridge_proj.bias"].fill_(bias);
    }
    const Tensor x = make_input(options, 1, 9, at::kDouble);
    // Float32 at a condition number of up to 1/1.2e-4: rounding is 1e-7 times that.
    const double bound = bias < -7 ? 2e-3 : bias < -6 ? 3e-4 : 5e-5;
    EXPECT_NEAR_RELATIVE(single->forward(x.to(at::kFloat)), plain_layer(*exact, x, 0), bound,
                         "bias " + std::to_string(bias));
  }
}

// The loss of a random projection of the output, by central differences in float64, for every
// element of every parameter and of the input; the exact solver underneath.
TEST(GatedKalmaNet, GradientsAreFiniteDifferences) {
  for (const bool learned : {false, true}) {
    GatedKalmaNetOptions options = small_options();
    options.hidden_size = 4;
    options.head_dim = 3;
    options.num_v_heads = 4;
    options.num_k_heads = 1;
    options.conv_size = 3;
    options.learned_ridge = learned;
    options.solver = "direct";
    options.backend = "reference";
    GatedKalmaNet layer = make_layer(options, at::kDouble);
    Tensor x = make_input(options, 1, 5, at::kDouble).requires_grad_();
    const Tensor weights = at::randn({1, 5, 4}, at::kDouble);
    const auto loss = [&] { return (layer->forward(x) * weights).sum(); };
    std::vector<std::string> names = {"x"};
    std::vector<Tensor> tensors = {x};
    for (const auto& item : layer->named_parameters()) {
      names.push_back(item.key());
      tensors.push_back(item.value());
    }
    EXPECT_EQ(names.size(), learned ? 19u : 17u);
    const auto grads = torch::autograd::grad({loss()}, tensors);
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor flat = tensors[i].detach().view({-1});
      Tensor numeric = at::zeros_like(flat);
      for (int64_t j = 0; j < flat.numel(); ++j) {
        constexpr double kStep = 1e-5;
        const double value = flat[j].item<double>();
        flat[j] = value + kStep;
        const double up = loss().item<double>();
        flat[j] = value - kStep;
        const double down = loss().item<double>();
        flat[j] = value;
        numeric[j] = (up - down) / (2 * kStep);
      }
      EXPECT_NEAR_RELATIVE(grads[i].reshape({-1}), numeric, 1e-6, "d " + names[i]);
    }
  }
}

TEST(GatedKalmaNet, FloatGradientsAreThoseOfThePlainLayer) {
  for (auto& [name, options] : variants()) {
    options.num_iter = 120;  // exact to rounding at these ridges, as implicit gradients assume
    GatedKalmaNet exact = make_layer(options, at::kDouble), single = make_layer(options);
    Tensor x = make_input(options, 2, 9, at::kDouble).requires_grad_();
    Tensor x32 = x.detach().to(at::kFloat).requires_grad_();
    const Tensor weights = at::randn({2, 9, options.hidden_size}, at::kDouble);
    std::vector<Tensor> exact_tensors = exact->parameters(), tensors = single->parameters();
    exact_tensors.push_back(x);
    tensors.push_back(x32);
    const auto want =
        torch::autograd::grad({(plain_layer(*exact, x, 0) * weights).sum()}, exact_tensors);
    const auto got =
        torch::autograd::grad({(single->forward(x32) * weights.to(at::kFloat)).sum()}, tensors);
    for (size_t i = 0; i < tensors.size(); ++i) {
      EXPECT_NEAR_RELATIVE(got[i], want[i], 1e-4, name + ", gradient " + std::to_string(i));
    }
  }
}

TEST(GatedKalmaNet, EverySwitchCombinationHasItsParametersAndRuns) {
  const at::NoGradGuard no_grad;
  for (int bits = 0; bits < 256; ++bits) {
    const auto bit = [bits](int i) { return (bits >> i & 1) != 0; };
    GatedKalmaNetOptions o = small_options();
    o.use_beta_gate = bit(0);
    o.use_alpha_connection = bit(1);
    o.use_v_conv = bit(2);
    o.use_forgetting_gate = bit(3);
    o.use_forgetting_gate_kk = bit(4);
    o.gla_rescale = bit(5);
    o.use_gate = bit(6);
    o.learned_ridge = bit(7);
    o.num_v_heads = 4;
    std::map<std::string, std::vector<int64_t>> want = {
        {"q_proj.weight", {8, 10}},     {"k_proj.weight", {8, 10}},     {"v_proj.weight", {16, 10}},
        {"q_conv1d.weight", {8, 1, 4}}, {"k_conv1d.weight", {8, 1, 4}}, {"o_norm.weight", {4}},
        {"o_proj.weight", {10, 16}}};
    const auto linear = [&](const std::string& name, bool bias) {
      want[name + ".weight"] = {4, 10};
      if (bias) want[name + ".bias"] = {4};
    };
    if (o.use_beta_gate) linear("b_proj", true);
    if (o.use_alpha_connection) linear("alpha_proj", true);
    if (o.learned_ridge) linear("ridge_proj", true);
    if (o.use_v_conv) want["v_conv1d.weight"] = {16, 1, 4};
    if (o.use_gate) want["g_proj.weight"] = {16, 10};
    if (o.use_forgetting_gate) {
      linear("a_proj", false);
      want["A_log"] = want["dt_bias"] = {4};
    }
    GatedKalmaNet layer = make_layer(o);
    std::map<std::string, std::vector<int64_t>> got;
    for (const auto& item : layer->named_parameters()) {
      got[item.key()] = item.value().sizes().vec();
    }
    ASSERT_EQ(got, want) << "switches " << bits;
    const Tensor y = layer->forward(make_input(o, 1, 3));
    ASSERT_EQ(y.sizes(), (at::IntArrayRef{1, 3, 10})) << "switches " << bits;
    ASSERT_TRUE(at::isfinite(y).all().item<bool>()) << "switches " << bits;
  }
}

TEST(GatedKalmaNet, InitialisationAndDecayGroups) {
  GatedKalmaNetOptions o = small_options();
  o.num_heads = 64;
  o.learned_ridge = true;
  torch::manual_seed(kSeed);
  GatedKalmaNet layer(o);
  auto p = layer->named_parameters();
  const Tensor A = p["A_log"].exp(), dt = at::softplus(p["dt_bias"]);
  EXPECT_GT(A.min().item<double>(), 0);
  EXPECT_LE(A.max().item<double>(), 16);
  EXPECT_NEAR(A.mean().item<double>(), 8, 2.5);  // 64 draws: 4 standard errors
  EXPECT_GE(dt.min().item<double>(), 0.99e-3);
  EXPECT_LE(dt.max().item<double>(), 1.01e-1);
  EXPECT_NEAR(dt.log().mean().item<double>(), std::log(0.01), 0.7);
  EXPECT_NEAR(p["ridge_proj.bias"].mean().item<double>(), std::log(0.01), 1e-6);
  EXPECT_EQ(p["ridge_proj.weight"].abs().max().item<double>(), 0);
  EXPECT_LE(p["q_conv1d.weight"].abs().max().item<double>(), 0.5);
  // A learned ridge takes no draw: everything else is what the same seed gives a fixed ridge.
  o.learned_ridge = false;
  torch::manual_seed(kSeed);
  GatedKalmaNet fixed(o);
  for (const auto& item : fixed->named_parameters()) {
    EXPECT_TRUE(item.value().equal(p[item.key()])) << item.key();
  }
  EXPECT_THAT(layer->no_weight_decay(),
              testing::UnorderedElementsAre("A_log", "dt_bias", "o_norm.weight", "b_proj.bias",
                                            "alpha_proj.bias", "ridge_proj.bias"));
}

TEST(GatedKalmaNet, ErrorsNameTheOption) {
  const auto construct = [](auto&& change) {
    GatedKalmaNetOptions o = small_options();
    change(o);
    GatedKalmaNet layer(o);
  };
  EXPECT_ERROR(construct([](auto& o) {
                 o.num_heads = 3;
                 o.num_k_heads = 2;
               }),
               "num_k_heads: is 2");
  EXPECT_ERROR(construct([](auto& o) { o.num_v_heads = 3; }), "num_heads: is 2");
  EXPECT_ERROR(construct([](auto& o) { o.num_heads = 0; }), "num_heads: is 0");
  EXPECT_ERROR(construct([](auto& o) { o.head_dim = 257; }), "head_dim: is 257");
  EXPECT_ERROR(construct([](auto& o) {
                 o.head_dim = 5;
                 o.expand_v = 0.5;
               }),
               "expand_v: ");
  EXPECT_ERROR(construct([](auto& o) { o.expand_v = std::nan(""); }), "expand_v: ");
  EXPECT_ERROR(construct([](auto& o) { o.hidden_size = -1; }), "hidden_size: is -1");
  EXPECT_ERROR(construct([](auto& o) { o.conv_size = 17; }), "conv_size: is 17");
  EXPECT_ERROR(construct([](auto& o) { o.num_iter = -1; }), "num_iter: is -1");
  EXPECT_ERROR(construct([](auto& o) { o.ridge_ratio = 0; }), "ridge_ratio: is 0");
  EXPECT_ERROR(construct([](auto& o) { o.tolerance = 2; }), "tolerance: is 2");
  EXPECT_ERROR(construct([](auto& o) { o.solver = "lu"; }), "solver: is \"lu\"");
  EXPECT_ERROR(construct([](auto& o) { o.arithmetic = "half"; }), "arithmetic: is \"half\"");
  EXPECT_ERROR(construct([](auto& o) {
                 o.arithmetic = "bfloat16";
                 o.learned_ridge = true;
               }),
               "arithmetic: is \"bfloat16\"");
  EXPECT_ERROR(construct([](auto& o) { o.qk_norm = "l1"; }), "qk_norm: is \"l1\"");
  EXPECT_ERROR(construct([](auto& o) { o.fixed_alpha = 1.5; }), "fixed_alpha: is 1.5");
  EXPECT_ERROR(construct([](auto& o) {
                 o.fixed_alpha = 0;
                 o.use_alpha_connection = false;
               }),
               "fixed_alpha: is 0 but use_alpha_connection");
  EXPECT_ERROR(construct([](auto& o) {
                 o.fixed_alpha = 0;
                 o.learned_ridge = true;
               }),
               "learned_ridge: ");

  GatedKalmaNet layer = make_layer(small_options());
  EXPECT_ERROR(layer->forward(at::zeros({2, 10})), "x: must have shape");
  EXPECT_ERROR(layer->forward(at::zeros({1, 2, 9})), "hidden_size 10, got [1, 2, 9]");
  EXPECT_ERROR(layer->forward(at::zeros({2, 2, 10}), at::tensor({0, 2}, at::kLong)),
               "cu_seqlens: ");
  const Tensor x = at::zeros({1, 9, 10});
  EXPECT_ERROR(layer->forward(x, at::tensor({0, 8}, at::kLong)), "cu_seqlens: ");
  EXPECT_ERROR(layer->forward(x, at::tensor({0, 9}, at::kInt)), "cu_seqlens: ");
  EXPECT_ERROR(layer->forward(x.to(at::kHalf)), "x: has dtype");
  GkaLayerState state = layer->empty_state(2);
  EXPECT_ERROR(layer->forward(x, {}, &state), "h: of the layer's state must have shape");
  state = layer->empty_state(1);
  state.conv_v = Tensor();
  EXPECT_ERROR(layer->forward(x, {}, &state), "conv_v: of the layer's state");
  EXPECT_EQ(make_layer(small_options(), at::kDouble)->forward(x.to(at::kDouble)).scalar_type(),
            at::kDouble);
}

}  // namespace
}  // namespace kalmanet::test
