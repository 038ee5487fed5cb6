// Gated KalmaNet's arguments: everything a caller can get wrong is found here, before any work.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "core/half.hpp"
#include "core/text.hpp"

namespace kalmanet::core {
double dtype_tolerance(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 1e-10;
    case DType::float32:
      return 1e-5;
    case DType::bfloat16:
    case DType::float16:
      return 1e-4;
  }
  return 1e-5;
}

namespace {

bool known(Solver solver) {
  return solver == Solver::chebyshev || solver == Solver::direct || solver == Solver::cg ||
         solver == Solver::automatic;
}
bool known(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::standard || arithmetic == Arithmetic::bfloat16;
}
bool known(Backend backend) {
  return backend == Backend::automatic || backend == Backend::cpu ||
         backend == Backend::reference || backend == Backend::cuda;
}

void check_options(const GkaOptions& options) {
  const auto bad = [](const char* argument, const std::string& message) {
    fail(ErrorCode::invalid_argument, argument, message);
  };
  if (options.scale && !std::isfinite(*options.scale)) {
    bad("scale", text("got ", *options.scale, "; must be finite, or absent for K^-1/2"));
  }
  if (!(options.ridge_ratio > 0) || !std::isfinite(options.ridge_ratio)) {
    bad("ridge_ratio", text("got ", options.ridge_ratio,
                            "; must be > 0 and finite (0 would leave the system singular)"));
  }
  if (!known(options.solver)) {
    bad("solver", text("unknown value ", static_cast<int>(options.solver),
                       "; must be chebyshev, direct, cg or automatic"));
  }
  if (options.num_iter < 0) {
    bad("num_iter", text("got ", options.num_iter, "; must be >= 1, or ", kAutoNumIter,
                         " (kAutoNumIter) to choose from the ridge ratio and the tolerance"));
  }
  if (!(options.tolerance >= 0) || !std::isfinite(options.tolerance)) {
    bad("tolerance", text("got ", options.tolerance, "; must be > 0 and finite, or ",
                          kDtypeTolerance, " (kDtypeTolerance) for what the dtype can carry"));
  }
  if (!known(options.arithmetic)) {
    bad("arithmetic", text("unknown value ", static_cast<int>(options.arithmetic),
                           "; must be standard or bfloat16"));
  }
  if (options.arithmetic == Arithmetic::bfloat16 && options.solver != Solver::chebyshev) {
    bad("arithmetic", text("bfloat16 is for solver chebyshev, not ", name(options.solver),
                           "; pass solver chebyshev or arithmetic standard"));
  }
  if (options.arithmetic == Arithmetic::bfloat16 && options.num_iter == kAutoNumIter) {
    bad("arithmetic", text("bfloat16 is for a num_iter >= 1, not for ", kAutoNumIter,
                           " (kAutoNumIter), whose tolerance its rounding would not meet; pass a "
                           "num_iter or arithmetic standard"));
  }
  if (options.chunk_size < 0 || options.chunk_size > kMaxChunkSize) {
    bad("chunk_size", text("got ", options.chunk_size, "; must be in 1..", kMaxChunkSize,
                           ", or 0 for the backend's choice"));
  }
  if (!known(options.backend)) {
    bad("backend", text("unknown value ", static_cast<int>(options.backend),
                        "; must be automatic, cpu, reference or cuda"));
  }
}

// Gates, their gradients, the residual and x may keep float32's digits beside 16-bit q, k and v.
void check_mixed_dtype(std::string_view argument, const ConstView& view, DType q) {
  check_dtype_or_float32(argument, view, q, "q");
}

// Heads of one of q, k, v: `total` heads in all, each read by a group of them.
int64_t group_of(const char* argument, int64_t heads, int64_t total, const char* total_from) {
  if (heads < 1 || total % heads != 0) {
    fail(
        ErrorCode::invalid_shape, argument,
        text("has ", heads, " heads; must divide H = ", total, " (the heads of ", total_from, ")"));
  }
  return total / heads;
}

double element(const ConstView& view, int64_t b, int64_t t, int64_t h) {
  const int64_t at = b * view.stride[0] + t * view.stride[1] + h * view.stride[2];
  return load_element(view.dtype, view.data, at);
}

// A ridge ratio that is not positive would make x_t meaningless without a sign of it in the output,
// and one number a token and head costs nothing beside K^2 operations: these are the only values
// inside tensors that are looked at.
double smallest_ridge_ratio(const GkaProblem& p) {
  const ConstView& a = p.inputs.ridge_ratio;
  if (!a.defined()) return p.options.ridge_ratio;
  // Memory of a GPU is not looked at from here: its kernels answer NaN where a_t is not positive.
  if (p.options.backend == Backend::cuda) return INFINITY;
  double smallest = INFINITY;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t t = 0; t < p.T; ++t) {
      for (int64_t h = 0; h < p.H; ++h) {
        const double value = element(a, b, t, h);
        if (!(value > 0) || !std::isfinite(value)) {
          fail(ErrorCode::invalid_argument, "ridge_ratio",
               text("ridge_ratio[", b, ", ", t, ", ", h, "] is ", value,
                    "; every ratio must be > 0 and finite"));
        }
        smallest = std::min(smallest, value);
      }
    }
  }
  return smallest;
}

