// From a validated problem to the kernels' jobs.
#include "cpu/gka_jobs.hpp"

#include <cstring>
#include <stdexcept>

#include "cpu/dispatch.hpp"

namespace kalmanet::cpu {
namespace {

constexpr int64_t kKeepBytes = int64_t{16} << 20;  // a thread

// A backward of few heads is the deepest: states, z, x, the sums of dq, dk, dv, a task's scratch.
constexpr int kMostLeases = 8;

struct ThreadScratch {
  RawBuffer buffers[kMostLeases];
  int leased = 0;

  int64_t bytes() const {
    int64_t sum = 0;
    for (const RawBuffer& buffer : buffers) sum += buffer.capacity();
    return sum;
  }
};

thread_local ThreadScratch thread_scratch;

// The address of element [i0, 0, i2, 0].
const void* element(const ConstView& view, int64_t i0, int64_t i2) {
  const int64_t at = i0 * view.stride[0] + i2 * view.stride[2];
  return static_cast<const char*>(view.data) + at * size_of(view.dtype);
}
void* element(const View& view, int64_t i0, int64_t i2) {
  return const_cast<void*>(element(ConstView(view), i0, i2));
}

}  // namespace

void* RawBuffer::reserve(int64_t bytes) {
  if (bytes <= capacity_) return data_;
  release();
  const int64_t rounded = (bytes + 63) / 64 * 64;
  data_ = std::aligned_alloc(64, static_cast<size_t>(rounded));
  if (data_ == nullptr) throw std::bad_alloc();
  capacity_ = rounded;
  return data_;
}

void RawBuffer::release() {
  std::free(data_);
  data_ = nullptr;
  capacity_ = 0;
}

RawScratchLease::RawScratchLease(int64_t bytes) {
  ThreadScratch& own = thread_scratch;
  if (own.leased == kMostLeases) throw std::logic_error("too many scratch leases on a thread");
  data_ = own.buffers[own.leased].reserve(bytes);
  ++own.leased;
}

RawScratchLease::~RawScratchLease() {
  ThreadScratch& own = thread_scratch;
  --own.leased;
  if (own.bytes() > kKeepBytes) own.buffers[own.leased].release();
}

Rows rows_of(const ConstView& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element(view, row, head), view.dtype, view.stride[1], view.stride[3]};
}

OutRows out_rows_of(const View& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element(view, row, head), view.dtype, view.stride[1], view.stride[3], false};
}

Column column_of(const ConstView& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element(view, row, head), view.dtype, view.stride[1]};
}

OutColumn out_column_of(const View& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element(view, row, head), view.dtype, view.stride[1]};
}

HeadInputs head_inputs(const core::GkaProblem& problem, const core::Sequence& sequence,
                       int64_t head) {
  const GkaInputs& x = problem.inputs;
  HeadInputs in;
  in.K = problem.K;
  in.V = problem.V;
  in.q = rows_of(x.q, sequence.row, head / problem.q_group);
  in.k = rows_of(x.k, sequence.row, head / problem.k_group);
  in.v = rows_of(x.v, sequence.row, head / problem.v_group);
  in.g = column_of(x.g, sequence.row, head);
  in.gk = column_of(x.gk, sequence.row, head);
  in.alpha = column_of(x.alpha, sequence.row, head);
  in.beta = column_of(x.beta, sequence.row, head);
  in.ridge = column_of(x.ridge_ratio, sequence.row, head);
  in.scale = problem.scale;
  in.ridge_ratio = problem.options.ridge_ratio;
  in.solver = problem.options.solver;
  in.num_iter = problem.options.num_iter;
  in.tolerance = problem.options.tolerance;
  if (problem.options.arithmetic == Arithmetic::bfloat16) in.bf16 = &bf16_kernels();
  return in;
}

template <class S>
void load_state(const ConstView& view, int64_t n, int64_t head, int64_t rows, int64_t cols,
                S* buffer) {
  const int64_t width = padded(cols);
  std::memset(buffer, 0, static_cast<size_t>(padded(rows) * width) * sizeof(S));
  if (!view.defined()) return;
  const S* base = static_cast<const S*>(view.data) + n * view.stride[0] + head * view.stride[1];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      buffer[r * width + c] = base[r * view.stride[2] + c * view.stride[3]];
    }
  }
}

template <class S>
void store_state(const S* buffer, const View& view, int64_t n, int64_t head, int64_t rows,
                 int64_t cols) {
  if (!view.defined()) return;
  const int64_t width = padded(cols);
  S* base = static_cast<S*>(view.data) + n * view.stride[0] + head * view.stride[1];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      base[r * view.stride[2] + c * view.stride[3]] = buffer[r * width + c];
    }
  }
}

template void load_state(const ConstView&, int64_t, int64_t, int64_t, int64_t, float*);
template void load_state(const ConstView&, int64_t, int64_t, int64_t, int64_t, double*);
template void store_state(const float*, const View&, int64_t, int64_t, int64_t, int64_t);
template void store_state(const double*, const View&, int64_t, int64_t, int64_t, int64_t);

}  // namespace kalmanet::cpu
