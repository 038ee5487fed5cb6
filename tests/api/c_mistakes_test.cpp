// Bad calls through the C ABI: each gives its status, names the argument, and writes nothing; and
// how errors are kept.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "api/c_call.hpp"
#include "kalmanet/kalmanet.hpp"

namespace kalmanet {
namespace {

using testing::Case;
using testing::CaseSpec;
using testing::fails;
using testing::ok;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

CaseSpec everything() {
  CaseSpec spec;
  spec.B = 2;
  spec.T = 5;
  spec.H = 4;
  spec.Hk = 2;
  spec.Hv = 1;
  spec.K = 6;
  spec.V = 3;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.ridge_tensor = spec.h0 = spec.u0 = true;
  return spec;
}

// One call with everything present, to be spoiled.
struct Call {
  Case<float> c{everything()};
  kalmanet_gka_options options = KALMANET_GKA_OPTIONS_INIT;
  kalmanet_gka_inputs in = testing::c_inputs(c.inputs());
  kalmanet_gka_outputs out = testing::c_outputs(c.outputs());
  kalmanet_gka_saved saved = {sizeof(kalmanet_gka_saved), 0, testing::c_tensor(c.x.view()), {}};
  kalmanet_gka_output_grads d_out = testing::c_output_grads(c.output_grads());
  kalmanet_gka_input_grads grads = testing::c_input_grads(c.grads());
  kalmanet_gka_report report = KALMANET_GKA_REPORT_INIT;
  bool no_in = false, no_out = false, no_plan = false;  // null pointers
  bool no_d_out = false, no_grads = false;
  std::vector<int64_t> offsets = {0, 2, 5};

