// From a validated problem to the kernels' jobs: views to pointers, states to padded buffers,
// scratch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "core/problem.hpp"
#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

// 64-byte aligned, uninitialised memory.
class RawBuffer {
 public:
  RawBuffer() = default;
  RawBuffer(const RawBuffer&) = delete;
  RawBuffer& operator=(const RawBuffer&) = delete;
  ~RawBuffer() { std::free(data_); }

  // At least `bytes`; the content is lost.
  void* reserve(int64_t bytes);
  void release();
  void* data() const noexcept { return data_; }
  int64_t capacity() const noexcept { return capacity_; }

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Scratch of the calling thread, kept from call to call so that one in steady state allocates
// nothing. Leases nest and end in the reverse order of their beginnings; a thread keeps 16 MiB, and
// what is more is given back when its lease ends.
class RawScratchLease {
 public:
  explicit RawScratchLease(int64_t bytes);
  ~RawScratchLease();
  RawScratchLease(const RawScratchLease&) = delete;
  RawScratchLease& operator=(const RawScratchLease&) = delete;
  void* data() const noexcept { return data_; }

 private:
  void* data_;
};

// The same for `count` numbers of one type.
template <class S>
class ScratchLease {
 public:
  explicit ScratchLease(int64_t count) : lease_(count * static_cast<int64_t>(sizeof(S))) {}
  S* data() const noexcept { return static_cast<S*>(lease_.data()); }

 private:
  RawScratchLease lease_;
};

// The table's kernels of one storage type.
template <class S>
const GkaKernels<S>& kernels_of(const KernelTable& table) {
  if constexpr (std::is_same_v<S, double>) {
    return table.gka_float64;
  } else {
    return table.gka;
  }
}

HeadInputs head_inputs(const core::GkaProblem& problem, const core::Sequence& sequence,
                       int64_t head);

Rows rows_of(const ConstView& view, int64_t row, int64_t head);  // of [B,T,heads,width]
OutRows out_rows_of(const View& view, int64_t row, int64_t head);
Column column_of(const ConstView& view, int64_t row, int64_t head);  // of [B,T,H]
OutColumn out_column_of(const View& view, int64_t row, int64_t head);

// A head's slots of a [B,H,slots,size] view.
template <class S>
SegmentStates<S> segment_states_of(const ConstView& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  const int64_t at = row * view.stride[0] + head * view.stride[1];
  return {const_cast<S*>(static_cast<const S*>(view.data)) + at, view.stride[2]};
}

// One head's state of a [N,H,rows,cols] view to and from a padded buffer
// [padded(rows)][padded(cols)] of the view's own dtype, S. An absent view loads zeros.
template <class S>
void load_state(const ConstView& view, int64_t n, int64_t head, int64_t rows, int64_t cols,
                S* buffer);
template <class S>
void store_state(const S* buffer, const View& view, int64_t n, int64_t head, int64_t rows,
                 int64_t cols);

// H and U inside state_floats(K, V) elements.
template <class S>
StateBuffers<S> state_at(S* base, int64_t K) {
  return {base, base + padded(K) * padded(K)};
}

}  // namespace kalmanet::cpu
