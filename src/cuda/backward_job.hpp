// What the backward's kernels are told beside the forward's job.
#pragma once

#include "cuda/job.hpp"

namespace kalmanet::cuda {

// A piece's tokens on matrix units. Half of what the other kernels take: of fewer heads at a time,
// whose workspace is as much smaller, there are blocks for all multiprocessors.
inline constexpr int64_t kBackwardTokens = 256;

// Every token and head has a place in the workspace, (row * T + t) * H + head.
struct BackwardJob {
  GkaJob in;
  Array d_o, d_h_final, d_u_final;
  Array dq, dk, dv, dg, dgk, dalpha, dbeta, d_ridge, d_h0, d_u0;
  bool bp_lambda = true;
  // [place][K], in the states' dtype: x_t, and z_t of the adjoint system.
  void* x = nullptr;
  void* z = nullptr;
  // [place]: w_t = (z_t . x_t) a_t / f_t, 0 where f_t is a constant to the gradient.
  double* w = nullptr;
  // [place][2]: e^{G_t} of H and of U, counted from the start of the token's piece.
  double* since = nullptr;
  // As GkaJob::states: the gradients of the states after each piece, D and E.
  void* adjoints = nullptr;
  // [place][K or V]: a head's own part of a gradient that several heads share. Null: it is not
  // shared, or not asked for.
  void *dq_parts = nullptr, *dk_parts = nullptr, *dv_parts = nullptr;
  // Of the gradients' kernel, bytes a block.
  void* block_scratch = nullptr;
  int64_t block_bytes = 0;
};

KALMANET_KERNEL int64_t place_of(const BackwardJob& job, const Piece& piece, int64_t t,
                                 int64_t head) {
  return (piece.row * job.in.T + t) * job.in.H + head;
}

// Element `c` of a head's row of a gradient, or of its part of it.
template <class S>
KALMANET_KERNEL void store_gradient(const BackwardJob& job, const Array& gradient, void* parts,
                                    int64_t width, const Piece& piece, int64_t t, int64_t head,
                                    int64_t c, S value) {
  if (parts != nullptr) {
    static_cast<S*>(parts)[place_of(job, piece, t, head) * width + c] = value;
  } else if (gradient.data != nullptr) {
    store_element(gradient, offset_of(gradient, piece.row, t, head) + c * gradient.stride[3],
                  value);
  }
}

// A per-token gradient, where it is asked for.
template <class S>
KALMANET_KERNEL void store_scalar(const Array& gradient, int64_t row, int64_t t, int64_t head,
                                  double value) {
  if (gradient.data == nullptr) return;
  store_element(gradient, offset_of(gradient, row, t, head), static_cast<S>(value));
}

}  // namespace kalmanet::cuda
