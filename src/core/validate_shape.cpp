// A problem known by its sizes alone: what is asked before there are tensors.
#include <array>
#include <cmath>
#include <string>
#include <tuple>

#include "core/check.hpp"
#include "core/text.hpp"

namespace kalmanet::core {

GkaProblem validate_shape(const GkaShape& shape, const GkaOptions& options) {
  validate_options(options);
  const auto in_range = [](const char* argument, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
      fail(ErrorCode::invalid_shape, argument,
           text("is ", value, "; must be in ", least, "..", most));
    }
  };
  constexpr int64_t kMost = int64_t{1} << 48;  // the address space of today's processors
  in_range("B", shape.B, 0, kMost);
  in_range("T", shape.T, 0, kMost);
  in_range("H", shape.H, 1, kMost);
  in_range("K", shape.K, 1, kMaxHeadDim);
  in_range("V", shape.V, 1, kMaxHeadDim);
  if (size_of(shape.dtype) == 0) {
    fail(ErrorCode::invalid_dtype, "dtype",
         text("unknown dtype (", static_cast<int>(shape.dtype),
              "); must be float32, float64, bfloat16 or float16"));
  }
  GkaProblem p;
  p.B = shape.B;
  p.T = shape.T;
  p.H = shape.H;
  p.K = shape.K;
  p.V = shape.V;
  p.dtype = shape.dtype;
  p.options = options;
  check_arithmetic(p);
  if (options.tolerance == kDtypeTolerance) p.options.tolerance = dtype_tolerance(p.dtype);
  p.executor = options.executor ? options.executor : &default_executor();
  p.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.K)));
  const std::array<std::tuple<const char*, int64_t, int64_t*>, 3> groups = {
      {{"Hq", shape.Hq, &p.q_group}, {"Hk", shape.Hk, &p.k_group}, {"Hv", shape.Hv, &p.v_group}}};
  for (const auto& [argument, heads, group] : groups) {
    if (heads < 0 || (heads > 0 && p.H % heads != 0)) {
      fail(ErrorCode::invalid_shape, argument,
           text("is ", heads, "; must divide H = ", p.H, ", or be 0 for H"));
    }
    *group = heads == 0 ? 1 : p.H / heads;
  }
  // The largest tensors there could be, in bytes.
  int64_t elements;
  if (__builtin_mul_overflow(p.B, p.T, &elements) ||
      __builtin_mul_overflow(elements, p.H, &elements) ||
      __builtin_mul_overflow(elements, kMaxHeadDim * 8, &elements)) {
    fail(ErrorCode::invalid_shape, "B",
         text("B = ", p.B, ", T = ", p.T, ", H = ", p.H, " reach beyond the 64-bit address space"));
  }
  p.sequences = make_sequences(p.B, p.T, shape.cu_seqlens);
  p.N = std::ssize(p.sequences);
  return p;
}

}  // namespace kalmanet::core
