// Edges of Gated KalmaNet through the public entry points, cpu against reference on every
// instruction set: memories that are empty or were wiped, keys of extreme size, expanded inputs,
// empty batches, outputs left out, numbers that are not finite.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet {
namespace {

using testing::Case;
using testing::CaseSpec;
using testing::describe;
using testing::within;

CaseSpec everything(int64_t T = 80) {
  CaseSpec spec;
  spec.T = T;
  spec.H = 2;
  spec.K = 12;
  spec.V = 9;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.ridge_tensor = spec.h0 = spec.u0 = true;
  return spec;
}

GkaOptions on(Backend backend) {
  GkaOptions options;
  options.backend = backend;
  return options;
}

template <class T>
void run_all(Case<T>& c, Backend backend) {
  gka_forward(c.inputs(), c.outputs(), on(backend));
  gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), on(backend));
}

// Changes a problem, then holds forward, backward and step to the oracle's answer.
void expect_oracle(const CaseSpec& spec, const std::string& what,
                   const std::function<void(Case<float>&)>& change, double bound = 1e-5,
                   double gradient_bound = 1e-4) {
  Case<float> changed(spec);
  change(changed);
  Case<double> oracle = testing::to_double(changed);
  run_all(oracle, Backend::reference);
  for (InstructionSet isa : available_instruction_sets()) {
    set_instruction_set(isa);
    Case<float> cpu(spec);
    change(cpu);
    run_all(cpu, Backend::cpu);
    const std::string problem = what + ", " + describe(spec);
    testing::for_each_output(cpu, oracle, [&](const char* t, const auto& got, const auto& want) {
      EXPECT_TRUE(within({"gka_forward", name(isa), problem}, t, got, want, bound));
    });
    testing::for_each_gradient(cpu, oracle, [&](const char* t, const auto& got, const auto& want) {
      EXPECT_TRUE(within({"gka_backward", name(isa), problem}, t, got, want, gradient_bound));
    });
    cpu.clear_results();
    gka_step(cpu.inputs(), cpu.outputs(), on(Backend::cpu));
    testing::for_each_output(cpu, oracle, [&](const char* t, const auto& got, const auto& want) {
      EXPECT_TRUE(within({"gka_step", name(isa), problem}, t, got, want, bound));
    });
  }
  reset_instruction_set();
}

TEST(GkaEdges, MemoriesThatAreStillEmpty) {
  CaseSpec spec = everything();
  spec.h0 = spec.u0 = false;
  for (int64_t empty : {3, 64, 70}) {
    expect_oracle(spec, std::to_string(empty) + " tokens of zero keys", [&](Case<float>& c) {
      const std::vector<double> k = c.k.values();
      const int64_t token = spec.H * spec.K;
      c.k.fill([&](int64_t i) { return i < empty * token ? 0.0 : k[i]; });
    });
  }
  expect_oracle(spec, "nothing but zero keys",
                [](Case<float>& c) { c.k.fill([](int64_t) { return 0.0; }); });
  expect_oracle(spec, "keys of 2^-31: norms near 2^-61", [&](Case<float>& c) {
    const std::vector<double> k = c.k.values();
    const int64_t token = spec.H * spec.K;
    c.beta.fill([](int64_t) { return 1.0; });
    c.g.fill([](int64_t) { return 0.0; });
    c.gk.fill([](int64_t) { return -1.0; });
    c.k.fill([&](int64_t i) { return i < 20 * token ? k[i] * 0x1p-31 : k[i]; });
  });
}

TEST(GkaEdges, GatesThatWipeTheMemory) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (double strength : {-20.0, -88.0, -200.0, -1e4, -1e30, -kInfinity}) {
    expect_oracle(everything(), "gates of " + std::to_string(strength), [&](Case<float>& c) {
      const std::vector<double> g = c.g.values(), gk = c.gk.values();
      testing::Random random(5);
      c.g.fill([&](int64_t i) { return random.uniform() < 0.1 ? strength : g[i]; });
      c.gk.fill([&](int64_t i) { return random.uniform() < 0.1 ? strength : gk[i]; });
    });
  }
}

