// How many Chebyshev steps an accuracy takes, and how large the states are.
#include <cmath>
#include <limits>

#include "core/text.hpp"
#include "kalmanet/error.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet {

// The system's eigenvalues lie in [lambda, lambda + f], so kappa = (1 + a) / a. R needs care at
// both ends: R = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), and log R = log1p(-2 / (sqrt(kappa) + 1))
// keeps its digits where kappa is large and R close to 1.
int chebyshev_num_iter(double ridge_ratio, double tolerance) {
  if (!(ridge_ratio > 0) || !std::isfinite(ridge_ratio)) {
    throw Error(ErrorCode::invalid_argument, "ridge_ratio",
                core::text("got ", ridge_ratio, "; must be > 0 and finite"));
  }
  if (!(tolerance > 0) || !std::isfinite(tolerance)) {
    throw Error(ErrorCode::invalid_argument, "tolerance",
                core::text("got ", tolerance, "; must be > 0 and finite"));
  }
  const double sqrt_kappa = std::sqrt((1 + ridge_ratio) / ridge_ratio);
  const double log_r = std::log1p(-2 / (sqrt_kappa + 1));  // <= 0; -inf where kappa rounds to 1
  const double steps = std::ceil(std::log(tolerance / 2) / log_r);
  if (!(steps < std::numeric_limits<int>::max())) {
    throw Error(ErrorCode::invalid_argument, "ridge_ratio",
                core::text("got ", ridge_ratio, ", for which a relative error of ", tolerance,
                           " would take ", steps,
                           " Chebyshev steps; give a larger ridge_ratio or a fixed num_iter"));
  }
  return steps < 1 ? 1 : static_cast<int>(steps);
}

namespace {

void check_range(const char* argument, int64_t value, int64_t largest) {
  if (value < 1 || value > largest) {
    throw Error(ErrorCode::invalid_argument, argument,
                core::text("got ", value, "; must be in 1..", largest));
  }
}

}  // namespace

int64_t gka_segment_state_size(int64_t key_dim, int64_t value_dim) {
  check_range("key_dim", key_dim, kMaxHeadDim);
  check_range("value_dim", value_dim, kMaxHeadDim);
  const auto padded = [](int64_t width) { return (width + 15) / 16 * 16; };
  return padded(key_dim) * (padded(key_dim) + padded(value_dim));
}

int64_t gka_state_bytes(int64_t num_heads, int64_t key_dim, int64_t value_dim) {
  check_range("num_heads", num_heads,
              int64_t{1} << 40);  // far from overflow: 2^40 * 512 KiB < 2^60
  check_range("key_dim", key_dim, kMaxHeadDim);
  check_range("value_dim", value_dim, kMaxHeadDim);
  return num_heads * key_dim * (key_dim + value_dim) * size_of(DType::float32);
}

}  // namespace kalmanet
