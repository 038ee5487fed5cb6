// A step job's states: in place where the kernel may update them where they lie, else in a buffer.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/problem.hpp"
#include "cpu/gka_jobs.hpp"

namespace kalmanet::cpu {

// A state that the step kernel may update where it lies: dense rows that need no padding.
inline bool in_place(const View& view, int64_t cols) {
  return view.defined() && view.stride[3] == 1 && cols % kLanes == 0;
}

template <class S>
S* state_pointer(const View& view, int64_t n, int64_t head) {
  return static_cast<S*>(view.data) + n * view.stride[0] + head * view.stride[1];
}

// Makes one of the two states ready for the step: in place where it may be, else in `buffer`.
template <class S>
S* prepare(const ConstView& initial, const View& final, int64_t n, int64_t head, int64_t rows,
           int64_t cols, S* buffer, int64_t& stride) {
  if (!in_place(final, cols)) {
    load_state(initial, n, head, rows, cols, buffer);
    stride = padded(cols);
    return buffer;
  }
  S* const at = state_pointer<S>(final, n, head);
  stride = final.stride[2];
  const bool same =
      initial.defined() && initial.data == final.data && initial.stride == final.stride;
  if (same) return at;
  for (int64_t r = 0; r < rows; ++r) {
    S* row = at + r * stride;
    if (!initial.defined()) {
      std::memset(row, 0, static_cast<size_t>(cols) * sizeof(S));
      continue;
    }
    const S* from = static_cast<const S*>(initial.data) + n * initial.stride[0] +
                    head * initial.stride[1] + r * initial.stride[2];
    for (int64_t c = 0; c < cols; ++c) row[c] = from[c * initial.stride[3]];
  }
  return at;
}

// From how many bytes of states on a call fetches them ahead, because no cache will have kept them
// since the last token: half of a large last-level cache. With states of 67 MB that takes
// chebyshev(30) from 13.0 us to 9.7 a token and head (K = 128, one thread); where they are cached
// the instructions cost 0.4 us.
constexpr int64_t kBytesKept = int64_t{16} << 20;

// The step of sequence n's `head` may fetch: its own U, and H of the thread's next head, which is
// as many heads further on as there are threads (executors hand out tasks in their order). Only
// states that are dense and updated where they lie: others have just been copied.
template <class S>
StepAhead step_ahead(const core::GkaProblem& problem, const GkaOutputs& outputs, int64_t n,
                     int64_t head) {
  const int64_t K = problem.K, V = problem.V, H = problem.H;
  if (problem.N * H * K * (K + V) * static_cast<int64_t>(sizeof(S)) <= kBytesKept) return {};
  const auto dense_in_place = [](const ConstView& initial, const View& final, int64_t cols) {
    return in_place(final, cols) && initial.data == final.data && initial.stride == final.stride &&
           final.stride[2] == cols;
  };
  const auto lines = [K](int64_t cols) {
    return K * cols * static_cast<int64_t>(sizeof(S)) / kCacheLine;
  };
  StepAhead ahead;
  if (dense_in_place(problem.inputs.u0, outputs.u_final, V)) {
    ahead.at[0] = reinterpret_cast<const char*>(state_pointer<S>(outputs.u_final, n, head));
    ahead.lines[0] = lines(V);
  }
  const int64_t next = n * H + head + problem.executor->concurrency();
  if (next < problem.N * H && dense_in_place(problem.inputs.h0, outputs.h_final, K)) {
    ahead.at[1] =
        reinterpret_cast<const char*>(state_pointer<S>(outputs.h_final, next / H, next % H));
    ahead.lines[1] = lines(K);
  }
  return ahead;
}

// Before the kernel: the states of sequence n and `head`, in place or in `buffers`.
template <class S>
void begin_step(const core::GkaProblem& problem, const GkaOutputs& outputs, int64_t n, int64_t head,
                const StateBuffers<S>& buffers, GkaStepJob<S>& job) {
  const int64_t K = problem.K, V = problem.V;
  job.state.h = prepare(problem.inputs.h0, outputs.h_final, n, head, K, K, buffers.h, job.h_stride);
  job.state.u = prepare(problem.inputs.u0, outputs.u_final, n, head, K, V, buffers.u, job.u_stride);
  job.ahead = step_ahead<S>(problem, outputs, n, head);
}

// After it: back to where the caller wants them.
template <class S>
void end_step(const core::GkaProblem& problem, const GkaOutputs& outputs, int64_t n, int64_t head,
              const StateBuffers<S>& buffers, const GkaStepJob<S>& job) {
  const int64_t K = problem.K, V = problem.V;
  if (job.state.h == buffers.h) store_state(buffers.h, outputs.h_final, n, head, K, K);
  if (job.state.u == buffers.u) store_state(buffers.u, outputs.u_final, n, head, K, V);
}

}  // namespace kalmanet::cpu
