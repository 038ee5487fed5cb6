// The fused decode step beside a plain twin: loops in float64 for the convolutions, norms and
// gates, the reference backend for the recurrence. Sequences go on over several calls of several
// tokens.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/gka_oracle.hpp"
#include "cpu/layer_step_case.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// The same layer in float64, with states of its own.
class Twin {
 public:
  template <class T, class P>
  explicit Twin(const LayerStepCase<T, P>& c) : s_(c.spec) {
    h_.assign(static_cast<size_t>(s_.N * s_.H * s_.K * s_.K), 0);
    u_.assign(static_cast<size_t>(s_.N * s_.H * s_.K * s_.V), 0);
  }

  // o [N,T,H,V] of the layer's new tokens.
  template <class T, class P>
  std::vector<double> step(const LayerStepCase<T, P>& c) {
    const int64_t N = s_.N, H = s_.H, K = s_.K, V = s_.V, T_ = c.q.view().size[1];
    auto q = convolve(past_q_, c.q.values(), c.q_weight.values(), T_, s_.Hq * K);
    auto k = convolve(past_k_, c.k.values(), c.k_weight.values(), T_, s_.Hk * K);
    auto v = s_.v_conv ? convolve(past_v_, c.v.values(), c.v_weight.values(), T_, s_.Hv * V)
                       : c.v.values();
    normalise(q);
    normalise(k);
    const auto gates = [](std::vector<double> all, auto f) {
      for (size_t i = 0; i < all.size(); ++i) all[i] = f(all[i], i);
      return all;
    };
    const auto H_ = static_cast<size_t>(H);
    auto beta = gates(c.b.values(), [](double x, size_t) { return sigmoid(x) + 1e-6; });
    auto alpha = gates(c.alpha.values(), [](double x, size_t) { return sigmoid(x); });
    if (!s_.alpha) alpha.assign(static_cast<size_t>(N * T_ * H), s_.fixed_alpha);
    const auto A = c.A_log.values(), dt = c.dt_bias.values();
    auto g = gates(c.a.values(), [&](double x, size_t i) {
      return -std::exp(A[i % H_]) * std::log1p(std::exp(x + dt[i % H_]));
    });
    auto ridge = gates(c.ridge.values(), [](double x, size_t) {
      return std::min(std::max(std::exp(x), 1.2e-4), 0.135);
    });
    const auto per_token = [&](std::vector<double>& values) {
      return values.empty() ? ConstView() : ConstView(dense(values.data(), {N, T_, H}));
    };
    std::vector<double> o(static_cast<size_t>(N * T_ * H * V));
    GkaInputs in;
    in.q = dense(q.data(), {N, T_, s_.Hq, K});
    in.k = dense(k.data(), {N, T_, s_.Hk, K});
    in.v = dense(v.data(), {N, T_, s_.Hv, V});
    in.g = per_token(g);
    in.gk = s_.decay_h ? in.g : ConstView();
    in.alpha = per_token(alpha);
    in.beta = per_token(beta);
    in.ridge_ratio = per_token(ridge);
    GkaOutputs out;
    out.o = dense(o.data(), {N, T_, H, V});
    in.h0 = out.h_final = dense(h_.data(), {N, H, K, K});
    in.u0 = out.u_final = dense(u_.data(), {N, H, K, V});
    GkaOptions options = c.options().gka;
    options.backend = Backend::reference;
    gka_step(in, out, options);
    const auto weight = c.o_norm.values(), gate = c.gate.values();
    for (size_t row = 0; row < o.size(); row += static_cast<size_t>(V)) {
      double sum = 0;
      for (int64_t i = 0; i < V; ++i) sum += o[row + i] * o[row + i];
      const double gain = 1 / std::sqrt(sum / static_cast<double>(V) + 1e-6);
      for (int64_t i = 0; i < V; ++i) {
        o[row + i] *= gain * weight[static_cast<size_t>(i)];
        if (!gate.empty()) o[row + i] *= gate[row + i] * sigmoid(gate[row + i]);
      }
    }
    return o;
  }

  const std::vector<double>& h() const { return h_; }
  const std::vector<double>& u() const { return u_; }

 private:
  // silu(sum_j weight[d,j] x_{t-W+1+j}) with every earlier input kept: [N] lists of rows of D.
  using Past = std::vector<std::vector<double>>;
  std::vector<double> convolve(Past& past, const std::vector<double>& x,
                               const std::vector<double>& weight, int64_t T, int64_t D) {
    past.resize(static_cast<size_t>(s_.N));
    std::vector<double> y(x.size());
    for (int64_t n = 0; n < s_.N; ++n) {
      std::vector<double>& all = past[static_cast<size_t>(n)];
      for (int64_t t = 0; t < T; ++t) {
        const auto row = static_cast<int64_t>(x.size()) / (s_.N * T) * (n * T + t);
        all.insert(all.end(), x.begin() + row, x.begin() + row + D);
        const int64_t seen = static_cast<int64_t>(all.size()) / D;
        for (int64_t d = 0; d < D; ++d) {
          double sum = 0;
          for (int64_t j = 0; j < s_.W; ++j) {
            const int64_t at = seen - s_.W + j;
            if (at >= 0) sum += weight[d * s_.W + j] * all[at * D + d];
          }
          y[row + d] = sum * sigmoid(sum);
        }
      }
    }
    return y;
  }
  void normalise(std::vector<double>& rows) const {
    for (size_t row = 0; row < rows.size(); row += static_cast<size_t>(s_.K)) {
      double sum = 0;
      for (int64_t i = 0; i < s_.K; ++i) sum += rows[row + i] * rows[row + i];
      const double by =
          s_.qk_norm == QkNorm::official ? std::sqrt(sum) + 1e-6 : std::sqrt(sum + 1e-6);
      for (int64_t i = 0; i < s_.K; ++i) rows[row + i] /= by;
    }
  }

