// A layer's decode step to test: its switches, weights, states and the tokens of one call, drawn
// from a fixed seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kalmanet/kalmanet.hpp"
#include "support/tensor.hpp"

namespace kalmanet::testing {

struct LayerStepSpec {
  const char* what;
  int64_t N = 2, H = 4, Hq = 4, Hk = 4, Hv = 4, K = 16, V = 16, W = 4;
  bool b = true, alpha = true, a = true, ridge = false, gate = true, v_conv = true;
  bool decay_h = true, strided = false;
  double fixed_alpha = 1.0;
  QkNorm qk_norm = QkNorm::official;
  Solver solver = Solver::chebyshev;
  int num_iter = 30;
};

inline const std::vector<LayerStepSpec> kLayerStepSpecs = {
    {.what = "published"},
    {.what = "odd sizes, strided", .K = 5, .V = 7, .strided = true},
    {.what = "wide head", .N = 1, .H = 2, .Hq = 2, .Hk = 2, .Hv = 2, .K = 100, .V = 33},
    {.what = "GQA, learned ridge",
     .Hk = 2,
     .Hv = 1,
     .K = 33,
     .V = 20,
     .ridge = true,
     .num_iter = 0},
    {.what = "GVA, fla norm", .Hq = 2, .Hk = 2, .K = 12, .V = 24, .qk_norm = QkNorm::fla},
    {.what = "no gates", .b = false, .alpha = false, .a = false, .gate = false, .v_conv = false},
    {.what = "U alone decays, alpha 0.3, direct",
     .alpha = false,
     .ridge = true,
     .decay_h = false,
     .fixed_alpha = 0.3,
     .solver = Solver::direct},
    {.what = "one tap, auto", .W = 1, .ridge = true, .solver = Solver::automatic},
    {.what = "seven taps, v as it is, strided", .W = 7, .v_conv = false, .strided = true},
};

// Tokens of one call, and what lasts from call to call.
template <class T, class P = T>
struct LayerStepCase {
  using S = StateOf<T>;
  // Of the solvers that choose their steps by it, the oracle's among them: they choose apart.
  static constexpr double kTolerance = std::is_same_v<T, double> ? 1e-13 : 1e-5;
  const LayerStepSpec spec;
  Random random, layout;
  Tensor<P> q_weight, k_weight, v_weight, A_log, dt_bias, o_norm;
  Tensor<S> h, u, conv_q, conv_k, conv_v;
  Tensor<T> q, k, v, gate, b, alpha, a, ridge, o, residual;

  LayerStepCase(const LayerStepSpec& s, uint64_t seed) : spec(s), random(seed), layout(seed + 1) {
    const int64_t N = s.N, H = s.H, K = s.K, V = s.V, W = s.W;
    const auto weight = [&](Tensor<P>& t, std::vector<int64_t> sizes, double at, double spread) {
      t = Tensor<P>(std::move(sizes), s.strided, layout);
      t.fill([&](int64_t) { return at + spread * random.normal(); });
    };
    const auto state = [&](Tensor<S>& t, std::vector<int64_t> sizes) {
      t = Tensor<S>(std::move(sizes), s.strided, layout);
      t.fill([](int64_t) { return 0.0; });
    };
    weight(q_weight, {s.Hq * K, W}, 0, 0.5);
    weight(k_weight, {s.Hk * K, W}, 0, 0.5);
    if (s.v_conv) weight(v_weight, {s.Hv * V, W}, 0, 0.5);
    if (s.a) weight(A_log, {H}, 0, 1);
    if (s.a) weight(dt_bias, {H}, -3, 1);
    weight(o_norm, {V}, 1, 0.2);
    state(h, {N, H, K, K});
    state(u, {N, H, K, V});
    state(conv_q, {N, s.Hq * K, W});
    state(conv_k, {N, s.Hk * K, W});
    if (s.v_conv) state(conv_v, {N, s.Hv * V, W});
  }
  void new_tokens(int64_t count) {
    const LayerStepSpec& s = spec;
    const auto draw = [&](Tensor<T>& t, std::vector<int64_t> sizes, double at = 0) {
      t = Tensor<T>(std::move(sizes), s.strided, layout);
      t.fill([&](int64_t) { return at + random.normal(); });
    };
    draw(q, {s.N, count, s.Hq, s.K});
    draw(k, {s.N, count, s.Hk, s.K});
    draw(v, {s.N, count, s.Hv, s.V});
    if (s.gate) draw(gate, {s.N, count, s.H, s.V});
    if (s.b) draw(b, {s.N, count, s.H});
    if (s.alpha) draw(alpha, {s.N, count, s.H});
    if (s.a) draw(a, {s.N, count, s.H});
    if (s.ridge) draw(ridge, {s.N, count, s.H}, std::log(0.02));  // some beyond the largest
    o = Tensor<T>({s.N, count, s.H, s.V}, s.strided, layout);
    residual = Tensor<T>({s.N, count, s.H}, s.strided, layout);
  }
  LayerStepInputs inputs() const {
    return {q.view(),        k.view(),     v.view(),       gate.view(),     b.view(),
            alpha.view(),    a.view(),     ridge.view(),   q_weight.view(), k_weight.view(),
            v_weight.view(), A_log.view(), dt_bias.view(), o_norm.view()};
  }
  LayerStepStates states() {
    return {h.view(), u.view(), conv_q.view(), conv_k.view(), conv_v.view()};
  }
  LayerStepOptions options() const {
    LayerStepOptions set;
    set.gka.solver = spec.solver;
    set.gka.num_iter = spec.num_iter;
    set.gka.tolerance = kTolerance;
    set.decay_h = spec.decay_h;
    set.fixed_alpha = spec.fixed_alpha;
    set.qk_norm = spec.qk_norm;
    return set;
  }
};

}  // namespace kalmanet::testing
