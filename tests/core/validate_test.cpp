// What validation accepts and resolves: packed sequences, empty batches, dtypes, ridge ratios in 16
// bits.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "core/valid_call.hpp"
#include "kalmanet/error.hpp"
#include "support/problem.hpp"

namespace kalmanet {
namespace {

using testing::Call;
using testing::Case;
using testing::CaseSpec;

TEST(Validation, PackedSequences) {
  struct Bad {
    std::vector<int64_t> cu_seqlens;
    const char* part;
  };
  for (const Bad& bad : std::vector<Bad>{{{1, 5}, "cu_seqlens[0] is 1"},
                                         {{0, 4}, "T = 5"},
                                         {{0, 6}, "T = 5"},
                                         {{0, 3, 2, 5}, "cu_seqlens[2] is 2"},
                                         {{0, -1, 5}, "cu_seqlens[1] is -1"},
                                         {{0}, "T = 5"}}) {
    CaseSpec spec;
    spec.T = 5;
    Case<float> c(spec);
    GkaInputs in = c.inputs();
    in.cu_seqlens = bad.cu_seqlens;
    try {
      core::validate_forward(in, c.outputs(), {});
      ADD_FAILURE() << bad.part;
    } catch (const Error& e) {
      EXPECT_EQ(e.argument(), "cu_seqlens");
      EXPECT_NE(std::string(e.what()).find(bad.part), std::string::npos) << e.what();
    }
  }
  CaseSpec spec;
  spec.lengths = {0, 2, 0, 3, 0};
  Case<float> c(spec);
  const core::GkaProblem p = core::validate_forward(c.inputs(), c.outputs(), {});
  ASSERT_EQ(p.N, 5);
  EXPECT_EQ(p.sequences[3].begin, 2);
  EXPECT_EQ(p.sequences[3].end, 5);
  EXPECT_EQ(p.sequences[3].index, 3);
  EXPECT_EQ(p.sequences[3].row, 0);
}

TEST(Validation, AcceptsAndResolvesWhatIsRight) {
  Call call;
  const core::GkaProblem p = core::validate_forward(call.in, call.out, call.options);
  EXPECT_EQ(p.B, 2);
  EXPECT_EQ(p.T, 5);
  EXPECT_EQ(p.H, 4);
  EXPECT_EQ(p.K, 6);
  EXPECT_EQ(p.V, 3);
  EXPECT_EQ(p.N, 2);
  EXPECT_EQ(p.q_group, 1);
  EXPECT_EQ(p.k_group, 2);
  EXPECT_EQ(p.v_group, 4);
  EXPECT_DOUBLE_EQ(p.scale, 1 / std::sqrt(6.0));
  EXPECT_EQ(p.executor, &default_executor());
  EXPECT_EQ(p.sequences[1].row, 1);
  EXPECT_EQ(p.sequences[1].length(), 5);
  core::validate_backward(call.in, call.saved, call.d_out, call.grads, call.options);
  core::validate_backward(call.in, {}, call.d_out, {}, call.options);  // nothing asked for is fine

  call.options.scale = 0.5;
  EXPECT_EQ(core::validate_forward(call.in, call.out, call.options).scale, 0.5);
  // Expanded inputs may share memory; in-place states may be the very same tensor.
  call.in.q.stride[0] = 0;
  call.out.h_final = call.c.h0.view();
  call.out.u_final = call.c.u0.view();
  core::validate_forward(call.in, call.out, call.options);
  // 16 bits are valid; a backend may refuse them.
  Call half;
  half.in.ridge_ratio = {};
  half.out.x = half.out.residual = {};
  for (ConstView* v : {&half.in.q, &half.in.k, &half.in.v, &half.in.g, &half.in.gk, &half.in.alpha,
                       &half.in.beta}) {
    v->dtype = DType::bfloat16;
  }
  half.out.o.dtype = DType::bfloat16;
  EXPECT_EQ(core::validate_forward(half.in, half.out, half.options).dtype, DType::bfloat16);
}

// Sixteen-bit ridge ratios are looked at too: value by value of both formats.
TEST(Validation, SixteenBitRidgeRatios) {
  struct Value {
    DType dtype;
    uint16_t bits;
    bool valid;
  };
  for (const Value& value : std::vector<Value>{{DType::bfloat16, 0x3CA4, true},   // 0.02
                                               {DType::bfloat16, 0xBCA4, false},  // -0.02
                                               {DType::bfloat16, 0x0000, false},
                                               {DType::bfloat16, 0x7F80, false},    // inf
                                               {DType::bfloat16, 0x7FC0, false},    // NaN
                                               {DType::float16, 0x251F, true},      // 0.02
                                               {DType::float16, 0x0001, true},      // subnormal
                                               {DType::float16, 0xA51F, false},     // -0.02
                                               {DType::float16, 0x8000, false},     // -0
                                               {DType::float16, 0x7C00, false},     // inf
                                               {DType::float16, 0x7E00, false}}) {  // NaN
    std::vector<uint16_t> memory(16, value.bits);
    GkaInputs in;
    GkaOutputs out;
    const auto view = [&](std::initializer_list<int64_t> sizes) {
      View v;
      v.data = memory.data();
      v.dtype = value.dtype;
      return detail::fill_dense(v, sizes);
    };
    in.q = in.k = in.v = view({1, 2, 1, 1});
    out.o = view({1, 2, 1, 1});
    out.o.data = memory.data() + 8;
    in.ridge_ratio = view({1, 2, 1});
    if (value.valid) {
      EXPECT_NO_THROW(core::validate_forward(in, out, {})) << value.bits;
    } else {
      EXPECT_THROW(core::validate_forward(in, out, {}), Error) << value.bits;
    }
  }
}

TEST(Validation, EmptyBatchesAndSequences) {
  for (const auto& [B, T] : std::vector<std::pair<int64_t, int64_t>>{{0, 5}, {2, 0}, {0, 0}}) {
    CaseSpec spec = Call::spec();
    spec.B = B;
    spec.T = T;
    Case<float> c(spec);
    const core::GkaProblem p = core::validate_forward(c.inputs(), c.outputs(), {});
    EXPECT_EQ(p.N, B);
    core::validate_backward(c.inputs(), {}, c.output_grads(), c.grads(), {});
  }
  // A tensor without elements may have no memory at all.
  GkaInputs in;
  GkaOutputs out;
  float* nothing = nullptr;
  in.q = in.k = dense(nothing, {1, 0, 2, 4});
  in.v = dense(nothing, {1, 0, 2, 3});
  out.o = dense(nothing, {1, 0, 2, 3});
  EXPECT_EQ(core::validate_forward(in, out, {}).T, 0);
  // No packed sequence at all.
  const std::vector<int64_t> zero = {0};
  in.cu_seqlens = zero;
  EXPECT_EQ(core::validate_forward(in, out, {}).N, 0);
}

TEST(Validation, StatesOfFloat64ProblemsAreFloat64) {
  Case<double> c(Call::spec());
  EXPECT_NO_THROW(core::validate_forward(c.inputs(), c.outputs(), {}));
  Case<float> f(Call::spec());
  GkaInputs in = c.inputs();
  in.h0 = f.inputs().h0;
  try {
    core::validate_forward(in, c.outputs(), {});
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), "h0");
    EXPECT_NE(std::string(e.what()).find("must be float64"), std::string::npos) << e.what();
  }
}