// Not a setting of the layer, but the formulas hold: a positive gate lets the past grow.
TEST(GkaEdges, GatesThatLetThePastGrow) {
  for (double growth : {0.5, 2.0}) {
    expect_oracle(everything(), "20 gates of " + std::to_string(growth), [&](Case<float>& c) {
      const std::vector<double> g = c.g.values(), gk = c.gk.values();
      const int64_t end = 20 * c.spec.H;
      c.g.fill([&](int64_t i) { return i < end ? growth : g[i]; });
      c.gk.fill([&](int64_t i) { return i < end ? growth : gk[i]; });
    });
  }
}

TEST(GkaEdges, KeysOfExtremeSize) {
  for (double size : {1e-6, 1e-5, 1e-3, 1e3, 1e5, 1e6}) {
    CaseSpec spec = everything();
    spec.h0 = spec.u0 = false;
    expect_oracle(spec, "keys of size " + std::to_string(size), [&](Case<float>& c) {
      const std::vector<double> k = c.k.values();
      c.k.fill([&](int64_t i) { return k[i] * size; });
      c.d_h_final.fill([](int64_t) { return 0.0; });  // in proportion to nothing else otherwise
    });
  }
}

TEST(GkaEdges, SmallestAndLargestHeads) {
  for (const auto& [K, V] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {1, 256}, {256, 1}}) {
    CaseSpec spec = everything(67);
    spec.K = K;
    spec.V = V;
    expect_oracle(spec, "edge of the head sizes", [](Case<float>&) {});
  }
}

// An input may be expanded: every token or row reads the same memory.
TEST(GkaEdges, ExpandedInputs) {
  CaseSpec spec = everything(20);
  spec.B = 2;
  for (InstructionSet isa : available_instruction_sets()) {
    set_instruction_set(isa);
    Case<float> expanded(spec), written_out(spec);
    GkaInputs in = expanded.inputs();
    in.q.stride[0] = in.k.stride[0] = 0;    // one row for both
    in.v.stride[1] = 0;                     // one value for all tokens
    in.g.stride[1] = in.gk.stride[2] = 0;   // one decay for all tokens, or heads
    in.h0.stride[0] = in.h0.stride[1] = 0;  // one initial state
    written_out.q.assign(testing::values(in.q));
    written_out.k.assign(testing::values(in.k));
    written_out.v.assign(testing::values(in.v));
    written_out.g.assign(testing::values(in.g));
    written_out.gk.assign(testing::values(in.gk));
    written_out.h0.assign(testing::values(in.h0));
    gka_forward(in, expanded.outputs());
    gka_backward(in, {}, expanded.output_grads(), expanded.grads());
    run_all(written_out, Backend::cpu);
    const auto same = [&](const char* t, const ConstView& got, const ConstView& want) {
      EXPECT_TRUE(testing::identical({"expanded inputs", name(isa), describe(spec)}, t, got, want));
    };
    testing::for_each_output(expanded, written_out, same);
    testing::for_each_gradient(expanded, written_out, same);
  }
  reset_instruction_set();
}

TEST(GkaEdges, NoTokensPassTheStatesThrough) {
  for (const auto& lengths : std::vector<std::vector<int64_t>>{{}, {0, 0, 0}}) {
    CaseSpec spec = everything(0);
    spec.lengths = lengths;
    Case<float> c(spec);
    run_all(c, Backend::cpu);
    const testing::Where where{"no tokens", "", describe(spec)};
    EXPECT_TRUE(testing::identical(where, "h_final", c.h_final.view(), c.h0.view()));
    EXPECT_TRUE(testing::identical(where, "u_final", c.u_final.view(), c.u0.view()));
    EXPECT_TRUE(testing::identical(where, "d_h0", c.d_h0.view(), c.d_h_final.view()));
    EXPECT_TRUE(testing::identical(where, "d_u0", c.d_u0.view(), c.d_u_final.view()));
    c.clear_results();
    gka_step(c.inputs(), c.outputs());
    EXPECT_TRUE(testing::identical(where, "h_final of a step", c.h_final.view(), c.h0.view()));
    EXPECT_TRUE(testing::identical(where, "u_final of a step", c.u_final.view(), c.u0.view()));
  }
  // Without an initial state there is nothing: zeros.
  CaseSpec spec = everything(0);
  spec.h0 = spec.u0 = false;
  Case<float> c(spec);
  gka_forward(c.inputs(), c.outputs());
  for (const auto* state : {&c.h_final, &c.u_final}) {
    for (double e : state->values()) EXPECT_EQ(e, 0);
  }
  spec.B = 0;
  spec.T = 9;
  Case<float> none(spec);
  EXPECT_NO_THROW(run_all(none, Backend::cpu));
  EXPECT_NO_THROW(gka_step(none.inputs(), none.outputs()));
}

