// Checks of the arguments of the causal convolution and the gated RMS norm.
#include "core/validate_layer.hpp"

#include <cmath>
#include <string>

#include "core/check.hpp"
#include "core/text.hpp"

namespace kalmanet::core {
namespace {

void check_float32(const char* argument, const ConstView& view) {
  if (view.dtype != DType::float32) {
    fail(ErrorCode::unsupported, argument,
         text("dtype ", name(view.dtype),
              " is not available for this operation yet; convert to float32"));
  }
}

void input(const char* argument, const ConstView& view, std::initializer_list<Dim> dims) {
  check_required(argument, view, dims);
  check_float32(argument, view);
}

void optional_input(const char* argument, const ConstView& view, std::initializer_list<Dim> dims) {
  if (present(view)) input(argument, view, dims);
}

void output(const char* argument, const View& view, std::initializer_list<Dim> dims) {
  check_required(argument, view, dims);
  check_writable(argument, view, dims);
  check_float32(argument, view);
}

void optional_output(const char* argument, const View& view, std::initializer_list<Dim> dims) {
  if (present(view)) output(argument, view, dims);
}

struct ConvSizes {
  int64_t B, T, D, W, N;
  std::vector<Sequence> sequences;
};

void check_width(int64_t width) {
  if (width < 1 || width > kMaxConvWidth) {
    fail(ErrorCode::invalid_shape, "weight",
         text("width W is ", width, "; must be in 1..", kMaxConvWidth));
  }
}

ConvSizes conv_inputs(const ConvInputs& in) {
  input("x", in.x, {{"B", {}}, {"T", {}}, {"D", {}}});
  ConvSizes s{in.x.size[0], in.x.size[1], in.x.size[2], 0, 0, {}};
  input("weight", in.weight, {{"D", s.D}, {"W", {}}});
  s.W = in.weight.size[1];
  check_width(s.W);
  s.sequences = make_sequences(s.B, s.T, in.cu_seqlens);
  s.N = std::ssize(s.sequences);
  optional_input("state", in.state, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  return s;
}

}  // namespace

std::vector<Sequence> validate_conv_forward(const ConvInputs& inputs, const View& y,
                                            const View& final_state) {
  ConvSizes s = conv_inputs(inputs);
  output("y", y, {{"B", s.B}, {"T", s.T}, {"D", s.D}});
  optional_output("final_state", final_state, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  check_in_place("final_state", final_state, "state", inputs.state);
  return std::move(s.sequences);
}

std::vector<Sequence> validate_conv_backward(const ConvInputs& inputs, const ConstView& dy,
                                             const ConstView& d_final_state, const View& dx,
                                             const View& dweight, const View& dstate) {
  ConvSizes s = conv_inputs(inputs);
  input("dy", dy, {{"B", s.B}, {"T", s.T}, {"D", s.D}});
  optional_input("d_final_state", d_final_state, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  optional_output("dx", dx, {{"B", s.B}, {"T", s.T}, {"D", s.D}});
  optional_output("dweight", dweight, {{"D", s.D}, {"W", s.W}});
  optional_output("dstate", dstate, {{"N", s.N}, {"D", s.D}, {"W", s.W}});
  return std::move(s.sequences);
}

void validate_conv_step(const ConstView& x, const ConstView& weight, const View& state,
                        const View& y) {
  input("x", x, {{"N", {}}, {"D", {}}});
  const int64_t N = x.size[0], D = x.size[1];
  input("weight", weight, {{"D", D}, {"W", {}}});
  const int64_t W = weight.size[1];
  check_width(W);
  output("state", state, {{"N", N}, {"D", D}, {"W", W}});
  output("y", y, {{"N", N}, {"D", D}});
}

namespace {

void norm_inputs(const NormInputs& in) {
  input("o", in.o, {{"R", {}}, {"V", {}}});
  const int64_t R = in.o.size[0], V = in.o.size[1];
  optional_input("gate", in.gate, {{"R", R}, {"V", V}});
  input("weight", in.weight, {{"V", V}});
  if (!(in.eps >= 0) || !std::isfinite(in.eps)) {
    fail(ErrorCode::invalid_argument, "eps", text("got ", in.eps, "; must be >= 0 and finite"));
  }
}

}  // namespace

void validate_norm_forward(const NormInputs& inputs, const View& y) {
  norm_inputs(inputs);
  output("y", y, {{"R", inputs.o.size[0]}, {"V", inputs.o.size[1]}});
}

void validate_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                            const View& d_gate, const View& d_weight) {
  norm_inputs(inputs);
  const int64_t R = inputs.o.size[0], V = inputs.o.size[1];
  input("dy", dy, {{"R", R}, {"V", V}});
  optional_output("d_o", d_o, {{"R", R}, {"V", V}});
  optional_output("d_gate", d_gate, {{"R", R}, {"V", V}});
  optional_output("d_weight", d_weight, {{"V", V}});
  if (present(d_gate) && !present(inputs.gate)) {
    fail(ErrorCode::invalid_argument, "d_gate",
         "asked for, but the input gate is absent; pass gate or leave d_gate absent");
  }
}

}  // namespace kalmanet::core
