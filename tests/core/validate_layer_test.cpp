// Validation of the causal convolution's and the norms' arguments.
#include "core/validate_layer.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "kalmanet/error.hpp"

namespace kalmanet {
namespace {

// B=2 T=5 D=6 W=4 tensors, all over one zeroed memory: nothing reads it.
struct Tensors {
  std::vector<float> memory = std::vector<float>(4096);
  View make(std::initializer_list<int64_t> sizes) { return dense(memory.data(), sizes); }

  ConvInputs conv{make({2, 5, 6}), make({6, 4}), {}, {}};
  View state = dense(memory.data() + 1024, {2, 6, 4}), y = make({2, 5, 6});
  View final_state = dense(memory.data() + 2048, {2, 6, 4});
  ConstView dy = make({2, 5, 6}), d_final_state = make({2, 6, 4});
  View dx = make({2, 5, 6}), dweight = make({6, 4}), dstate = make({2, 6, 4});
  View step_x = make({3, 6}), step_state = make({3, 6, 4}), step_y = make({3, 6});

  NormInputs norm{make({10, 7}), make({10, 7}), make({7}), 1e-6};
  View norm_y = make({10, 7}), d_o = make({10, 7}), d_gate = make({10, 7}), d_weight = make({7});
  ConstView norm_dy = make({10, 7});
  UnitNormInputs unit{make({10, 7})};
  View unit_y = make({10, 7}), unit_dx = make({10, 7});
  ConstView unit_dy = make({10, 7});
  std::vector<int64_t> cu_seqlens;

  Tensors() { conv.state = state; }

