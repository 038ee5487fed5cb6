// Checks of the arguments of the layer's decode step.
#include "core/validate_layer_step.hpp"

#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "core/check.hpp"
#include "core/half.hpp"
#include "core/text.hpp"
#include "kalmanet/conv.hpp"

namespace kalmanet::core {
namespace {

void number(const char* argument, double value, bool good, const char* allowed) {
  if (good) return;
  fail(ErrorCode::invalid_argument, argument, text("got ", value, "; must be ", allowed));
}

void check_numbers(const LayerStepOptions& o) {
  number("fixed_alpha", o.fixed_alpha, o.fixed_alpha >= 0 && o.fixed_alpha <= 1, "in 0..1");
  // Ratios are handed on in the precision of the computation, float32 or better.
  constexpr double kLeast = std::numeric_limits<float>::min();
  constexpr double kMost = std::numeric_limits<float>::max();
  number("min_ridge", o.min_ridge, o.min_ridge >= kLeast && o.min_ridge <= kMost,
         "> 0, as a normal float32 is");
  number("max_ridge", o.max_ridge, o.max_ridge >= o.min_ridge && o.max_ridge <= kMost,
         ">= min_ridge and within float32");
  number("norm_eps", o.norm_eps, o.norm_eps >= 0 && std::isfinite(o.norm_eps), ">= 0 and finite");
  if (o.qk_norm != QkNorm::official && o.qk_norm != QkNorm::fla) {
    fail(ErrorCode::invalid_argument, "qk_norm",
         text("unknown value ", static_cast<int>(o.qk_norm), "; must be official or fla"));
  }
}

// A state: there, writable, of the dtype that states have.
void check_state(const char* argument, const View& state, const GkaProblem& p,
                 std::initializer_list<Dim> dims) {
  check_required(argument, state, dims);
  check_writable(argument, state, dims);
  check_dtype(argument, state, state_dtype(p), "states are float64 where q is, else float32");
}

// One convolution: weight [D,W] of q's dtype or float32 beside it, state [N,D,W]. Sets W where it
// is not known yet.
void check_conv(const char* weight_name, const ConstView& weight, const char* state_name,
                const View& state, const GkaProblem& p, int64_t channels, int64_t& width) {
  check_required(weight_name, weight, {{"D", channels}, {"W", {}}}, "D is heads times head dim");
  check_dtype_or_float32(weight_name, weight, p.dtype, "q");
  if (width == 0) width = weight.size[1];
  if (weight.size[1] != width || width < 1 || width > kMaxConvWidth) {
    fail(ErrorCode::invalid_shape, weight_name,
         text("width W is ", weight.size[1], "; must be in 1..", kMaxConvWidth,
              " and the same for all convolutions"));
  }
  check_state(state_name, state, p, {{"N", p.N}, {"D", channels}, {"W", width}});
}

// Clamped, so that an infinite logit is a ratio like any other; but with a NaN no solver knows its
// steps, and nothing in o might show it. One number a token and head costs nothing to look at, but
// for a GPU's, which the host would have to wait for: there it answers NaN.
void check_no_nan(const char* argument, const ConstView& view) {
  for (int64_t b = 0; b < view.size[0]; ++b) {
    for (int64_t t = 0; t < view.size[1]; ++t) {
      for (int64_t h = 0; h < view.size[2]; ++h) {
        const int64_t at = b * view.stride[0] + t * view.stride[1] + h * view.stride[2];
        if (!std::isnan(load_element(view.dtype, view.data, at))) continue;
        fail(ErrorCode::invalid_argument, argument,
             text(argument, "[", b, ", ", t, ", ", h, "] is NaN; must be a number"));
      }
    }
  }
}

}  // namespace

GkaProblem validate_layer_step(const LayerStepInputs& in, const LayerStepStates& states,
                               const View& o, const View& residual,
                               const LayerStepOptions& options) {
  check_numbers(options);
  GkaInputs core_in;
  core_in.q = in.q;
  core_in.k = in.k;
  core_in.v = in.v;
  GkaOutputs core_out;
  core_out.o = o;
  core_out.residual = residual;
  GkaProblem p = validate_forward(core_in, core_out, options.gka);
  check_state("h", states.h, p, {{"N", p.N}, {"H", p.H}, {"K", p.K}, {"K", p.K}});
  check_state("u", states.u, p, {{"N", p.N}, {"H", p.H}, {"K", p.K}, {"V", p.V}});
  p.inputs.h0 = states.h;
  p.inputs.u0 = states.u;
  if (p.options.backend == Backend::reference) {
    fail(ErrorCode::unsupported, "backend",
         text("the fused step runs on the cpu and cuda backends; call the separate operations for ",
              name(p.options.backend)));
  }
  const std::array<Named, 4> logits = {
      {{"b", in.b}, {"alpha", in.alpha}, {"a", in.a}, {"ridge", in.ridge}}};
  for (const auto& [argument, view] : logits) {
    if (!present(view)) continue;
    check_tensor(argument, view, {{"B", p.B}, {"T", p.T}, {"H", p.H}});
    check_dtype(argument, view, p.dtype, "as q");
  }
  if (present(in.ridge) && p.options.backend != Backend::cuda) check_no_nan("ridge", in.ridge);
  if (present(in.gate)) {
    check_tensor("gate", in.gate, {{"B", p.B}, {"T", p.T}, {"H", p.H}, {"V", p.V}});
    check_dtype("gate", in.gate, p.dtype, "as q");
  }
  for (const auto& [argument, view] :
       std::array<Named, 2>{{{"A_log", in.A_log}, {"dt_bias", in.dt_bias}}}) {
    if (!present(in.a) && !present(view)) continue;
    check_required(argument, view, {{"H", p.H}});
    check_dtype_or_float32(argument, view, p.dtype, "q");
  }
  check_required("o_norm", in.o_norm, {{"V", p.V}});
  check_dtype_or_float32("o_norm", in.o_norm, p.dtype, "q");
  int64_t width = 0;
  check_conv("conv_q_weight", in.conv_q_weight, "conv_q", states.conv_q, p, in.q.size[2] * p.K,
             width);
  check_conv("conv_k_weight", in.conv_k_weight, "conv_k", states.conv_k, p, in.k.size[2] * p.K,
             width);
  if (present(in.conv_v_weight)) {
    check_conv("conv_v_weight", in.conv_v_weight, "conv_v", states.conv_v, p, in.v.size[2] * p.V,
               width);
  } else if (present(states.conv_v)) {
    fail(ErrorCode::invalid_argument, "conv_v",
         "given, but conv_v_weight is absent; pass both or neither");
  }
  if (present(in.ridge) && p.options.solver == Solver::chebyshev &&
      p.options.num_iter == kAutoNumIter) {
    chebyshev_num_iter(options.min_ridge, p.options.tolerance);  // throws where no int can hold it
  }
  const std::array<Named, 7> written = {{{"o", o},
                                         {"residual", residual},
                                         {"h", states.h},
                                         {"u", states.u},
                                         {"conv_q", states.conv_q},
                                         {"conv_k", states.conv_k},
                                         {"conv_v", states.conv_v}}};
  const std::array<Named, 14> read = {{{"q", in.q},
                                       {"k", in.k},
                                       {"v", in.v},
                                       {"gate", in.gate},
                                       {"b", in.b},
                                       {"alpha", in.alpha},
                                       {"a", in.a},
                                       {"ridge", in.ridge},
                                       {"conv_q_weight", in.conv_q_weight},
                                       {"conv_k_weight", in.conv_k_weight},
                                       {"conv_v_weight", in.conv_v_weight},
                                       {"A_log", in.A_log},
                                       {"dt_bias", in.dt_bias},
                                       {"o_norm", in.o_norm}}};
  check_distinct(written, read, {});
  return p;
}

}  // namespace kalmanet::core