  enum Operation { forward, step, backward };
  kalmanet_status run(Operation operation) {
    kalmanet_gka_plan* plan = nullptr;
    kalmanet_status status = kalmanet_gka_plan_create(&options, &plan);
    if (status != KALMANET_OK) {
      EXPECT_EQ(plan, nullptr) << "a plan came out of an error";
      return status;
    }
    const auto* p = no_plan ? nullptr : plan;
    const auto* i = no_in ? nullptr : &in;
    const auto* o = no_out ? nullptr : &out;
    if (operation == forward) status = kalmanet_gka_forward(p, i, o, &report);
    if (operation == step) status = kalmanet_gka_step(p, i, o, &report);
    if (operation == backward) {
      status = kalmanet_gka_backward(p, i, &saved, no_d_out ? nullptr : &d_out,
                                     no_grads ? nullptr : &grads, &report);
    }
    kalmanet_gka_plan_destroy(plan);
    return status;
  }
  void expect_nothing_written(const std::string& what) const {
    for (const auto* t : {&c.o, &c.h_final, &c.u_final, &c.x, &c.residual, &c.dq, &c.dk, &c.dv,
                          &c.dg, &c.dgk, &c.dalpha, &c.dbeta, &c.d_ridge_ratio, &c.d_h0, &c.d_u0}) {
      for (double e : t->values()) ASSERT_TRUE(std::isnan(e)) << what << ": an output was written";
    }
  }
};

struct Mistake {
  const char* what;
  std::function<void(Call&)> make;
  kalmanet_status status;
  const char* argument;
  const char* part;
};

void expect_refused(const std::vector<Mistake>& mistakes, std::vector<Call::Operation> operations) {
  for (const Mistake& mistake : mistakes) {
    for (Call::Operation operation : operations) {
      Call call;
      mistake.make(call);
      EXPECT_TRUE(fails(call.run(operation), mistake.status, mistake.argument, mistake.part))
          << mistake.what << ", operation " << operation;
      call.expect_nothing_written(mistake.what);
    }
  }
}

TEST(CMistakes, OfEveryOperation) {
  const auto argument = KALMANET_INVALID_ARGUMENT;
  const auto shape = KALMANET_INVALID_SHAPE, dtype = KALMANET_INVALID_DTYPE;
  const std::vector<Mistake> mistakes = {
      {"no plan", [](Call& m) { m.no_plan = true; }, argument, "plan", "null"},
      {"no inputs", [](Call& m) { m.no_in = true; }, argument, "inputs", "null"},
      // struct sizes
      {"options of size 0", [](Call& m) { m.options.struct_size = 0; }, argument, "options",
       "struct_size is 0"},
      {"options cut inside a number", [](Call& m) { m.options.struct_size = 20; }, argument,
       "options", "struct_size is 20"},
      {"inputs of size 0", [](Call& m) { m.in.struct_size = 0; }, argument, "inputs",
       "struct_size is 0; set it to sizeof the struct"},
      {"inputs cut inside a tensor", [](Call& m) { m.in.struct_size -= 40; }, argument, "inputs",
       "struct_size"},
      {"inputs without q", [](Call& m) { m.in.struct_size = 8; }, argument, "inputs",
       "struct_size is 8"},
      {"inputs of a size that was never set", [](Call& m) { m.in.struct_size = 0xCCCCCCCC; },
       argument, "inputs", "struct_size is 3435973836"},
      {"a report of size 3", [](Call& m) { m.report.struct_size = 3; }, argument, "report",
       "struct_size is 3"},
      // enumerators
      {"an unknown solver", [](Call& m) { m.options.solver = 17; }, argument, "solver",
       "unknown value 17"},
      {"a negative solver", [](Call& m) { m.options.solver = -1; }, argument, "solver",
       "unknown value -1"},
      {"an unknown arithmetic", [](Call& m) { m.options.arithmetic = 2; }, argument, "arithmetic",
       "unknown value 2"},
      {"bfloat16 for cg",
       [](Call& m) {
         m.options.arithmetic = KALMANET_ARITHMETIC_BFLOAT16;
         m.options.solver = KALMANET_SOLVER_CG;
       },
       argument, "arithmetic", "not cg"},
      {"an unknown backend", [](Call& m) { m.options.backend = 9; }, argument, "backend",
       "unknown value 9"},
      {"an unknown dtype", [](Call& m) { m.in.q.dtype = 4; }, dtype, "q", "unknown dtype (4)"},
      {"a negative dtype", [](Call& m) { m.in.q.dtype = -1; }, dtype, "q", "unknown dtype (-1)"},
      // numbers
      {"num_iter of -1", [](Call& m) { m.options.num_iter = -1; }, argument, "num_iter", "got -1"},
      {"no ridge", [](Call& m) { m.options.ridge_ratio = 0; }, argument, "ridge_ratio", "got 0"},
      {"a tolerance of NaN", [](Call& m) { m.options.tolerance = kNaN; }, argument, "tolerance",
       "nan"},
      {"a scale of NaN", [](Call& m) { m.options.scale = kNaN; }, argument, "scale", "nan"},
      {"chunks of 257", [](Call& m) { m.options.chunk_size = 257; }, argument, "chunk_size",
       "got 257"},
      {"one token's ridge", [](Call& m) { m.c.ridge_ratio[39] = -1; }, argument, "ridge_ratio",
       "ridge_ratio[1, 4, 3] is -1"},
      // tensors
      {"no q", [](Call& m) { m.in.q = {}; }, argument, "q", "absent; it is required"},
      {"q without memory", [](Call& m) { m.in.q.data = nullptr; }, argument, "q", "null data"},
      {"q of rank 5", [](Call& m) { m.in.q.rank = 5; }, shape, "q", "rank 5"},
      {"q of rank -1", [](Call& m) { m.in.q.rank = -1; }, shape, "q", "rank -1"},
      {"q of rank 3", [](Call& m) { m.in.q.rank = 3; }, shape, "q", "[B, T, Hq, K]"},
      {"k of another T", [](Call& m) { m.in.k.size[1] = 4; }, shape, "k", "[2, 4, 2, 6]"},
      {"v heads that do not divide", [](Call& m) { m.in.v.size[2] = 3; }, shape, "v", "divide H"},
      {"g in float64", [](Call& m) { m.in.g.dtype = KALMANET_FLOAT64; }, dtype, "g", "float64"},
      {"h0 of another K", [](Call& m) { m.in.h0.size[3] = 5; }, shape, "h0", "[2, 4, 6, 5]"},
      {"q at an odd address", [](Call& m) { m.in.q.data = static_cast<char*>(m.in.q.data) + 1; },
       argument, "q", "not aligned"},
      {"strides beyond the address space",
       [](Call& m) { m.in.q.stride[0] = std::numeric_limits<int64_t>::max(); }, shape, "q",
       "64-bit"},
      // packed sequences
      {"offsets without their number", [](Call& m) { m.in.cu_seqlens = m.offsets.data(); },
       argument, "cu_seqlens", "num_offsets = 0"},
      {"a number without offsets", [](Call& m) { m.in.num_offsets = 3; }, argument, "cu_seqlens",
       "a null pointer with num_offsets = 3"},
      {"a negative number of offsets",
       [](Call& m) {
         m.in.cu_seqlens = m.offsets.data();
         m.in.num_offsets = -1;
       },
       argument, "cu_seqlens", "num_offsets = -1"},
      {"packed with a batch of 2",
       [](Call& m) {
         m.in.cu_seqlens = m.offsets.data();
         m.in.num_offsets = 3;
       },
       argument, "cu_seqlens", "need B = 1"},
  };
  expect_refused(mistakes, {Call::forward, Call::step, Call::backward});
}

TEST(CMistakes, OfForwardAndStep) {
  const std::vector<Mistake> mistakes = {
      {"no outputs", [](Call& m) { m.no_out = true; }, KALMANET_INVALID_ARGUMENT, "outputs",
       "null"},
      {"outputs of size 1", [](Call& m) { m.out.struct_size = 1; }, KALMANET_INVALID_ARGUMENT,
       "outputs", "struct_size is 1"},
      {"no o", [](Call& m) { m.out.o = {}; }, KALMANET_INVALID_ARGUMENT, "o", "required"},
      {"x of another K", [](Call& m) { m.out.x.size[3] = 5; }, KALMANET_INVALID_SHAPE, "x", "6]"},
      {"an expanded output", [](Call& m) { m.out.o.stride[0] = 0; }, KALMANET_INVALID_SHAPE, "o",
       "must not share memory"},
      {"o in the memory of q", [](Call& m) { m.out.x.data = m.in.q.data; },
       KALMANET_INVALID_ARGUMENT, "x", "shares its memory with the input q"},
  };
  expect_refused(mistakes, {Call::forward, Call::step});
}

TEST(CMistakes, OfTheBackward) {
  const std::vector<Mistake> mistakes = {
      {"no output gradients", [](Call& m) { m.no_d_out = true; }, KALMANET_INVALID_ARGUMENT,
       "output_grads", "null"},
      {"no gradients", [](Call& m) { m.no_grads = true; }, KALMANET_INVALID_ARGUMENT, "grads",
       "null"},
      {"output gradients of size 4", [](Call& m) { m.d_out.struct_size = 4; },
       KALMANET_INVALID_ARGUMENT, "output_grads", "struct_size is 4"},
      {"gradients of size 9", [](Call& m) { m.grads.struct_size = 9; }, KALMANET_INVALID_ARGUMENT,
       "grads", "struct_size is 9"},
      {"no d_o", [](Call& m) { m.d_out.d_o = {}; }, KALMANET_INVALID_ARGUMENT, "d_o", "required"},
      {"the gradient of what is absent", [](Call& m) { m.in.alpha = {}; },
       KALMANET_INVALID_ARGUMENT, "dalpha", "the input alpha is absent"},
      {"saved x of another T", [](Call& m) { m.saved.x.size[1] = 4; }, KALMANET_INVALID_SHAPE,
       "saved_x", "[2, 4, 4, 6]"},
      {"saved of size 5", [](Call& m) { m.saved.struct_size = 5; }, KALMANET_INVALID_ARGUMENT,
       "saved", "struct_size is 5"},
      {"segment states of rank 1",
       [](Call& m) {
         m.saved.segment_states = m.saved.x;
         m.saved.segment_states.rank = 1;
       },
       KALMANET_INVALID_SHAPE, "segment_states", "[B, H, T/512, state]"},
      {"dk in float64", [](Call& m) { m.grads.dk.dtype = KALMANET_FLOAT64; },
       KALMANET_INVALID_DTYPE, "dk", "float64"},
  };
  expect_refused(mistakes, {Call::backward});
}

TEST(CMistakes, PlansNeedAPlaceToGo) {
  EXPECT_TRUE(
      fails(kalmanet_gka_plan_create(nullptr, nullptr), KALMANET_INVALID_ARGUMENT, "plan", "null"));
}

// ---- how errors are kept

TEST(CLastError, StaysUntilTheNextFailureOnThisThread) {
  int64_t bytes = 0;
  ASSERT_TRUE(fails(kalmanet_gka_state_bytes(0, 1, 1, &bytes), KALMANET_INVALID_ARGUMENT,
                    "num_heads", "got 0"));
  const std::string message = kalmanet_last_error();
  ASSERT_TRUE(ok(kalmanet_gka_state_bytes(1, 1, 1, &bytes)));
  EXPECT_EQ(kalmanet_last_error(), message) << "a success leaves it";
  std::thread([] {
    EXPECT_STREQ(kalmanet_last_error(), "") << "another thread's is empty";
    EXPECT_STREQ(kalmanet_last_error_argument(), "");
    int64_t other = 0;
    EXPECT_TRUE(fails(kalmanet_gka_state_bytes(1, 999, 1, &other), KALMANET_INVALID_ARGUMENT,
                      "key_dim", "got 999"));
  }).join();
  EXPECT_EQ(kalmanet_last_error(), message);
  ASSERT_TRUE(fails(kalmanet_gka_state_bytes(1, 1, 0, &bytes), KALMANET_INVALID_ARGUMENT,
                    "value_dim", "got 0"));
}

TEST(CLastError, TheCppMessageArrivesWhole) {
  Call call;
  call.in.ridge_ratio.size[2] = 7;
  ASSERT_EQ(call.run(Call::forward), KALMANET_INVALID_SHAPE);
  GkaInputs in = call.c.inputs();
  in.ridge_ratio.size[2] = 7;
  try {
    gka_forward(in, call.c.outputs());
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(kalmanet_last_error(), e.what());
    EXPECT_EQ(kalmanet_last_error_argument(), e.argument());
  }
}

}  // namespace
}  // namespace kalmanet