  void conv_forward() { core::validate_conv_forward(conv, y, final_state); }
  void conv_backward() {
    core::validate_conv_backward(conv, dy, d_final_state, dx, dweight, dstate);
  }
  void conv_step() { core::validate_conv_step(step_x, conv.weight, step_state, step_y); }
  void norm_forward() { core::validate_norm_forward(norm, norm_y); }
  void norm_backward() { core::validate_norm_backward(norm, norm_dy, d_o, d_gate, d_weight); }
  void unit_forward() { core::validate_unit_norm_forward(unit, unit_y); }
  void unit_backward() { core::validate_unit_norm_backward(unit, unit_dy, unit_dx); }
};

using Operation = void (Tensors::*)();

struct Mistake {
  const char* what;
  Operation operation;
  std::function<void(Tensors&)> make;
  ErrorCode code;
  std::string argument;
  std::string part;  // of the message
};

TEST(LayerValidation, Mistakes) {
  constexpr ErrorCode kArgument = ErrorCode::invalid_argument, kShape = ErrorCode::invalid_shape,
                      kDType = ErrorCode::invalid_dtype;
  using T = Tensors;
  const std::vector<Mistake> mistakes = {
      {"no x", &T::conv_forward, [](T& t) { t.conv.x = {}; }, kArgument, "x", "[B, T, D]"},
      {"x of rank 2", &T::conv_forward, [](T& t) { t.conv.x.rank = 2; }, kShape, "x", "[2, 5]"},
      {"weight in float64", &T::conv_forward, [](T& t) { t.conv.weight.dtype = DType::float64; },
       kDType, "weight", "must be float32 (as x)"},
      {"weight in float32 beside float64", &T::conv_step,
       [](T& t) { t.step_x.dtype = DType::float64; }, kDType, "weight", "must be float64 (as x)"},
      {"weight in float16 beside bfloat16", &T::conv_step,
       [](T& t) {
         t.step_x.dtype = DType::bfloat16;
         t.conv.weight.dtype = DType::float16;
       },
       kDType, "weight", "must be bfloat16, as x, or float32"},
      {"state in float32 beside bfloat16", &T::conv_step,
       [](T& t) { t.step_x.dtype = DType::bfloat16; }, kDType, "state", "must be bfloat16 (as x)"},
      {"dweight in float64", &T::conv_backward, [](T& t) { t.dweight.dtype = DType::float64; },
       kDType, "dweight", "must be float32 (as x)"},
      {"no weight", &T::conv_forward, [](T& t) { t.conv.weight = {}; }, kArgument, "weight", "D"},
      {"weight of other channels", &T::conv_forward, [](T& t) { t.conv.weight.size[0] = 5; },
       kShape, "weight", "[6, *]"},
      {"W = 17", &T::conv_forward, [](T& t) { t.conv.weight.size[1] = 17; }, kShape, "weight",
       "1..16"},
      {"W = 0", &T::conv_forward, [](T& t) { t.conv.weight.size[1] = 0; }, kShape, "weight",
       "1..16"},
      {"state of another W", &T::conv_forward, [](T& t) { t.conv.state.size[2] = 3; }, kShape,
       "state", "[2, 6, 4]"},
      {"no y", &T::conv_forward, [](T& t) { t.y = {}; }, kArgument, "y", "required"},
      {"y of another T", &T::conv_forward, [](T& t) { t.y.size[1] = 4; }, kShape, "y", "[2, 5, 6]"},
      {"y expanded", &T::conv_forward, [](T& t) { t.y.stride[1] = 0; }, kShape, "y", "share"},
      {"final_state of another N", &T::conv_forward, [](T& t) { t.final_state.size[0] = 1; },
       kShape, "final_state", "[2, 6, 4]"},
      {"final_state in state's memory, transposed", &T::conv_forward,
       [](T& t) {
         t.final_state.data = t.state.data;
         t.final_state.stride = {24, 1, 6};
       },
       kShape, "final_state", "same strides"},
      {"packed with B = 2", &T::conv_forward,
       [](T& t) {
         t.cu_seqlens = {0, 5};
         t.conv.cu_seqlens = t.cu_seqlens;
       },
       kArgument, "cu_seqlens", "B = 1"},
      {"no dy", &T::conv_backward, [](T& t) { t.dy = {}; }, kArgument, "dy", "required"},
      {"d_final_state of another D", &T::conv_backward, [](T& t) { t.d_final_state.size[1] = 5; },
       kShape, "d_final_state", "[2, 6, 4]"},
      {"dx in bfloat16", &T::conv_backward, [](T& t) { t.dx.dtype = DType::bfloat16; }, kDType,
       "dx", "bfloat16"},
      {"dweight overlapping", &T::conv_backward, [](T& t) { t.dweight.stride[0] = 2; }, kShape,
       "dweight", "share"},
      {"dstate of another N", &T::conv_backward, [](T& t) { t.dstate.size[0] = 3; }, kShape,
       "dstate", "[2, 6, 4]"},
      {"a step's x of rank 3", &T::conv_step, [](T& t) { t.step_x.rank = 3; }, kShape, "x",
       "[N, D]"},
      {"a step without state", &T::conv_step, [](T& t) { t.step_state = {}; }, kArgument, "state",
       "required"},
      {"a step's state of another W", &T::conv_step, [](T& t) { t.step_state.size[2] = 3; }, kShape,
       "state", "[3, 6, 4]"},
      {"a step's y of another D", &T::conv_step, [](T& t) { t.step_y.size[1] = 5; }, kShape, "y",
       "[3, 6]"},
      {"no o", &T::norm_forward, [](T& t) { t.norm.o = {}; }, kArgument, "o", "[R, V]"},
      {"gate of another V", &T::norm_forward, [](T& t) { t.norm.gate.size[1] = 6; }, kShape, "gate",
       "[10, 7]"},
      {"weight of another V", &T::norm_forward, [](T& t) { t.norm.weight.size[0] = 6; }, kShape,
       "weight", "[7]"},
      {"eps negative", &T::norm_forward, [](T& t) { t.norm.eps = -1; }, kArgument, "eps", "-1"},
      {"eps NaN", &T::norm_forward,
       [](T& t) { t.norm.eps = std::numeric_limits<double>::quiet_NaN(); }, kArgument, "eps",
       "nan"},
      {"gate in float32 beside float16", &T::norm_forward,
       [](T& t) { t.norm.o.dtype = DType::float16; }, kDType, "gate", "must be float16 (as o)"},
      {"d_weight in bfloat16", &T::norm_backward, [](T& t) { t.d_weight.dtype = DType::bfloat16; },
       kDType, "d_weight", "must be float32 (as o)"},
      {"no y", &T::norm_forward, [](T& t) { t.norm_y = {}; }, kArgument, "y", "required"},
      {"dy of another R", &T::norm_backward, [](T& t) { t.norm_dy.size[0] = 9; }, kShape, "dy",
       "[10, 7]"},
      {"d_o expanded", &T::norm_backward, [](T& t) { t.d_o.stride[0] = 0; }, kShape, "d_o",
       "share"},
      {"d_weight of rank 2", &T::norm_backward, [](T& t) { t.d_weight = t.d_o; }, kShape,
       "d_weight", "[V]"},
      {"d_gate without gate", &T::norm_backward, [](T& t) { t.norm.gate = {}; }, kArgument,
       "d_gate", "gate is absent"},
      {"no x", &T::unit_forward, [](T& t) { t.unit.x = {}; }, kArgument, "x", "[R, K]"},
      {"x of rank 3", &T::unit_forward, [](T& t) { t.unit.x.rank = 3; }, kShape, "x", "[R, K]"},
      {"an unknown kind", &T::unit_forward, [](T& t) { t.unit.kind = static_cast<QkNorm>(5); },
       kArgument, "kind", "official or fla"},
      {"a unit norm's eps of 0", &T::unit_forward, [](T& t) { t.unit.eps = 0; }, kArgument, "eps",
       "got 0"},
      {"a unit norm's eps below float32", &T::unit_backward, [](T& t) { t.unit.eps = 1e-40; },
       kArgument, "eps", "must be > 0"},
      {"a unit norm's eps infinite", &T::unit_backward,
       [](T& t) { t.unit.eps = std::numeric_limits<double>::infinity(); }, kArgument, "eps", "inf"},
      {"a unit norm without y", &T::unit_forward, [](T& t) { t.unit_y = {}; }, kArgument, "y",
       "required"},
      {"a unit norm's y of another K", &T::unit_forward, [](T& t) { t.unit_y.size[1] = 6; }, kShape,
       "y", "[10, 7]"},
      {"a unit norm's dy of another R", &T::unit_backward, [](T& t) { t.unit_dy.size[0] = 9; },
       kShape, "dy", "[10, 7]"},
      {"dx in bfloat16 beside float32", &T::unit_backward,
       [](T& t) { t.unit_dx.dtype = DType::bfloat16; }, kDType, "dx", "must be float32 (as x)"},
      {"dx expanded", &T::unit_backward, [](T& t) { t.unit_dx.stride[0] = 0; }, kShape, "dx",
       "share"},
  };
  for (const Mistake& mistake : mistakes) {
    Tensors tensors;
    mistake.make(tensors);
    try {
      (tensors.*mistake.operation)();
      ADD_FAILURE() << mistake.what << ": accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.argument(), mistake.argument) << mistake.what << ": " << e.what();
      EXPECT_EQ(static_cast<int>(e.code()), static_cast<int>(mistake.code)) << e.what();
      EXPECT_NE(std::string(e.what()).find(mistake.part), std::string::npos)
          << mistake.what << ": \"" << e.what() << "\" lacks \"" << mistake.part << '"';
    }
  }
}

// All tensors of one dtype; weights and their gradients also of float32 beside 16-bit ones.
TEST(LayerValidation, AcceptsEveryDtype) {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    Tensors t;
    for (DType* d :
         {&t.conv.x.dtype,    &t.conv.state.dtype,    &t.y.dtype,      &t.final_state.dtype,
          &t.dy.dtype,        &t.d_final_state.dtype, &t.dx.dtype,     &t.dstate.dtype,
          &t.step_x.dtype,    &t.step_state.dtype,    &t.step_y.dtype, &t.norm.o.dtype,
          &t.norm.gate.dtype, &t.norm_y.dtype,        &t.d_o.dtype,    &t.d_gate.dtype,
          &t.norm_dy.dtype,   &t.unit.x.dtype,        &t.unit_y.dtype, &t.unit_dy.dtype,
          &t.unit_dx.dtype}) {
      *d = dtype;
    }
    for (bool narrow : {true, false}) {
      if (dtype == DType::float64 && !narrow) continue;
      const DType weight = narrow ? dtype : DType::float32;
      for (DType* d :
           {&t.conv.weight.dtype, &t.dweight.dtype, &t.norm.weight.dtype, &t.d_weight.dtype}) {
        *d = weight;
      }
      EXPECT_NO_THROW(t.conv_forward()) << name(dtype) << ", weight " << name(weight);
      EXPECT_NO_THROW(t.conv_backward()) << name(dtype) << ", weight " << name(weight);
      EXPECT_NO_THROW(t.conv_step()) << name(dtype) << ", weight " << name(weight);
      EXPECT_NO_THROW(t.norm_forward()) << name(dtype) << ", weight " << name(weight);
      EXPECT_NO_THROW(t.norm_backward()) << name(dtype) << ", weight " << name(weight);
      EXPECT_NO_THROW(t.unit_forward()) << name(dtype);
      EXPECT_NO_THROW(t.unit_backward()) << name(dtype);
    }
  }
}

TEST(LayerValidation, AcceptsWhatIsRight) {
  Tensors t;
  EXPECT_NO_THROW(t.conv_forward());
  EXPECT_NO_THROW(t.conv_backward());
  EXPECT_NO_THROW(t.conv_step());
  EXPECT_NO_THROW(t.norm_forward());
  EXPECT_NO_THROW(t.norm_backward());
  t.final_state = t.state;  // in place
  EXPECT_NO_THROW(t.conv_forward());
  t.conv.state = {};
  t.final_state = t.dx = t.dweight = t.dstate = {};
  t.d_final_state = {};
  EXPECT_NO_THROW(t.conv_forward());
  EXPECT_NO_THROW(t.conv_backward());
  t.norm.gate = {};
  t.d_o = t.d_gate = t.d_weight = {};
  EXPECT_NO_THROW(t.norm_forward());
  EXPECT_NO_THROW(t.norm_backward());
  // Packed: five tokens of one row in three sequences, one of them empty.
  Tensors packed;
  packed.cu_seqlens = {0, 2, 2, 5};
  packed.conv = {packed.make({1, 5, 6}), packed.make({6, 4}), packed.make({3, 6, 4}),
                 packed.cu_seqlens};
  const auto sequences = core::validate_conv_forward(packed.conv, packed.make({1, 5, 6}), View{});
  ASSERT_EQ(sequences.size(), 3u);
  EXPECT_EQ(sequences[2].begin, 2);
  EXPECT_EQ(sequences[2].end, 5);
  EXPECT_EQ(sequences[1].length(), 0);
}

}  // namespace
}  // namespace kalmanet