// Everything that forward and backward share, once H is known from o or d_o (`h_source`).
GkaProblem validate_inputs(const GkaInputs& in, const GkaOptions& options, int64_t H,
                           const char* h_source) {
  check_options(options);
  GkaProblem p;
  p.inputs = in;
  p.options = options;
  p.executor = options.executor ? options.executor : &default_executor();
  p.H = H;

  check_required("q", in.q, {{"B", {}}, {"T", {}}, {"Hq", {}}, {"K", {}}});
  p.B = in.q.size[0];
  p.T = in.q.size[1];
  p.K = in.q.size[3];
  p.dtype = in.q.dtype;
  check_required("k", in.k, {{"B", p.B}, {"T", p.T}, {"Hk", {}}, {"K", p.K}}, "as q");
  check_required("v", in.v, {{"B", p.B}, {"T", p.T}, {"Hv", {}}, {"V", {}}}, "as q");
  p.V = in.v.size[3];
  check_arithmetic(p);
  if (p.K < 1 || p.K > kMaxHeadDim) {
    fail(ErrorCode::invalid_shape, "q",
         text("key head dim K is ", p.K, "; must be in 1..", kMaxHeadDim));
  }
  if (p.V < 1 || p.V > kMaxHeadDim) {
    fail(ErrorCode::invalid_shape, "v",
         text("value head dim V is ", p.V, "; must be in 1..", kMaxHeadDim));
  }
  if (H < 1) fail(ErrorCode::invalid_shape, h_source, text("has ", H, " heads; must be >= 1"));
  p.q_group = group_of("q", in.q.size[2], H, h_source);
  p.k_group = group_of("k", in.k.size[2], H, h_source);
  p.v_group = group_of("v", in.v.size[2], H, h_source);

  const std::string why = text("q is ", name(p.dtype), " and k and v have its dtype");
  check_dtype("k", in.k, p.dtype, why);
  check_dtype("v", in.v, p.dtype, why);
  const std::array<std::pair<const char*, const ConstView*>, 5> per_token = {
      {{"g", &in.g},
       {"gk", &in.gk},
       {"alpha", &in.alpha},
       {"beta", &in.beta},
       {"ridge_ratio", &in.ridge_ratio}}};
  for (const auto& [argument, view] : per_token) {
    if (!present(*view)) continue;
    check_tensor(argument, *view, {{"B", p.B}, {"T", p.T}, {"H", H}});
    check_mixed_dtype(argument, *view, p.dtype);
  }

  p.sequences = make_sequences(p.B, p.T, in.cu_seqlens);
  p.N = std::ssize(p.sequences);
  p.num_states = in.slots.empty() || in.h0.rank != 4 ? p.N : in.h0.size[0];
  if (present(in.h0)) {
    check_tensor("h0", in.h0, {{"N", p.num_states}, {"H", H}, {"K", p.K}, {"K", p.K}});
    check_dtype("h0", in.h0, state_dtype(p), "states are float64 where q is, else float32");
  }
  if (present(in.u0)) {
    check_tensor("u0", in.u0, {{"N", p.num_states}, {"H", H}, {"K", p.K}, {"V", p.V}});
    check_dtype("u0", in.u0, state_dtype(p), "states are float64 where q is, else float32");
  }
  p.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.K)));

  if (options.tolerance == kDtypeTolerance) p.options.tolerance = dtype_tolerance(p.dtype);
  const double smallest = smallest_ridge_ratio(p);
  if (options.solver == Solver::chebyshev && options.num_iter == kAutoNumIter &&
      std::isfinite(smallest)) {
    chebyshev_num_iter(smallest, p.options.tolerance);  // throws where no int can hold the count
  }
  return p;
}