// What 16-bit q may have beside it: per-token tensors and x of its dtype or of float32, each as it
// likes; k, v, o and their gradients of its dtype; states of float32.
template <class T>
void check_mixed_dtypes() {
  Case<T> all(Call::spec());
  Case<T, float> mixed(Call::spec());
  const auto validate = [](const GkaInputs& in, const GkaOutputs& out, ConstView x,
                           const GkaOutputGrads& d_out, const GkaInputGrads& grads) {
    core::validate_forward(in, out, {});
    core::validate_backward(in, x, d_out, grads, {});
  };
  for (int bits = 0; bits < 256; ++bits) {
    GkaInputs in = all.inputs();
    GkaOutputs out = all.outputs();
    GkaInputGrads grads = all.grads();
    ConstView x = all.x.view();
    if (bits & 1) in.g = mixed.g.view();
    if (bits & 2) in.gk = mixed.gk.view();
    if (bits & 4) in.alpha = mixed.alpha.view();
    if (bits & 8) in.beta = mixed.beta.view();
    if (bits & 16) in.ridge_ratio = mixed.ridge_ratio.view();
    if (bits & 32) out.x = mixed.x.view(), x = mixed.x.view();
    if (bits & 64) out.residual = mixed.residual.view();
    if (bits & 128) {
      grads.dg = mixed.dg.view();
      grads.dgk = mixed.dgk.view();
      grads.dalpha = mixed.dalpha.view();
      grads.dbeta = mixed.dbeta.view();
      grads.d_ridge_ratio = mixed.d_ridge_ratio.view();
    }
    EXPECT_NO_THROW(validate(in, out, x, all.output_grads(), grads)) << bits;
  }

  struct Arguments {
    GkaInputs in;
    GkaOutputs out;
    ConstView x;
    GkaOutputGrads d_out;
    GkaInputGrads grads;
  };
  const Arguments right{mixed.inputs(), mixed.outputs(), mixed.x.view(), mixed.output_grads(),
                        mixed.grads()};
  const DType other = std::is_same_v<T, testing::BFloat16> ? DType::float16 : DType::bfloat16;
  struct Wrong {
    const char* argument;
    std::function<DType&(Arguments&)> dtype;
    bool mixed;  // float32 would do
  };
  const std::vector<Wrong> wrongs = {
      {"k", [](Arguments& a) -> DType& { return a.in.k.dtype; }, false},
      {"v", [](Arguments& a) -> DType& { return a.in.v.dtype; }, false},
      {"g", [](Arguments& a) -> DType& { return a.in.g.dtype; }, true},
      {"gk", [](Arguments& a) -> DType& { return a.in.gk.dtype; }, true},
      {"alpha", [](Arguments& a) -> DType& { return a.in.alpha.dtype; }, true},
      {"beta", [](Arguments& a) -> DType& { return a.in.beta.dtype; }, true},
      {"ridge_ratio", [](Arguments& a) -> DType& { return a.in.ridge_ratio.dtype; }, true},
      {"o", [](Arguments& a) -> DType& { return a.out.o.dtype; }, false},
      {"x", [](Arguments& a) -> DType& { return a.out.x.dtype; }, true},
      {"residual", [](Arguments& a) -> DType& { return a.out.residual.dtype; }, true},
      {"d_o", [](Arguments& a) -> DType& { return a.d_out.d_o.dtype; }, false},
      {"saved_x", [](Arguments& a) -> DType& { return a.x.dtype; }, true},
      {"dq", [](Arguments& a) -> DType& { return a.grads.dq.dtype; }, false},
      {"dk", [](Arguments& a) -> DType& { return a.grads.dk.dtype; }, false},
      {"dv", [](Arguments& a) -> DType& { return a.grads.dv.dtype; }, false},
      {"dgk", [](Arguments& a) -> DType& { return a.grads.dgk.dtype; }, true},
      {"d_ridge_ratio", [](Arguments& a) -> DType& { return a.grads.d_ridge_ratio.dtype; }, true},
  };
  for (const Wrong& wrong : wrongs) {
    Arguments a = right;
    wrong.dtype(a) = other;
    try {
      validate(a.in, a.out, a.x, a.d_out, a.grads);
      ADD_FAILURE() << wrong.argument << " of " << name(other) << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.argument(), wrong.argument) << e.what();
      EXPECT_EQ(static_cast<int>(e.code()), static_cast<int>(ErrorCode::invalid_dtype));
      const std::string message = e.what();
      EXPECT_NE(message.find(std::string("must be ") + name(DTypeOf<T>::value)), std::string::npos)
          << message;
      EXPECT_EQ(message.find("or float32") != std::string::npos, wrong.mixed) << message;
    }
  }
}

TEST(Validation, MixedDtypes) {
  check_mixed_dtypes<testing::BFloat16>();
  check_mixed_dtypes<testing::Float16>();
}

}  // namespace
}  // namespace kalmanet