  const LayerStepSpec s_;
  std::vector<double> h_, u_;
  Past past_q_, past_k_, past_v_;
};

// Several calls on every instruction set. The bound is the recurrence's (gka_oracle.hpp), twice:
// its inputs are rounded, by the convolutions and the norms, before it begins.
template <class T, class P = T>
void check_against_twin(double bound) {
  for (const LayerStepSpec& spec : kLayerStepSpecs) {
    for (InstructionSet isa : available_instruction_sets()) {
      ForcedInstructionSet forced(isa);
      const Where where{std::string("layer_step of ") + name(DTypeOf<T>::value), name(isa),
                        spec.what};
      LayerStepCase<T, P> layer(spec, 77);
      Twin twin(layer);
      const bool chosen = spec.num_iter == kAutoNumIter || spec.solver == Solver::automatic;
      const double slack = solver_slack<T>(spec.solver) + (chosen ? 2 * layer.kTolerance : 0);
      for (int64_t count : {5, 1, 1, 8}) {
        layer.new_tokens(count);
        const GkaReport report = layer_step(layer.inputs(), layer.states(), layer.o.view(),
                                            layer.residual.view(), layer.options());
        EXPECT_EQ(report.instruction_set, isa);
        EXPECT_EQ(report.solves, spec.N * spec.H * count);
        const std::vector<double> want = twin.step(layer);
        const double rounding = relative_error(rounded(want, DTypeOf<T>::value), want);
        EXPECT_TRUE(within(where, "o", layer.o.values(), want, bound + slack + 1.05 * rounding));
        EXPECT_TRUE(within(where, "h", layer.h.values(), twin.h(), bound));
        EXPECT_TRUE(within(where, "u", layer.u.values(), twin.u(), bound));
        for (double r : layer.residual.values()) EXPECT_LT(r, 2e-3) << where.problem;
        EXPECT_TRUE(layer.o.gaps_intact() && layer.h.gaps_intact() && layer.conv_k.gaps_intact());
      }
    }
  }
}

TEST(LayerStep, GivesWhatThePlainLayerGivesInFloat32) {
  check_against_twin<float>(2e-5);
}
TEST(LayerStep, GivesWhatThePlainLayerGivesInFloat64) {
  check_against_twin<double>(1e-11);
}
TEST(LayerStep, GivesWhatThePlainLayerGivesInBfloat16) {
  check_against_twin<BFloat16>(2e-5);
}
TEST(LayerStep, SixteenBitsBesideFloat32Weights) {
  check_against_twin<Float16, float>(2e-5);
}

// Tokens at once or one by one, on one thread or more: the same bits.
TEST(LayerStep, HasOneMeaning) {
  const int threads = num_threads();
  for (const LayerStepSpec& spec : kLayerStepSpecs) {
    for (const InstructionSet isa : available_instruction_sets()) {
      ForcedInstructionSet forced(isa);
      const std::string what = std::string(spec.what) + ", " + name(isa) + ", seed 5";
      LayerStepCase<float> once(spec, 5), single(spec, 5);
      once.new_tokens(6);
      single.new_tokens(6);
      set_num_threads(3);
      layer_step(once.inputs(), once.states(), once.o.view(), {}, once.options());
      set_num_threads(1);
      for (int64_t t = 0; t < 6; ++t) {
        LayerStepInputs in = single.inputs();
        for (ConstView* x : {&in.q, &in.k, &in.v, &in.gate, &in.b, &in.alpha, &in.a, &in.ridge}) {
          if (x->defined()) {
            x->data = static_cast<const float*>(x->data) + t * x->stride[1];
            x->size[1] = 1;
          }
        }
        View o = single.o.view();
        o.data = static_cast<float*>(o.data) + t * o.stride[1];
        o.size[1] = 1;
        layer_step(in, single.states(), o, {}, single.options());
      }
      set_num_threads(threads);
      EXPECT_EQ(once.o.values(), single.o.values()) << what;
      EXPECT_EQ(once.h.values(), single.h.values()) << what;
      EXPECT_EQ(once.u.values(), single.u.values()) << what;
      EXPECT_EQ(once.conv_q.values(), single.conv_q.values()) << what;
      EXPECT_EQ(once.conv_k.values(), single.conv_k.values()) << what;
      EXPECT_EQ(once.conv_v.values(), single.conv_v.values()) << what;
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
