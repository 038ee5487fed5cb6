// From a validated problem to the kernels' jobs: views to pointers, states to padded buffers,
// scratch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/problem.hpp"
#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

// 64-byte aligned, uninitialised float32 memory.
class FloatBuffer {
 public:
  FloatBuffer() = default;
  explicit FloatBuffer(int64_t floats) { reserve(floats); }
  FloatBuffer(const FloatBuffer&) = delete;
  FloatBuffer& operator=(const FloatBuffer&) = delete;
  ~FloatBuffer() { std::free(data_); }

  // At least `floats`; the content is lost.
  float* reserve(int64_t floats);
  void release() { *this = FloatBuffer(0, nullptr); }
  float* data() const noexcept { return data_; }
  int64_t capacity() const noexcept { return capacity_; }

 private:
  FloatBuffer(int64_t capacity, float* data) : data_(data), capacity_(capacity) {}
  FloatBuffer& operator=(FloatBuffer&& other) noexcept {
    std::free(data_);
    data_ = other.data_;
    capacity_ = other.capacity_;
    other.data_ = nullptr;
    return *this;
  }
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Scratch of the calling thread, kept from task to task so that a call in steady state allocates
// nothing; pieces above kKeepFloats are given back when the lease ends.
class ScratchLease {
 public:
  explicit ScratchLease(int64_t floats);
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;
  float* data() const noexcept { return data_; }

 private:
  float* data_;
};

HeadInputs head_inputs(const core::GkaProblem& problem, const core::Sequence& sequence,
                       int64_t head);

Rows rows_of(const ConstView& view, int64_t row, int64_t head);  // of [B,T,heads,width]
OutRows out_rows_of(const View& view, int64_t row, int64_t head);
Column column_of(const ConstView& view, int64_t row, int64_t head);  // of [B,T,H]
OutColumn out_column_of(const View& view, int64_t row, int64_t head);

// One head's state of a [N,H,rows,cols] view to and from a padded buffer
// [padded(rows)][padded(cols)]. An absent view loads zeros.
void load_state(const ConstView& view, int64_t n, int64_t head, int64_t rows, int64_t cols,
                float* buffer);
void store_state(const float* buffer, const View& view, int64_t n, int64_t head, int64_t rows,
                 int64_t cols);

// H and U inside state_floats(K, V) floats.
StateBuffers state_at(float* base, int64_t K);

}  // namespace kalmanet::cpu