// An optional tensor that is written and shares q's dtype.
void check_output(const char* argument, const View& view, const GkaProblem& p,
                  std::initializer_list<Dim> dims) {
  if (!present(view)) return;
  check_writable(argument, view, dims);
  check_dtype(argument, view, p.dtype, text("as q"));
}

// The same, or float32 beside a 16-bit q.
void check_mixed_output(const char* argument, const View& view, const GkaProblem& p,
                        std::initializer_list<Dim> dims) {
  if (!present(view)) return;
  check_writable(argument, view, dims);
  check_mixed_dtype(argument, view, p.dtype);
}

void check_state(const char* argument, const View& view, const GkaProblem& p, int64_t columns,
                 const char* letter) {
  if (!present(view)) return;
  check_writable(argument, view, {{"N", p.num_states}, {"H", p.H}, {"K", p.K}, {letter, columns}});
  check_dtype(argument, view, state_dtype(p), "states are float64 where q is, else float32");
}

void check_segment_states(const char* argument, const ConstView& view, const GkaProblem& p) {
  if (!present(view)) return;
  const int64_t size = gka_segment_state_size(p.K, p.V);
  check_tensor(argument, view,
               {{"B", p.B}, {"H", p.H}, {"T/512", p.T / kSegmentTokens}, {"state", size}});
  check_dtype(argument, view, state_dtype(p), "states are float64 where q is, else float32");
  if (view.numel() > 0 && view.stride[3] != 1) {
    fail(ErrorCode::invalid_shape, argument,
         text("stride ", view.stride[3], " of its last dimension; must be 1"));
  }
  const GkaOptions& options = p.options;
  if (options.backend != Backend::automatic && options.backend != Backend::cpu) {
    fail(ErrorCode::unsupported, argument,
         text("is for backend cpu; leave it absent with backend ", name(options.backend)));
  }
  if (options.chunk_size > 0 && !std::has_single_bit(static_cast<uint64_t>(options.chunk_size))) {
    fail(ErrorCode::invalid_argument, argument,
         text("needs chunks that end where states are kept; pass a chunk_size that is 0 or a power "
              "of two, not ",
              options.chunk_size, ", or leave it absent"));
  }
}

std::vector<Named> named_inputs(const GkaInputs& in) {
  return {{"q", in.q},       {"k", in.k},
          {"v", in.v},       {"g", in.g},
          {"gk", in.gk},     {"alpha", in.alpha},
          {"beta", in.beta}, {"h0", in.h0},
          {"u0", in.u0},     {"ridge_ratio", in.ridge_ratio}};
}

}  // namespace

void validate_options(const GkaOptions& options) {
  check_options(options);
}

void check_arithmetic(const GkaProblem& p) {
  if (p.options.arithmetic == Arithmetic::bfloat16 && p.dtype == DType::float64) {
    fail(ErrorCode::invalid_argument, "arithmetic",
         "bfloat16 is for float32, bfloat16 and float16 tensors, and q is float64; pass arithmetic "
         "standard");
  }
}

GkaProblem validate_forward(const GkaInputs& inputs, const GkaOutputs& out,
                            const GkaOptions& options) {
  check_required("o", out.o, {{"B", {}}, {"T", {}}, {"H", {}}, {"V", {}}});
  const GkaProblem p = validate_inputs(inputs, options, out.o.size[2], "o");
  check_output("o", out.o, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}, {"V", p.V}});
  check_mixed_output("x", out.x, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}, {"K", p.K}});
  check_mixed_output("residual", out.residual, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}});
  check_state("h_final", out.h_final, p, p.K, "K");
  check_state("u_final", out.u_final, p, p.V, "V");
  check_segment_states("segment_states", out.segment_states, p);
  if (present(out.segment_states)) {
    check_writable("segment_states", out.segment_states,
                   {{"B", {}}, {"H", {}}, {"T/512", {}}, {"state", {}}});
  }
  check_in_place("h_final", out.h_final, "h0", inputs.h0);
  check_in_place("u_final", out.u_final, "u0", inputs.u0);
  const std::array<Named, 6> written = {{{"o", out.o},
                                         {"segment_states", out.segment_states},
                                         {"x", out.x},
                                         {"residual", out.residual},
                                         {"h_final", out.h_final},
                                         {"u_final", out.u_final}}};
  check_distinct(written, named_inputs(inputs), {{"h_final", "h0"}, {"u_final", "u0"}});
  return p;
}

