// Checks of the arguments of the causal convolution and the two norms.
#include "core/validate_layer.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "core/check.hpp"
#include "core/text.hpp"

namespace kalmanet::core {
namespace {

// The tensor that says the dtype of all others, x or o.
struct First {
  const char* argument;
  DType dtype;
};

void input(const char* argument, const ConstView& view, const First& first,
           std::initializer_list<Dim> dims) {
  check_required(argument, view, dims);
  check_dtype(argument, view, first.dtype, text("as ", first.argument));
}

void optional_input(const char* argument, const ConstView& view, const First& first,
                    std::initializer_list<Dim> dims) {
  if (present(view)) input(argument, view, first, dims);
}

void output(const char* argument, const View& view, const First& first,
            std::initializer_list<Dim> dims) {
  check_required(argument, view, dims);
  check_writable(argument, view, dims);
  check_dtype(argument, view, first.dtype, text("as ", first.argument));
}

void optional_output(const char* argument, const View& view, const First& first,
                     std::initializer_list<Dim> dims) {
  if (present(view)) output(argument, view, first, dims);
}

// A weight or its gradient, which may be float32 beside 16-bit activations.
void weight_dtype(const char* argument, const ConstView& view, const First& first) {
  check_dtype_or_float32(argument, view, first.dtype, first.argument);
}

struct ConvSizes {
  int64_t B, T, D, W, N;
  First x;
  std::vector<Sequence> sequences;
};

void check_width(int64_t width) {
  if (width < 1 || width > kMaxConvWidth) {
    fail(ErrorCode::invalid_shape, "weight",
         text("width W is ", width, "; must be in 1..", kMaxConvWidth));
  }
}

ConvSizes conv_inputs(const ConvInputs& in) {
  check_required("x", in.x, {{"B", {}}, {"T", {}}, {"D", {}}});
  ConvSizes s{in.x.size[0], in.x.size[1], in.x.size[2], 0, 0, {"x", in.x.dtype}, {}};
  check_required("weight", in.weight, {{"D", s.D}, {"W", {}}});
  weight_dtype("weight", in.weight, s.x);
  s.W = in.weight.size[1];
  check_width(s.W);
  s.sequences = make_sequences(s.B, s.T, in.cu_seqlens);
  s.N = std::ssize(s.sequences);
  optional_input("state", in.state, s.x, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  return s;
}

}  // namespace

std::vector<Sequence> validate_conv_forward(const ConvInputs& inputs, const View& y,
                                            const View& final_state) {
  ConvSizes s = conv_inputs(inputs);
  output("y", y, s.x, {{"B", s.B}, {"T", s.T}, {"D", s.D}});
  optional_output("final_state", final_state, s.x, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  check_in_place("final_state", final_state, "state", inputs.state);
  return std::move(s.sequences);
}

std::vector<Sequence> validate_conv_backward(const ConvInputs& inputs, const ConstView& dy,
                                             const ConstView& d_final_state, const View& dx,
                                             const View& dweight, const View& dstate) {
  ConvSizes s = conv_inputs(inputs);
  input("dy", dy, s.x, {{"B", s.B}, {"T", s.T}, {"D", s.D}});
  optional_input("d_final_state", d_final_state, s.x, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  optional_output("dx", dx, s.x, {{"B", s.B}, {"T", s.T}, {"D", s.D}});
  if (present(dweight)) {
    check_writable("dweight", dweight, {{"D", s.D}, {"W", s.W}});
    weight_dtype("dweight", dweight, s.x);
  }
  optional_output("dstate", dstate, s.x, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  return std::move(s.sequences);
}

void validate_conv_step(const ConstView& x, const ConstView& weight, const View& state,
                        const View& y) {
  check_required("x", x, {{"N", {}}, {"D", {}}});
  const First first{"x", x.dtype};
  const int64_t N = x.size[0], D = x.size[1];
  check_required("weight", weight, {{"D", D}, {"W", {}}});
  weight_dtype("weight", weight, first);
  const int64_t W = weight.size[1];
  check_width(W);
  output("state", state, first, {{"N", N}, {"D", D}, {"W", W}});
  output("y", y, first, {{"N", N}, {"D", D}});
}

namespace {

First norm_inputs(const NormInputs& in) {
  check_required("o", in.o, {{"R", {}}, {"V", {}}});
  const First first{"o", in.o.dtype};
  const int64_t R = in.o.size[0], V = in.o.size[1];
  optional_input("gate", in.gate, first, {{"R", R}, {"V", V}});
  check_required("weight", in.weight, {{"V", V}});
  weight_dtype("weight", in.weight, first);
  if (!(in.eps >= 0) || !std::isfinite(in.eps)) {
    fail(ErrorCode::invalid_argument, "eps", text("got ", in.eps, "; must be >= 0 and finite"));
  }
  return first;
}

}  // namespace

void validate_norm_forward(const NormInputs& inputs, const View& y) {
  const First first = norm_inputs(inputs);
  output("y", y, first, {{"R", inputs.o.size[0]}, {"V", inputs.o.size[1]}});
}

void validate_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                            const View& d_gate, const View& d_weight) {
  const First first = norm_inputs(inputs);
  const int64_t R = inputs.o.size[0], V = inputs.o.size[1];
  input("dy", dy, first, {{"R", R}, {"V", V}});
  optional_output("d_o", d_o, first, {{"R", R}, {"V", V}});
  optional_output("d_gate", d_gate, first, {{"R", R}, {"V", V}});
  if (present(d_weight)) {
    check_writable("d_weight", d_weight, {{"V", V}});
    weight_dtype("d_weight", d_weight, first);
  }
  if (present(d_gate) && !present(inputs.gate)) {
    fail(ErrorCode::invalid_argument, "d_gate",
         "asked for, but the input gate is absent; pass gate or leave d_gate absent");
  }
}

namespace {

First unit_norm_inputs(const UnitNormInputs& in) {
  check_required("x", in.x, {{"R", {}}, {"K", {}}});
  if (in.kind != QkNorm::official && in.kind != QkNorm::fla) {
    fail(ErrorCode::invalid_argument, "kind",
         text("unknown value ", static_cast<int>(in.kind), "; must be official or fla"));
  }
  // A row of zeros is divided by it, in float32.
  if (!(in.eps >= std::numeric_limits<float>::min()) || !std::isfinite(in.eps)) {
    fail(ErrorCode::invalid_argument, "eps",
         text("got ", in.eps, "; must be > 0, as a normal float32 is, and finite"));
  }
  return {"x", in.x.dtype};
}

}  // namespace

void validate_unit_norm_forward(const UnitNormInputs& inputs, const View& y) {
  const First first = unit_norm_inputs(inputs);
  output("y", y, first, {{"R", inputs.x.size[0]}, {"K", inputs.x.size[1]}});
}

void validate_unit_norm_backward(const UnitNormInputs& inputs, const ConstView& dy,
                                 const View& dx) {
  const First first = unit_norm_inputs(inputs);
  const int64_t R = inputs.x.size[0], K = inputs.x.size[1];
  input("dy", dy, first, {{"R", R}, {"K", K}});
  output("dx", dx, first, {{"R", R}, {"K", K}});
}

}  // namespace kalmanet::core
