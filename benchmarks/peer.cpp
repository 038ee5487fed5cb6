// The yardstick: OpenBLAS's float32 products.
#include "peer.hpp"

#include <cblas.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "timing.hpp"

namespace kalmanet::bench {

std::string openblas_core() {
  return openblas_get_corename();
}
std::string openblas_build() {
  return openblas_get_config();
}

MatrixProduct::MatrixProduct(int64_t n) : n_(n) {
  const auto size = static_cast<size_t>(n * n);
  a_.resize(size);
  b_.resize(size);
  c_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    a_[i] = static_cast<float>(i % 7) - 3.0f;
    b_[i] = static_cast<float>(i % 5) - 2.0f;
  }
}

void MatrixProduct::run(int threads) {
  openblas_set_num_threads(threads);
  const int n = static_cast<int>(n_);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1.0f, a_.data(), n, b_.data(), n,
              0.0f, c_.data(), n);
}

double MatrixProduct::rate(int threads) {
  const auto n = static_cast<double>(n_);
  return 2.0 * n * n * n / seconds_of([&] { run(threads); });
}

double MatrixProduct::rate_of_one_thread() {
  const auto n = static_cast<double>(n_);
  return 2.0 * n * n * n / cpu_seconds_of(Cpu::thread, [&] { run(1); });
}

double memory_copy_rate() {
  constexpr size_t kFloats = size_t{1} << 26;  // 256 MiB each
  const Floats from(kFloats, 1.0f);
  Floats to(kFloats, 2.0f);
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    const double seconds =
        cpu_seconds_of(Cpu::thread, [&] { std::memcpy(to.data(), from.data(), 4 * kFloats); });
    best = std::max(best, 2.0 * 4.0 * kFloats / seconds);
  }
  return best;
}

VectorProducts::VectorProducts(int64_t heads, int64_t K, int count)
    : heads_(heads),
      K_(K),
      count_(count),
      h_(static_cast<size_t>(heads * K * K)),
      x_(static_cast<size_t>(K), 1.0f),
      y_(static_cast<size_t>(K)) {
  // Symmetric with |H|_F about 1, so that no product overflows or becomes denormal quickly.
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < K; ++j) {
        h_[static_cast<size_t>((h * K + i) * K + j)] =
            i == j ? 1.0f : 1e-4f * static_cast<float>((i * j + h) % 3 - 1);
      }
    }
  }
}

void VectorProducts::run(bool transposed) {
  openblas_set_num_threads(1);
  const int K = static_cast<int>(K_);
  for (int64_t h = 0; h < heads_; ++h) {
    for (int i = 0; i < count_; ++i) {
      cblas_sgemv(CblasRowMajor, transposed ? CblasTrans : CblasNoTrans, K, K, 1.0f,
                  h_.data() + h * K_ * K_, K, x_.data(), 1, 0.0f, y_.data(), 1);
      std::swap(x_, y_);
    }
    for (float& value : x_) value = 1.0f;
  }
}

}  // namespace kalmanet::bench
