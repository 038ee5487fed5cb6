// GKA forward and backward as XLA foreign functions on the CPU: buffers to views, kalmanet called.
//
// Operands, in this order: q, k, v, g, gk, alpha, ridge, h0, u0, cu_seqlens (int32), and for the
// backward x, d_o, dh, du. Bit i of the attribute `given` says whether operand i is one or stands
// for an absent one (its buffer then is not looked at). Dimensions in front of a tensor's own
// (vmap) are folded into its first.
#include <xla/ffi/api/ffi.h>

#include <exception>
#include <string>
#include <vector>

#include "kalmanet/kalmanet.hpp"

namespace {

namespace ffi = xla::ffi;
using kalmanet::ConstView;
using kalmanet::DType;
using kalmanet::Error;
using kalmanet::ErrorCode;
using kalmanet::View;

enum Operand { q, k, v, g, gk, alpha, ridge, h0, u0, cu_seqlens, x, d_o, dh, du };
constexpr const char* kNames[] = {"q",  "k",  "v",          "g", "gk",  "alpha", "ridge",
                                  "h0", "u0", "cu_seqlens", "x", "d_o", "dh",    "du"};
constexpr int kRanks[] = {4, 4, 4, 3, 3, 3, 3, 4, 4, 1, 4, 4, 4, 4};

DType dtype_of(ffi::DataType type, const char* name) {
  switch (type) {
    case ffi::DataType::F32:
      return DType::float32;
    case ffi::DataType::F64:
      return DType::float64;
    case ffi::DataType::BF16:
      return DType::bfloat16;
    case ffi::DataType::F16:
      return DType::float16;
    default:
      throw Error(ErrorCode::invalid_dtype, name, "must be float32, float64, bfloat16 or float16");
  }
}

View view_of(const ffi::AnyBuffer& buffer, int rank, const char* name) {
  const auto dims = buffer.dimensions();
  const int extra = static_cast<int>(dims.size()) - rank;
  if (extra < 0) {
    throw Error(
        ErrorCode::invalid_shape, name,
        "must have " + std::to_string(rank) + " dimensions, got " + std::to_string(dims.size()));
  }
  alignas(64) static unsigned char nothing[64];  // an empty buffer may have no address
  View view;
  view.data = buffer.untyped_data() != nullptr ? buffer.untyped_data() : nothing;
  view.dtype = dtype_of(buffer.element_type(), name);
  view.rank = rank;
  for (int d = 0; d < rank; ++d) view.size[d] = dims[static_cast<size_t>(d + extra)];
  for (int d = 0; d < extra; ++d) view.size[0] *= dims[static_cast<size_t>(d)];
  int64_t stride = 1;
  for (int d = rank - 1; d >= 0; --d) {
    view.stride[d] = stride;
    stride *= view.size[d];
  }
  return view;
}

struct Call {
  kalmanet::GkaInputs inputs;
  kalmanet::GkaOptions options;
  std::vector<int64_t> offsets;
  ConstView x, d_o, dh, du;
};

bool has(int64_t given, Operand operand) {
  return (given >> operand & 1) != 0;
}

void read(const ffi::RemainingArgs& args, int64_t given, Call& call) {
  kalmanet::GkaInputs& in = call.inputs;
  ConstView* const views[] = {&in.q,     &in.k,           &in.v,    &in.g,   &in.gk,
                              &in.alpha, &in.ridge_ratio, &in.h0,   &in.u0,  nullptr,
                              &call.x,   &call.d_o,       &call.dh, &call.du};
  for (size_t i = 0; i < args.size(); ++i) {
    if (!has(given, static_cast<Operand>(i))) continue;
    const auto buffer = args.get<ffi::AnyBuffer>(i).value();
    if (i != cu_seqlens) {
      *views[i] = view_of(buffer, kRanks[i], kNames[i]);
      continue;
    }
    if (buffer.element_type() != ffi::DataType::S32 || buffer.dimensions().size() != 1) {
      throw Error(ErrorCode::invalid_dtype, "cu_seqlens", "must be int32 [N+1]");
    }
    const auto* data = static_cast<const int32_t*>(buffer.untyped_data());
    call.offsets.assign(data, data + buffer.element_count());
    in.cu_seqlens = call.offsets;
  }
}

View result(ffi::RemainingRets& results, size_t i, int rank, const char* name) {
  return view_of(**results.get<ffi::AnyBuffer>(i), rank, name);
}

kalmanet::Solver solver_of(std::string_view text) {
  using kalmanet::Solver;
  for (const Solver s : {Solver::chebyshev, Solver::direct, Solver::cg, Solver::automatic}) {
    if (text == kalmanet::name(s)) return s;
  }
  throw Error(ErrorCode::invalid_argument, "solver", "is \"" + std::string(text) + "\"");
}

template <class F>
ffi::Error guarded(const F& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  }
}

