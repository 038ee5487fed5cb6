// The C ABI computes what the C++ interface computes, bit for bit, for every entry point and
// option; and structs of other versions are read as their callers meant them.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "api/c_call.hpp"
#include "api/c_structs.hpp"
#include "kalmanet/kalmanet.hpp"

namespace kalmanet {
namespace {

using testing::c_inputs;
using testing::c_outputs;
using testing::Case;
using testing::CaseSpec;
using testing::CPlan;
using testing::describe;
using testing::ok;

CaseSpec everything() {
  CaseSpec spec;
  spec.B = 2;
  spec.T = 45;
  spec.H = 4;
  spec.Hk = 2;
  spec.Hv = 1;
  spec.K = 20;
  spec.V = 12;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.ridge_tensor = spec.h0 = spec.u0 = true;
  spec.strided = true;
  return spec;
}

// The same options for both.
struct Options {
  std::string what;
  GkaOptions cpp;
  kalmanet_gka_options c = KALMANET_GKA_OPTIONS_INIT;
};

std::vector<Options> options_to_try() {
  std::vector<Options> all;
  const auto add = [&](const char* what, auto set) {
    Options o;
    o.what = what;
    set(o.cpp, o.c);
    all.push_back(o);
  };
  using Cpp = GkaOptions;
  using C = kalmanet_gka_options;
  add("defaults", [](Cpp&, C&) {});
  add("scale", [](Cpp& a, C& b) { a.scale = b.scale = -0.5; });
  add("ridge ratio", [](Cpp& a, C& b) { a.ridge_ratio = b.ridge_ratio = 0.1; });
  add("num_iter", [](Cpp& a, C& b) { a.num_iter = b.num_iter = 7; });
  add("automatic num_iter", [](Cpp& a, C& b) {
    a.num_iter = kAutoNumIter;
    b.num_iter = KALMANET_AUTO_NUM_ITER;
    a.tolerance = b.tolerance = 1e-3;
  });
  add("no gradient through the norm", [](Cpp& a, C& b) {
    a.bp_lambda = false;
    b.bp_lambda = 0;
  });
  add("chunks of 5", [](Cpp& a, C& b) { a.chunk_size = b.chunk_size = 5; });
  add("cpu by name", [](Cpp& a, C& b) {
    a.backend = Backend::cpu;
    b.backend = KALMANET_BACKEND_CPU;
  });
  const auto on_reference = [&](const char* what, Solver solver, int32_t c_solver) {
    add(what, [=](Cpp& a, C& b) {
      a.backend = Backend::reference;
      b.backend = KALMANET_BACKEND_REFERENCE;
      a.solver = solver;
      b.solver = c_solver;
    });
  };
  on_reference("reference", Solver::chebyshev, KALMANET_SOLVER_CHEBYSHEV);
  on_reference("reference, direct", Solver::direct, KALMANET_SOLVER_DIRECT);
  on_reference("reference, cg", Solver::cg, KALMANET_SOLVER_CG);
  return all;
}

void expect_same_report(const GkaReport& cpp, const kalmanet_gka_report& c,
                        const std::string& what) {
  EXPECT_EQ(c.backend, static_cast<int32_t>(cpp.backend)) << what;
  EXPECT_EQ(c.instruction_set, static_cast<int32_t>(cpp.instruction_set)) << what;
  EXPECT_EQ(c.min_iterations, cpp.min_iterations) << what;
  EXPECT_EQ(c.max_iterations, cpp.max_iterations) << what;
  EXPECT_EQ(c.chunk_size, cpp.chunk_size) << what;
  EXPECT_EQ(c.struct_size, sizeof c) << what;
}

// Forward, step and backward (with saved x and without) of one problem through both interfaces.
template <class T>
void expect_same_bits(const CaseSpec& spec, const Options& options) {
  const std::string what = options.what + ", " + describe(spec);
  const CPlan plan(options.c);
  const auto compare = [&](const char* operation, auto&& cpp_call, auto&& c_call) {
    Case<T> cpp(spec), c(spec);
    kalmanet_gka_report c_report = KALMANET_GKA_REPORT_INIT;
    const GkaReport cpp_report = cpp_call(cpp);
    ASSERT_TRUE(ok(c_call(c, &c_report))) << operation << ", " << what;
    expect_same_report(cpp_report, c_report, what);
    const auto same = [&](const char* t, const ConstView& got, const ConstView& want) {
      EXPECT_TRUE(testing::identical({operation, "", what}, t, got, want));
    };
    testing::for_each_output(c, cpp, same);
    same("x", c.x.view(), cpp.x.view());
    same("residual", c.residual.view(), cpp.residual.view());
    testing::for_each_gradient(c, cpp, same);
    EXPECT_TRUE(c.gaps_intact()) << operation << ", " << what;
  };
  compare(
      "forward", [&](Case<T>& c) { return gka_forward(c.inputs(), c.outputs(), options.cpp); },
      [&](Case<T>& c, auto* report) { return testing::c_forward(plan.plan, c, report); });
  compare(
      "step", [&](Case<T>& c) { return gka_step(c.inputs(), c.outputs(), options.cpp); },
      [&](Case<T>& c, auto* report) { return testing::c_step(plan.plan, c, report); });
  for (bool saved : {false, true}) {
    compare(
        saved ? "backward with saved x" : "backward",
        [&](Case<T>& c) {
          gka_forward(c.inputs(), c.outputs(), options.cpp);
          return gka_backward(c.inputs(), saved ? c.x.view() : ConstView(), c.output_grads(),
                              c.grads(), options.cpp);
        },
        [&](Case<T>& c, auto* report) {
          EXPECT_TRUE(ok(testing::c_forward(plan.plan, c)));
          return testing::c_backward(plan.plan, c, report, saved);
        });
  }
}

TEST(CGka, EveryOptionGivesTheBitsOfTheCppInterface) {
  CaseSpec scalar_ridge = everything();
  scalar_ridge.ridge_tensor = false;
  for (const Options& options : options_to_try()) {
    expect_same_bits<float>(everything(), options);
    expect_same_bits<float>(scalar_ridge, options);
  }
}

TEST(CGka, EveryKindOfProblemGivesTheBitsOfTheCppInterface) {
  std::vector<CaseSpec> specs(4, everything());
  specs[0].lengths = {5, 0, 1, 40, 13};  // packed
  specs[1] = CaseSpec();                 // nothing optional at all
  specs[2].T = 1;
  specs[3].Hq = specs[3].Hk = 1;
  specs[3].Hv = 4;
  for (const CaseSpec& spec : specs) expect_same_bits<float>(spec, Options());
  Options reference;
  reference.what = "reference";
  reference.cpp.backend = Backend::reference;
  reference.c.backend = KALMANET_BACKEND_REFERENCE;
  expect_same_bits<double>(everything(), reference);
}

TEST(CGka, AStateIsUpdatedInPlace) {
  CaseSpec spec = everything();
  Case<float> expected(spec), c(spec);
  gka_forward(expected.inputs(), expected.outputs());
  const CPlan plan;
  kalmanet_gka_inputs in = c_inputs(c.inputs());
  kalmanet_gka_outputs out = c_outputs(c.outputs());
  out.h_final = in.h0;
  out.u_final = in.u0;
  ASSERT_TRUE(ok(kalmanet_gka_forward(plan.plan, &in, &out, nullptr)));
  const testing::Where where{"forward in place", "", describe(spec)};
  EXPECT_TRUE(testing::identical(where, "h0", c.h0.view(), expected.h_final.view()));
  EXPECT_TRUE(testing::identical(where, "u0", c.u0.view(), expected.u_final.view()));
}

TEST(CGka, NullOptionsAreTheDefaults) {
  kalmanet_gka_plan* plan = nullptr;
  ASSERT_TRUE(ok(kalmanet_gka_plan_create(nullptr, &plan)));
  Case<float> expected(everything()), c(everything());
  gka_forward(expected.inputs(), expected.outputs());
  EXPECT_TRUE(ok(testing::c_forward(plan, c)));
  EXPECT_TRUE(
      testing::identical({"forward", "", "null options"}, "o", c.o.view(), expected.o.view()));
  kalmanet_gka_plan_destroy(plan);
  kalmanet_gka_plan_destroy(nullptr);
}

// ---- structs of other versions

// A struct from a caller that knew fewer fields: what it had lies before garbage.
template <class S>
S shortened(const S& whole, size_t bytes) {
  S cut = whole;
  std::memset(reinterpret_cast<char*>(&cut) + bytes, 0xAB, sizeof cut - bytes);
  cut.struct_size = static_cast<uint32_t>(bytes);
  return cut;
}

TEST(CVersions, ShorterOptionsHaveDefaultsForWhatIsMissing) {
  using S = kalmanet_gka_options;
  S options = KALMANET_GKA_OPTIONS_INIT;
  options.num_iter = 9;
  options.ridge_ratio = 0.1;
  options.scale = 0.25;
  CaseSpec spec = everything();
  spec.ridge_tensor = false;
  for (const size_t size :
       {offsetof(S, num_iter), offsetof(S, backend), offsetof(S, tolerance), offsetof(S, bp_lambda),
        offsetof(S, executor), offsetof(S, arithmetic), offsetof(S, stream), sizeof(S)}) {
    GkaOptions cpp;
    if (size > offsetof(S, num_iter)) cpp.num_iter = 9;
    if (size > offsetof(S, ridge_ratio)) cpp.ridge_ratio = 0.1;
    if (size > offsetof(S, scale)) cpp.scale = 0.25;
    Case<float> expected(spec), c(spec);
    gka_forward(expected.inputs(), expected.outputs(), cpp);
    const CPlan plan(shortened(options, size));
    ASSERT_TRUE(ok(testing::c_forward(plan.plan, c))) << size;
    EXPECT_TRUE(testing::identical({"forward", "", std::to_string(size) + " bytes of options"}, "o",
                                   c.o.view(), expected.o.view()));
  }
}

TEST(CVersions, TheStreamIsAnAppendedField) {
  using S = kalmanet_gka_options;
  int there = 0;
  S options = KALMANET_GKA_OPTIONS_INIT;
  EXPECT_EQ(api::options_of(api::read_options(&options)).stream, nullptr);
  options.stream = &there;
  EXPECT_EQ(api::options_of(api::read_options(&options)).stream, &there);
  // What a caller compiled before the field was there hands over: garbage behind its own end.
  const S older = shortened(options, offsetof(S, stream));
  EXPECT_EQ(api::options_of(api::read_options(&older)).stream, nullptr);
  // The CPU does not look at it.
  Case<float> expected(everything()), c(everything());
  gka_forward(expected.inputs(), expected.outputs(), {});
  const CPlan plan(options);
  ASSERT_TRUE(ok(testing::c_forward(plan.plan, c)));
  EXPECT_TRUE(testing::identical({"forward", "", "a stream"}, "o", c.o.view(), expected.o.view()));
}

TEST(CGka, ArithmeticIsPassedOnAndReported) {
  CaseSpec spec = everything();
  spec.ridge_tensor = false;
  GkaOptions cpp;
  cpp.arithmetic = Arithmetic::bfloat16;
  Case<float> expected(spec), c(spec);
  const GkaReport want = gka_forward(expected.inputs(), expected.outputs(), cpp);
  EXPECT_GT(want.bfloat16_solves, 0);
  kalmanet_gka_options options = KALMANET_GKA_OPTIONS_INIT;
  options.arithmetic = KALMANET_ARITHMETIC_BFLOAT16;
  kalmanet_gka_report report = KALMANET_GKA_REPORT_INIT;
  const CPlan plan(options);
  ASSERT_TRUE(ok(testing::c_forward(plan.plan, c, &report)));
  EXPECT_TRUE(testing::identical({"forward", "", "bfloat16"}, "o", c.o.view(), expected.o.view()));
  EXPECT_EQ(report.bfloat16_solves, want.bfloat16_solves);
  EXPECT_EQ(report.bfloat16_instructions, want.bfloat16_instructions ? 1 : 0);
}

TEST(CVersions, ShorterInputsAndOutputsLackTheirLastTensors) {
  using In = kalmanet_gka_inputs;
  using Out = kalmanet_gka_outputs;
  const CaseSpec spec = everything();
  const CPlan plan;
  for (const size_t size : {offsetof(In, g), offsetof(In, alpha), offsetof(In, h0),
                            offsetof(In, u0), offsetof(In, cu_seqlens)}) {
    Case<float> expected(spec), c(spec);
    GkaInputs in = expected.inputs();
    if (size <= offsetof(In, g)) in.g = {};
    if (size <= offsetof(In, gk)) in.gk = {};
    if (size <= offsetof(In, alpha)) in.alpha = {};
    if (size <= offsetof(In, beta)) in.beta = {};
    if (size <= offsetof(In, ridge_ratio)) in.ridge_ratio = {};
    if (size <= offsetof(In, h0)) in.h0 = {};
    if (size <= offsetof(In, u0)) in.u0 = {};
    GkaOutputs out = expected.outputs();
    out.x = out.residual = {};
    gka_forward(in, out);
    const In c_in = shortened(c_inputs(c.inputs()), size);
    const Out c_out = shortened(c_outputs(c.outputs()), offsetof(Out, x));
    ASSERT_TRUE(ok(kalmanet_gka_forward(plan.plan, &c_in, &c_out, nullptr))) << size;
    const testing::Where where{"forward", "", std::to_string(size) + " bytes of inputs"};
    testing::for_each_output(c, expected, [&](const char* t, const auto& got, const auto& want) {
      EXPECT_TRUE(testing::identical(where, t, got, want));
    });
    for (double e : c.x.values()) ASSERT_TRUE(std::isnan(e)) << "x was written";
  }
}

TEST(CVersions, ShorterGradientsAreNotComputed) {
  using Out = kalmanet_gka_output_grads;
  using In = kalmanet_gka_input_grads;
  const CaseSpec spec = everything();
  Case<float> expected(spec), c(spec);
  GkaOutputGrads d_out = expected.output_grads();
  d_out.d_h_final = d_out.d_u_final = {};
  GkaInputGrads grads;
  grads.dq = expected.dq.view();
  grads.dk = expected.dk.view();
  gka_backward(expected.inputs(), {}, d_out, grads);
  const CPlan plan;
  const kalmanet_gka_inputs in = c_inputs(c.inputs());
  const Out c_d_out =
      shortened(testing::c_output_grads(c.output_grads()), offsetof(Out, d_h_final));
  const In c_grads = shortened(testing::c_input_grads(c.grads()), offsetof(In, dv));
  ASSERT_TRUE(ok(kalmanet_gka_backward(plan.plan, &in, nullptr, &c_d_out, &c_grads, nullptr)));
  const testing::Where where{"backward", "", "short structs"};
  testing::for_each_gradient(c, expected, [&](const char* t, const auto& got, const auto& want) {
    EXPECT_TRUE(testing::identical(where, t, got, want));
  });
}

TEST(CVersions, AShorterReportIsFilledInAsFarAsItGoes) {
  using S = kalmanet_gka_report;
  const CPlan plan;
  for (const size_t size : {offsetof(S, instruction_set), offsetof(S, chunk_size), sizeof(S)}) {
    Case<float> c(everything());
    S report;
    std::memset(&report, 0xAB, sizeof report);
    report.struct_size = static_cast<uint32_t>(size);
    ASSERT_TRUE(ok(testing::c_forward(plan.plan, c, &report)));
    EXPECT_EQ(report.struct_size, size);
    EXPECT_EQ(report.backend, KALMANET_BACKEND_CPU);
    const auto* bytes = reinterpret_cast<const unsigned char*>(&report);
    for (size_t i = size; i < sizeof report; ++i) ASSERT_EQ(bytes[i], 0xAB) << i << " of " << size;
  }
}

// A caller from the future: one more field.
struct NewerOptions {
  kalmanet_gka_options known = KALMANET_GKA_OPTIONS_INIT;
  int64_t unknown = 0;
};

TEST(CVersions, LongerStructsPassIfTheRestIsZero) {
  NewerOptions options;
  options.known.struct_size = sizeof options;
  options.known.num_iter = 9;
  Case<float> expected(everything()), c(everything());
  GkaOptions cpp;
  cpp.num_iter = 9;
  gka_forward(expected.inputs(), expected.outputs(), cpp);
  const CPlan plan(options.known);  // a reference: the rest lies behind it
  ASSERT_TRUE(ok(testing::c_forward(plan.plan, c)));
  EXPECT_TRUE(
      testing::identical({"forward", "", "newer options"}, "o", c.o.view(), expected.o.view()));
  options.unknown = int64_t{1} << 40;
  kalmanet_gka_plan* none = nullptr;
  EXPECT_TRUE(testing::fails(kalmanet_gka_plan_create(&options.known, &none), KALMANET_UNSUPPORTED,
                             "options", "built for a newer kalmanet"));
  EXPECT_EQ(none, nullptr);
}

}  // namespace
}  // namespace kalmanet
