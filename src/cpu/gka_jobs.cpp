// From a validated problem to the kernels' jobs.
#include "cpu/gka_jobs.hpp"

#include <cstring>
#include <stdexcept>

namespace kalmanet::cpu {
namespace {

constexpr int64_t kKeepFloats = int64_t{4} << 20;  // 16 MiB a thread

struct ThreadScratch {
  FloatBuffer buffer;
  bool in_use = false;
};

thread_local ThreadScratch thread_scratch;

template <class Void, class Out>
Out* element(const BasicView<Void>& view, int64_t i0, int64_t i2) {
  return static_cast<Out*>(view.data) + i0 * view.stride[0] + i2 * view.stride[2];
}

}  // namespace

float* FloatBuffer::reserve(int64_t floats) {
  if (floats <= capacity_) return data_;
  std::free(data_);
  data_ = nullptr;
  capacity_ = 0;
  const int64_t rounded = padded(floats);
  data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(rounded) * sizeof(float)));
  if (data_ == nullptr) throw std::bad_alloc();
  capacity_ = rounded;
  return data_;
}

ScratchLease::ScratchLease(int64_t floats) {
  // A task never runs inside another task's kernel, so one lease a thread is all there is.
  if (thread_scratch.in_use) throw std::logic_error("nested scratch lease");
  data_ = thread_scratch.buffer.reserve(floats);
  thread_scratch.in_use = true;
}

ScratchLease::~ScratchLease() {
  thread_scratch.in_use = false;
  if (thread_scratch.buffer.capacity() > kKeepFloats) thread_scratch.buffer.release();
}

Rows rows_of(const ConstView& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element<const void, const float>(view, row, head), view.stride[1], view.stride[3]};
}

OutRows out_rows_of(const View& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element<void, float>(view, row, head), view.stride[1], view.stride[3], false};
}

Column column_of(const ConstView& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element<const void, const float>(view, row, head), view.stride[1]};
}

OutColumn out_column_of(const View& view, int64_t row, int64_t head) {
  if (!view.defined()) return {};
  return {element<void, float>(view, row, head), view.stride[1]};
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
  return in;
}

void load_state(const ConstView& view, int64_t n, int64_t head, int64_t rows, int64_t cols,
                float* buffer) {
  const int64_t width = padded(cols);
  std::memset(buffer, 0, static_cast<size_t>(padded(rows) * width) * sizeof(float));
  if (!view.defined()) return;
  const float* base =
      static_cast<const float*>(view.data) + n * view.stride[0] + head * view.stride[1];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      buffer[r * width + c] = base[r * view.stride[2] + c * view.stride[3]];
    }
  }
}

void store_state(const float* buffer, const View& view, int64_t n, int64_t head, int64_t rows,
                 int64_t cols) {
  if (!view.defined()) return;
  const int64_t width = padded(cols);
  float* base = static_cast<float*>(view.data) + n * view.stride[0] + head * view.stride[1];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      base[r * view.stride[2] + c * view.stride[3]] = buffer[r * width + c];
    }
  }
}

StateBuffers state_at(float* base, int64_t K) {
  return {base, base + padded(K) * padded(K)};
}

}  // namespace kalmanet::cpu