GkaProblem validate_backward(const GkaInputs& inputs, const GkaSaved& saved,
                             const GkaOutputGrads& output_grads, const GkaInputGrads& grads,
                             const GkaOptions& options) {
  check_required("d_o", output_grads.d_o, {{"B", {}}, {"T", {}}, {"H", {}}, {"V", {}}});
  const GkaProblem p = validate_inputs(inputs, options, output_grads.d_o.size[2], "d_o");
  const auto check_input = [&](const char* argument, const ConstView& view, DType dtype,
                               std::initializer_list<Dim> dims) {
    if (!present(view)) return;
    check_tensor(argument, view, dims);
    check_dtype(argument, view, dtype,
                dtype == p.dtype ? "as q" : "states are float64 where q is, else float32");
  };
  check_input("d_o", output_grads.d_o, p.dtype, {{"B", p.B}, {"T", p.T}, {"H", p.H}, {"V", p.V}});
  check_input("d_h_final", output_grads.d_h_final, state_dtype(p),
              {{"N", p.N}, {"H", p.H}, {"K", p.K}, {"K", p.K}});
  check_input("d_u_final", output_grads.d_u_final, state_dtype(p),
              {{"N", p.N}, {"H", p.H}, {"K", p.K}, {"V", p.V}});
  if (present(saved.x)) {
    check_tensor("saved_x", saved.x, {{"B", p.B}, {"T", p.T}, {"H", p.H}, {"K", p.K}});
    check_mixed_dtype("saved_x", saved.x, p.dtype);
  }
  check_segment_states("segment_states", saved.segment_states, p);

  check_output("dq", grads.dq, p, {{"B", p.B}, {"T", p.T}, {"Hq", inputs.q.size[2]}, {"K", p.K}});
  check_output("dk", grads.dk, p, {{"B", p.B}, {"T", p.T}, {"Hk", inputs.k.size[2]}, {"K", p.K}});
  check_output("dv", grads.dv, p, {{"B", p.B}, {"T", p.T}, {"Hv", inputs.v.size[2]}, {"V", p.V}});
  check_mixed_output("dg", grads.dg, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}});
  check_mixed_output("dgk", grads.dgk, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}});
  check_mixed_output("dalpha", grads.dalpha, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}});
  check_mixed_output("dbeta", grads.dbeta, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}});
  check_mixed_output("d_ridge_ratio", grads.d_ridge_ratio, p, {{"B", p.B}, {"T", p.T}, {"H", p.H}});
  check_state("d_h0", grads.d_h0, p, p.K, "K");
  check_state("d_u0", grads.d_u0, p, p.V, "V");

  // A gradient of what was not given is a mistake of the caller's; the ridge ratio alone always
  // has a value, the scalar option, whose gradient is the sum of the tokens'.
  const auto needs = [](const char* argument, const View& grad, const char* input_name,
                        const ConstView& input) {
    if (present(grad) && !present(input)) {
      fail(ErrorCode::invalid_argument, argument,
           text("asked for, but the input ", input_name, " is absent; pass ", input_name,
                " or leave ", argument, " absent"));
    }
  };
  needs("dg", grads.dg, "g", inputs.g);
  needs("dgk", grads.dgk, "gk", inputs.gk);
  needs("dalpha", grads.dalpha, "alpha", inputs.alpha);
  needs("dbeta", grads.dbeta, "beta", inputs.beta);
  needs("d_h0", grads.d_h0, "h0", inputs.h0);
  needs("d_u0", grads.d_u0, "u0", inputs.u0);

  const std::array<Named, 10> written = {{{"dq", grads.dq},
                                          {"dk", grads.dk},
                                          {"dv", grads.dv},
                                          {"dg", grads.dg},
                                          {"dgk", grads.dgk},
                                          {"dalpha", grads.dalpha},
                                          {"dbeta", grads.dbeta},
                                          {"d_ridge_ratio", grads.d_ridge_ratio},
                                          {"d_h0", grads.d_h0},
                                          {"d_u0", grads.d_u0}}};
  std::vector<Named> read = named_inputs(inputs);
  read.insert(read.end(), {{"saved_x", saved.x},
                           {"segment_states", saved.segment_states},
                           {"d_o", output_grads.d_o},
                           {"d_h_final", output_grads.d_h_final},
                           {"d_u_final", output_grads.d_u_final}});
  check_distinct(written, read, {});
  return p;
}

}  // namespace kalmanet::core