void set_options(Call& call, double scale, double ridge_ratio, std::string_view solver,
                 int64_t num_iter, double tolerance, int64_t chunk_size) {
  call.options.scale = scale;
  call.options.ridge_ratio = ridge_ratio;
  call.options.solver = solver_of(solver);
  call.options.num_iter = static_cast<int>(num_iter);
  call.options.tolerance = tolerance;
  call.options.chunk_size = chunk_size;
}

// Results: o, h, u, x.
ffi::Error forward(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t given, double scale,
                   double ridge_ratio, std::string_view solver, int64_t num_iter, double tolerance,
                   int64_t chunk_size) {
  return guarded([&] {
    Call call;
    read(args, given, call);
    set_options(call, scale, ridge_ratio, solver, num_iter, tolerance, chunk_size);
    kalmanet::GkaOutputs out;
    out.o = result(results, 0, 4, "o");
    out.h_final = result(results, 1, 4, "h");
    out.u_final = result(results, 2, 4, "u");
    out.x = result(results, 3, 4, "x");
    kalmanet::gka_forward(call.inputs, out, call.options);
  });
}

// Results: the gradients of the first nine operands; of one that is absent nothing is written.
ffi::Error backward(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t given,
                    double scale, double ridge_ratio, std::string_view solver, int64_t num_iter,
                    double tolerance, int64_t chunk_size, bool bp_lambda) {
  return guarded([&] {
    Call call;
    read(args, given, call);
    set_options(call, scale, ridge_ratio, solver, num_iter, tolerance, chunk_size);
    call.options.bp_lambda = bp_lambda;
    kalmanet::GkaOutputGrads output_grads;
    output_grads.d_o = call.d_o;
    output_grads.d_h_final = call.dh;
    output_grads.d_u_final = call.du;
    kalmanet::GkaInputGrads grads;
    View* const views[] = {&grads.dq,
                           &grads.dk,
                           &grads.dv,
                           &grads.dg,
                           &grads.dgk,
                           &grads.dalpha,
                           &grads.d_ridge_ratio,
                           &grads.d_h0,
                           &grads.d_u0};
    for (size_t i = 0; i < std::size(views); ++i) {
      if (has(given, static_cast<Operand>(i))) *views[i] = result(results, i, kRanks[i], kNames[i]);
    }
    kalmanet::gka_backward(call.inputs, call.x, output_grads, grads, call.options);
  });
}

}  // namespace

#define KN_SHARED_ATTRIBUTES            \
  Attr<int64_t>("given")                \
      .Attr<double>("scale")            \
      .Attr<double>("ridge_ratio")      \
      .Attr<std::string_view>("solver") \
      .Attr<int64_t>("num_iter")        \
      .Attr<double>("tolerance")        \
      .Attr<int64_t>("chunk_size")

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kalmanet_gka_forward, forward,
    ffi::Ffi::Bind().RemainingArgs().RemainingRets().KN_SHARED_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kalmanet_gka_backward, backward,
    ffi::Ffi::Bind().RemainingArgs().RemainingRets().KN_SHARED_ATTRIBUTES.Attr<bool>("bp_lambda"));
