// A state as a block sees it.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/job.hpp"

namespace kalmanet::cuda {

// Element (r, c) of one sequence and head.
template <class S>
struct StateView {
  S* data = nullptr;  // null: zeros
  int64_t row = 0, column = 0;
  KALMANET_KERNEL int64_t at(int64_t r, int64_t c) const { return r * row + c * column; }
  KALMANET_KERNEL bool whole_pieces() const {  // of four, aligned
    return column == 1 && row % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 32 == 0;
  }
};

template <class S>
KALMANET_KERNEL StateView<S> state_view(const Array& a, int64_t sequence, int64_t head) {
  if (a.data == nullptr) return {};
  return {static_cast<S*>(a.data) + sequence * a.stride[0] + head * a.stride[1], a.stride[2],
          a.stride[3]};
}

// The workspace's states before a piece: H (u = false) or U.
template <class S>
KALMANET_KERNEL StateView<S> slot_view(const GkaJob& job, int64_t slot, int64_t head, bool u) {
  S* const base = static_cast<S*>(job.states) + (slot * job.H + head) * job.K * (job.K + job.V);
  return u ? StateView<S>{base + job.K * job.K, job.V, 1} : StateView<S>{base, job.K, 1};
}

// What a sequence without states answers: zeros, and NaN where its slot is none of the pool's. By a
// block of at least 128 threads.
template <class Group>
KALMANET_KERNEL void answer_nothing(Group& group, const GkaJob& job, const Piece& piece,
                                    int64_t head, int64_t slot) {
  const float answer = slot < 0 ? 0.0f : NAN;
  const auto fill = [&](const Array& a, int64_t t, int64_t width, int c) {
    if (a.data == nullptr || c >= width) return;
    const int64_t at = offset_of(a, piece.row, t, head) + c * a.stride[3];
    if (a.dtype == DType::float64) {
      store_element<double>(a, at, static_cast<double>(answer));
    } else {
      store_element<float>(a, at, answer);
    }
  };
  for (int64_t t = piece.begin; t < piece.end; ++t) {
    group.each([&](int thread, auto&) {
      if (thread >= 128) return;
      for (int c = thread; c < kMaxHeadDim; c += 128) {
        fill(job.o, t, job.V, c);
        fill(job.x, t, job.K, c);
      }
      fill(job.residual, t, 1, thread);
    });
  }
}

}  // namespace kalmanet::cuda
