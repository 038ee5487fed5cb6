// What the backward's Chebyshev kernel on matrix units needs beside the forward's products
// (chunk_kernel.hpp): vectors of the workspace, and a state's transpose. K = V = 128.
#pragma once

#include "cuda/backward_job.hpp"
#include "cuda/backward_segment_body.hpp"
#include "cuda/chunk_body.hpp"

namespace kalmanet::cuda {

template <class Group>
struct BackwardProducts : ChunkBody<Group> {
  using Base = ChunkBody<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n;
  using L = ChunkLayout;
  using Registers = ChunkRegisters;
  using Tiles = float (&)[2][4][4];

  const BackwardJob& backward;

  KALMANET_KERNEL int64_t place(int token) const {
    return place_of(backward, piece, t0 + token, head);
  }
  KALMANET_KERNEL void transpose_four() {
    group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
    group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
    group.transpose([](Registers& r) -> uint32_t& { return r.t[2]; });
    group.transpose([](Registers& r) -> uint32_t& { return r.t[3]; });
  }

  // A thread's elements of a matrix of the workspace, [place][K], in the layout of y.
  template <class Of>
  KALMANET_KERNEL void store_rows(void* rows, Of&& of) {
    const int width = key_dims<Group>(job);
    float* const to = static_cast<float*>(rows) + place(0) * width;
    const int64_t stride = job.H * width;
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = chunk_column(thread, tile, i);
        const int dim = chunk_row(thread, m, i);
        if (token < n && reaches<Group>(width, dim)) to[token * stride + dim] = of(r)[m][tile][i];
      }
    });
  }
  template <class Of>
  KALMANET_KERNEL void load_rows(const void* rows, Of&& of) {
    const int width = key_dims<Group>(job);
    const float* const from = static_cast<const float*>(rows) + place(0) * width;
    const int64_t stride = job.H * width;
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = chunk_column(thread, tile, i);
        const int dim = chunk_row(thread, m, i);
        of(r)[m][tile][i] =
            token < n && reaches<Group>(width, dim) ? from[token * stride + dim] : 0.0f;
      }
    });
  }

  // A state's transpose as left factor: shared.main. Begins and ends with a barrier.
  KALMANET_KERNEL void load_main_transposed(const float* from) {
    group.barrier();
    KALMANET_UNROLL
    for (int half = 0; half < 2; ++half) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) {
          load4(from + Base::state_at(thread, half * 8 + tile), r.y[tile / 4][tile % 4]);
        }
      });
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int part = i % 2, k = i / 2;
        group.each([&](int, Registers& r) {
          KALMANET_UNROLL
          for (int e = 0; e < 4; ++e) {
            const float (&v)[4] = r.y[k / 2][k % 2 * 2 + e / 2];
            const float a = v[e % 2 * 2], b = v[e % 2 * 2 + 1];
            const uint32_t high = pack_bfloat16(a, b);
            r.t[e] = part == 0 ? high : low_parts(a, b, high);
          }
        });
        transpose_four();
        group.each([&](int thread, Registers& r) {
          shared.main[part][((half * 4 + k) * 8 + thread / 32) * 32 + thread % 32] = {
              {r.t[0], r.t[2], r.t[1], r.t[3]}};
        });
      }
    }
    group.barrier();
  }
};

}  // namespace kalmanet::cuda
