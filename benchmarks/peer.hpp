// The yardstick: OpenBLAS's float32 products.
#pragma once

#include <cstdint>
#include <string>

#include "floats.hpp"

namespace kalmanet::bench {

// The processor whose kernels OpenBLAS chose, and its build: "Zen; OpenBLAS 0.3.21 ...".
std::string openblas_core();
std::string openblas_build();

// Square float32 matrix product by OpenBLAS.
class MatrixProduct {
 public:
  explicit MatrixProduct(int64_t n);
  // Runs it once on `threads` threads; returns operations a second.
  double rate(int threads);
  // The same on the calling thread alone, by its processor time.
  double rate_of_one_thread();
  int64_t size() const { return n_; }

 private:
  void run(int threads);

  int64_t n_;
  Floats a_, b_, c_;
};

// Bytes a second of a memory copy by one thread (memcpy of far more than any cache holds), read and
// written bytes both counted; the best of three.
double memory_copy_rate();

// `count` products y = H x in a row on one thread, for each of `heads` K x K matrices of its own:
// as a decode step reads its states. y of one product is x of the next.
class VectorProducts {
 public:
  VectorProducts(int64_t heads, int64_t K, int count);
  // Runs them all once; H is symmetric, so either of sgemv's directions gives the answer.
  void run(bool transposed);

 private:
  int64_t heads_, K_;
  int count_;
  Floats h_, x_, y_;
};

}  // namespace kalmanet::bench
