// The public entry points of the causal convolution and the norms: that they validate, and
// that they reach the kernels with the right arguments (kernels are tested in tests/cpu).
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kalmanet/kalmanet.hpp"

namespace kalmanet {
namespace {

float silu(float x) {
  return x / (1 + std::exp(-x));
}

TEST(ConvApi, ForwardBackwardAndStep) {
  constexpr int64_t T = 6, D = 3, W = 4;
  std::vector<float> x(T * D), weight(D * W), y(T * D), final_state(D * W), stepped(T * D);
  for (int64_t i = 0; i < T * D; ++i) x[i] = std::sin(1.0f + static_cast<float>(i));
  for (int64_t i = 0; i < D * W; ++i) weight[i] = std::cos(static_cast<float>(i));
  const ConvInputs in{dense(x.data(), {1, T, D}), dense(weight.data(), {D, W}), {}, {}};
  causal_conv_forward(in, dense(y.data(), {1, T, D}), dense(final_state.data(), {1, D, W}), true);
  std::vector<float> state(D * W, 0.0f);
  for (int64_t t = 0; t < T; ++t) {
    causal_conv_step(dense(&x[t * D], {1, D}), dense(weight.data(), {D, W}),
                     dense(state.data(), {1, D, W}), dense(&stepped[t * D], {1, D}), true);
    for (int64_t d = 0; d < D; ++d) {
      float sum = 0;
      for (int64_t j = 0; j < W; ++j) {
        const int64_t s = t - W + 1 + j;
        if (s >= 0) sum += weight[d * W + j] * x[s * D + d];
      }
      EXPECT_NEAR(y[t * D + d], silu(sum), 1e-6) << "token " << t << ", channel " << d;
      EXPECT_NEAR(stepped[t * D + d], silu(sum), 1e-6) << "token " << t << ", channel " << d;
    }
  }
  EXPECT_EQ(state, final_state);

  // dweight[d, W-1] without activation is <dy, x>; dx of a 1-wide window is dy weight.
  std::vector<float> dy(T * D, 0.5f), dx(T * D), dweight(D * W);
  causal_conv_backward(in, dense(dy.data(), {1, T, D}), {}, dense(dx.data(), {1, T, D}),
                       dense(dweight.data(), {D, W}), {}, false);
  for (int64_t d = 0; d < D; ++d) {
    float sum = 0, weights = 0;
    for (int64_t t = 0; t < T; ++t) sum += 0.5f * x[t * D + d];
    for (int64_t j = 0; j < W; ++j) weights += 0.5f * weight[d * W + j];
    EXPECT_NEAR(dweight[d * W + W - 1], sum, 1e-5);
    EXPECT_NEAR(dx[d], weights, 1e-5) << "the first token feeds all W outputs after it";
  }
}

TEST(ConvApi, ErrorsComeBeforeAnyWrite) {
  std::vector<float> memory(64, 7.0f);
  ConvInputs in{dense(memory.data(), {1, 4, 2}), dense(memory.data(), {2, 17}), {}, {}};
  try {
    causal_conv_forward(in, dense(memory.data(), {1, 4, 2}), {}, true);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), "weight");
  }
  EXPECT_THROW(causal_conv_step(in.x, in.weight, {}, {}, true), Error);
  EXPECT_THROW(causal_conv_backward(in, {}, {}, {}, {}, {}, true), Error);
  for (float e : memory) EXPECT_EQ(e, 7.0f);
}

TEST(NormApi, ForwardAndBackward) {
  constexpr int64_t R = 3, V = 5;
  std::vector<float> o(R * V), gate(R * V), weight(V), y(R * V), dy(R * V, 1.0f), d_weight(V);
  for (int64_t i = 0; i < R * V; ++i) {
    o[i] = std::sin(2.0f * static_cast<float>(i) + 1);
    gate[i] = std::cos(static_cast<float>(i));
  }
  for (int64_t i = 0; i < V; ++i) weight[i] = 1 + 0.1f * static_cast<float>(i);
  const NormInputs in{dense(o.data(), {R, V}), dense(gate.data(), {R, V}),
                      dense(weight.data(), {V}), 1e-6};
  gated_rms_norm_forward(in, dense(y.data(), {R, V}));
  gated_rms_norm_backward(in, dense(dy.data(), {R, V}), {}, {}, dense(d_weight.data(), {V}));
  std::vector<float> expected_weight(V, 0.0f);
  for (int64_t r = 0; r < R; ++r) {
    double mean = 0;
    for (int64_t i = 0; i < V; ++i) mean += o[r * V + i] * o[r * V + i] / double(V);
    for (int64_t i = 0; i < V; ++i) {
      const double normed = o[r * V + i] / std::sqrt(mean + 1e-6) * silu(gate[r * V + i]);
      EXPECT_NEAR(y[r * V + i], weight[i] * normed, 1e-5);
      expected_weight[i] += static_cast<float>(normed);
    }
  }
  for (int64_t i = 0; i < V; ++i) EXPECT_NEAR(d_weight[i], expected_weight[i], 1e-5);
  NormInputs bad = in;
  bad.eps = -1;
  EXPECT_THROW(gated_rms_norm_forward(bad, dense(y.data(), {R, V})), Error);
  EXPECT_THROW(gated_rms_norm_backward(in, {}, {}, {}, {}), Error);
}

TEST(UnitNormApi, ForwardAndBackward) {
  constexpr int64_t R = 3, K = 5;
  std::vector<float> x(R * K), y(R * K), dy(R * K), dx(R * K);
  for (int64_t i = 0; i < R * K; ++i) {
    x[i] = std::sin(2.0f * static_cast<float>(i) + 1);
    dy[i] = std::cos(static_cast<float>(i));
  }
  for (const QkNorm kind : {QkNorm::official, QkNorm::fla}) {
    const UnitNormInputs in{dense(x.data(), {R, K}), kind, 0.25};
    unit_norm_forward(in, dense(y.data(), {R, K}));
    unit_norm_backward(in, dense(dy.data(), {R, K}), dense(dx.data(), {R, K}));
    for (int64_t r = 0; r < R; ++r) {
      double square = 0, dot = 0;
      for (int64_t i = r * K; i < (r + 1) * K; ++i) {
        square += double{x[i]} * x[i];
        dot += double{x[i]} * dy[i];
      }
      const bool fla = kind == QkNorm::fla;
      const double s = fla ? std::sqrt(square + 0.25) : std::sqrt(square) + 0.25;
      const double along = dot / ((fla ? s : std::sqrt(square)) * s * s);
      for (int64_t i = r * K; i < (r + 1) * K; ++i) {
        EXPECT_NEAR(y[i], x[i] / s, 1e-6);
        EXPECT_NEAR(dx[i], dy[i] / s - x[i] * along, 1e-6);
      }
    }
  }
  const UnitNormInputs bad{dense(x.data(), {R, K}), QkNorm::official, 0};
  EXPECT_THROW(unit_norm_forward(bad, dense(y.data(), {R, K})), Error);
  EXPECT_THROW(unit_norm_backward(bad, dense(dy.data(), {R, K}), dense(dx.data(), {R, K})), Error);
}

}  // namespace
}  // namespace kalmanet