// What is asked for does not depend on what else is.
TEST(GkaEdges, EachOutputAndGradientAlone) {
  const CaseSpec spec = everything();
  Case<float> all(spec);
  run_all(all, Backend::cpu);
  const auto check = [&](Case<float>& c, const char* wanted) {
    const auto compare = [&](const char* t, const ConstView& got, const ConstView& want) {
      if (std::string(t) == wanted) {
        EXPECT_TRUE(testing::identical({"alone", "", describe(spec)}, t, got, want));
      } else if (std::string(t) != "o" || std::string(wanted).rfind('d', 0) == 0) {
        for (double e : testing::values(got)) ASSERT_TRUE(std::isnan(e)) << t << " with " << wanted;
      }
    };
    testing::for_each_output(c, all, compare);
    testing::for_each_gradient(c, all, compare);
  };
  for (const auto& [wanted, member] :
       std::vector<std::pair<const char*, View GkaOutputs::*>>{{"o", &GkaOutputs::o},
                                                               {"h_final", &GkaOutputs::h_final},
                                                               {"u_final", &GkaOutputs::u_final}}) {
    Case<float> c(spec);
    GkaOutputs only;
    only.o = c.o.view();
    only.*member = c.outputs().*member;
    gka_forward(c.inputs(), only);
    check(c, wanted);
  }
  for (const auto& [wanted, member] : std::vector<std::pair<const char*, View GkaInputGrads::*>>{
           {"dq", &GkaInputGrads::dq},
           {"dk", &GkaInputGrads::dk},
           {"dv", &GkaInputGrads::dv},
           {"dg", &GkaInputGrads::dg},
           {"dgk", &GkaInputGrads::dgk},
           {"dalpha", &GkaInputGrads::dalpha},
           {"dbeta", &GkaInputGrads::dbeta},
           {"d_ridge_ratio", &GkaInputGrads::d_ridge_ratio},
           {"d_h0", &GkaInputGrads::d_h0},
           {"d_u0", &GkaInputGrads::d_u0}}) {
    Case<float> c(spec);
    GkaInputGrads only;
    only.*member = c.grads().*member;
    gka_backward(c.inputs(), {}, c.output_grads(), only);
    check(c, wanted);
  }
}

// A number that is not finite shows in its own head and sequence and nowhere else, and never turns
// into a plausible number.
TEST(GkaEdges, NotANumberStaysInItsHeadAndSequence) {
  CaseSpec spec = everything();
  spec.lengths = {30, 40, 10};
  for (InstructionSet isa : available_instruction_sets()) {
    set_instruction_set(isa);
    for (auto member : {&Case<float>::q, &Case<float>::k, &Case<float>::v}) {
      for (float bad : {NAN, INFINITY}) {
        Case<float> clean(spec), c(spec);
        gka_forward(clean.inputs(), clean.outputs());
        const int64_t dim = member == &Case<float>::v ? spec.V : spec.K;
        (c.*member)[((45 * spec.H) + 1) * dim] = bad;  // sequence 1, its token 15, head 1
        gka_forward(c.inputs(), c.outputs());
        const std::vector<double> got = c.o.values(), want = clean.o.values();
        bool shown = false;
        for (int64_t i = 0; i < std::ssize(got); ++i) {
          const int64_t t = i / spec.V / spec.H, h = i / spec.V % spec.H;
          if (h == 1 && t >= 30 && t < 70) {
            shown |= t == 45 && !std::isfinite(got[i]);
          } else {
            ASSERT_EQ(got[i], want[i]) << "token " << t << " head " << h << ' ' << name(isa);
          }
        }
        EXPECT_TRUE(shown) << "the output of its own token is finite, " << name(isa);
      }
    }
  }
  reset_instruction_set();
}

}  // namespace
}  // namespace kalmanet
