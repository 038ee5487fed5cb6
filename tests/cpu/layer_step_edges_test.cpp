// The fused decode step where it must say no, and at its edges: nothing to do, numbers that are not
// finite, sequences that must not see each other.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cpu/gka_oracle.hpp"
#include "cpu/layer_step_case.hpp"
#include "kalmanet/kalmanet.hpp"

namespace kalmanet::testing {
namespace {

// Every mistake names its argument, and nothing is written.
TEST(LayerStep, NamesTheArgumentThatDoesNotFit) {
  using Step = LayerStepCase<float>;
  struct Mistake {
    const char* argument;
    void (*make)(LayerStepInputs&, LayerStepStates&, LayerStepOptions&);
  };
  const std::vector<Mistake> mistakes = {
      {"q", [](auto& in, auto&, auto&) { in.q = {}; }},
      {"h", [](auto&, auto& s, auto&) { s.h = {}; }},
      {"u", [](auto&, auto& s, auto&) { s.u = {}; }},
      {"k", [](auto& in, auto&, auto&) { in.k.size[2] = 3; }},
      {"v", [](auto& in, auto&, auto&) { in.v.dtype = DType::bfloat16; }},
      {"h", [](auto&, auto& s, auto&) { s.h.size[3] = 5; }},
      {"u", [](auto&, auto& s, auto&) { s.u.dtype = DType::float64; }},
      {"gate", [](auto& in, auto&, auto&) { in.gate.size[3] = 3; }},
      {"b", [](auto& in, auto&, auto&) { in.b.size[2] = 1; }},
      {"alpha", [](auto& in, auto&, auto&) { in.alpha.dtype = DType::float64; }},
      {"a", [](auto& in, auto&, auto&) { in.a.rank = 2; }},
      {"A_log", [](auto& in, auto&, auto&) { in.A_log = {}; }},
      {"dt_bias", [](auto& in, auto&, auto&) { in.dt_bias.size[0] = 1; }},
      {"o_norm", [](auto& in, auto&, auto&) { in.o_norm = {}; }},
      {"conv_q_weight", [](auto& in, auto&, auto&) { in.conv_q_weight = {}; }},
      {"conv_k_weight", [](auto& in, auto&, auto&) { in.conv_k_weight.size[1] = 3; }},
      {"conv_v_weight", [](auto& in, auto&, auto&) { in.conv_v_weight.size[0] = 3; }},
      {"conv_k", [](auto&, auto& s, auto&) { s.conv_k.size[0] = 1; }},
      {"conv_v", [](auto& in, auto&, auto&) { in.conv_v_weight = {}; }},
      {"conv_k", [](auto&, auto& s, auto&) { s.conv_q = s.conv_k; }},
      {"conv_k", [](auto&, auto& s, auto&) { s.conv_k = {}; }},
      {"fixed_alpha", [](auto&, auto&, auto& o) { o.fixed_alpha = 1.5; }},
      {"min_ridge", [](auto&, auto&, auto& o) { o.min_ridge = 0; }},
      {"min_ridge", [](auto&, auto&, auto& o) { o.min_ridge = 1e-50; }},
      {"min_ridge", [](auto&, auto&, auto& o) { o.min_ridge = NAN; }},
      {"max_ridge", [](auto&, auto&, auto& o) { o.max_ridge = INFINITY; }},
      {"max_ridge", [](auto&, auto&, auto& o) { o.max_ridge = 1e-5; }},
      {"norm_eps", [](auto&, auto&, auto& o) { o.norm_eps = -1; }},
      {"qk_norm", [](auto&, auto&, auto& o) { o.qk_norm = static_cast<QkNorm>(9); }},
      {"ridge_ratio", [](auto&, auto&, auto& o) { o.gka.ridge_ratio = 0; }},
      {"num_iter", [](auto&, auto&, auto& o) { o.gka.num_iter = -1; }},
      {"backend", [](auto&, auto&, auto& o) { o.gka.backend = Backend::reference; }},
  };
  for (const Mistake& mistake : mistakes) {
    Step layer(kLayerStepSpecs[0], 3);
    layer.new_tokens(1);
    LayerStepInputs in = layer.inputs();
    LayerStepStates states = layer.states();
    LayerStepOptions options = layer.options();
    mistake.make(in, states, options);
    try {
      layer_step(in, states, layer.o.view(), {}, options);
      ADD_FAILURE() << mistake.argument << ": no error";
    } catch (const Error& e) {
      EXPECT_EQ(e.argument(), mistake.argument) << e.what();
    }
    for (double e : layer.o.values()) ASSERT_TRUE(std::isnan(e)) << mistake.argument;
    for (double e : layer.h.values()) ASSERT_EQ(e, 0.0) << mistake.argument;
  }
}

// What is written: its shape, its dtype, memory of its own.
TEST(LayerStep, NamesTheOutputThatDoesNotFit) {
  LayerStepCase<float> layer(kLayerStepSpecs[0], 3);
  layer.new_tokens(2);
  const auto fails = [&](const char* argument, View o, View residual) {
    try {
      layer_step(layer.inputs(), layer.states(), o, residual, layer.options());
      ADD_FAILURE() << argument << ": no error";
    } catch (const Error& e) {
      EXPECT_EQ(e.argument(), argument) << e.what();
    }
    for (double e : layer.h.values()) ASSERT_EQ(e, 0.0) << argument;
  };
  const View o = layer.o.view(), residual = layer.residual.view();
  View bad = o;
  bad.size[1] = 1;
  fails("o", bad, {});
  bad = o;
  bad.dtype = DType::float64;
  fails("o", bad, {});
  fails("o", {}, {});
  bad = residual;
  bad.size[2] = 1;
  fails("residual", o, bad);
  fails("o", layer.gate.view(), {});
  fails("o", layer.q.view(), {});
}

// A NaN among the ridge's logits would leave every solver without a count of its steps.
TEST(LayerStep, RidgeLogitsThatAreNotFinite) {
  LayerStepSpec spec = kLayerStepSpecs[3];
  ASSERT_TRUE(spec.ridge);
  for (const Solver solver : {Solver::chebyshev, Solver::direct, Solver::automatic}) {
    spec.solver = solver;
    LayerStepCase<float> layer(spec, 9), same(spec, 9);
    layer.new_tokens(2);
    same.new_tokens(2);
    float* const logit = static_cast<float*>(layer.ridge.view().data);
    logit[3] = std::numeric_limits<float>::quiet_NaN();
    try {
      layer_step(layer.inputs(), layer.states(), layer.o.view(), {}, layer.options());
      ADD_FAILURE() << name(solver) << ": no error";
    } catch (const Error& e) {
      EXPECT_EQ(e.argument(), "ridge") << e.what();
    }
    for (double e : layer.u.values()) ASSERT_EQ(e, 0.0);
    // Infinite logits are clamped as large ones are.
    logit[3] = std::numeric_limits<float>::infinity();
    static_cast<float*>(same.ridge.view().data)[3] = 100.0f;
    layer_step(layer.inputs(), layer.states(), layer.o.view(), {}, layer.options());
    layer_step(same.inputs(), same.states(), same.o.view(), {}, same.options());
    EXPECT_EQ(layer.o.values(), same.o.values()) << name(solver);
  }
}

// NaN in one sequence stays there.
TEST(LayerStep, SequencesNeverSeeEachOther) {
  for (const LayerStepSpec& spec : kLayerStepSpecs) {
    if (spec.N < 2) continue;
    for (const InstructionSet isa : available_instruction_sets()) {
      ForcedInstructionSet forced(isa);
      LayerStepCase<float> clean(spec, 13), spoilt(spec, 13);
      for (const int64_t T : {3, 1}) {
        clean.new_tokens(T);
        spoilt.new_tokens(T);
        static_cast<float*>(spoilt.v.view().data)[0] = std::numeric_limits<float>::quiet_NaN();
        layer_step(clean.inputs(), clean.states(), clean.o.view(), {}, clean.options());
        layer_step(spoilt.inputs(), spoilt.states(), spoilt.o.view(), {}, spoilt.options());
      }
      const auto want = clean.o.values(), got = spoilt.o.values();
      const size_t half = want.size() / static_cast<size_t>(spec.N);
      EXPECT_TRUE(std::isnan(got[0])) << spec.what << ", " << name(isa);
      EXPECT_EQ(std::vector(got.begin() + half, got.end()),
                std::vector(want.begin() + half, want.end()))
          << spec.what << ", " << name(isa);
    }
  }
}

TEST(LayerStep, NothingToDoLeavesTheStatesAlone) {
  for (const LayerStepSpec& spec : kLayerStepSpecs) {
    LayerStepCase<float> layer(spec, 21);
    layer.new_tokens(3);
    layer_step(layer.inputs(), layer.states(), layer.o.view(), {}, layer.options());
    const auto h = layer.h.values(), u = layer.u.values(), conv_q = layer.conv_q.values();
    layer.new_tokens(0);
    layer_step(layer.inputs(), layer.states(), layer.o.view(), {}, layer.options());
    EXPECT_EQ(layer.h.values(), h) << spec.what;
    EXPECT_EQ(layer.u.values(), u) << spec.what;
    EXPECT_EQ(layer.conv_q.values(), conv_q) << spec.what;
  }
  LayerStepSpec none = kLayerStepSpecs[0];
  none.N = 0;
  LayerStepCase<float> layer(none, 1);
  layer.new_tokens(1);
  const GkaReport report =
      layer_step(layer.inputs(), layer.states(), layer.o.view(), {}, layer.options());
  EXPECT_EQ(report.solves, 0);
}

}  // namespace
}  // namespace kalmanet::testing
