// The backward's first kernel on matrix units: x, z and what follows from them alone, of one head
// of one piece, in chunks of 64 tokens (chunk_kernel.hpp; the token kernel's twin is
// backward_solve_body.hpp, which also does what is left over). K = V = 128, bfloat16 tensors.
//
// z is solved for as x is, by the same iteration with alpha_t dm_t in q_t's place. What waits for
// its turn (dm, then x) waits in the workspace, where each thread reads what it wrote itself.
#pragma once

#include "cuda/backward_chunk_products.hpp"
#include "cuda/backward_first_body.hpp"

namespace kalmanet::cuda {

struct BackwardChunkShared : ChunkShared {
  Left value_rows[ChunkLayout::kKeys];  // V: tokens x dims
};

template <class Group>
struct BackwardChunkBody : BackwardProducts<Group> {
  using Base = BackwardProducts<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n, Base::backward;
  using L = ChunkLayout;
  using Registers = ChunkRegisters;
  using typename Base::Tiles;

  Left* value_rows;
  double before[2] = {1.0, 1.0};  // decays from the piece's start to the chunk's, of H and of U

  // do_t as right factor, by way of main's memory.
  KALMANET_KERNEL void load_output_gradients() {
    Left* const rows = shared.main[0];
    group.barrier();
    this->load_tiles(backward.d_o, head, rows, rows + L::kKeys);
    group.barrier();
    group.each([&](int thread, Registers&) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        const int k = thread / 32;
        const Left left = rows[(tile / 2 * 8 + k) * 32 + thread % 32];
        const int at = (k * 8 + tile) * 32 + thread % 32;
        shared.right[0][at] = {{left.part[tile % 2], left.part[tile % 2 + 2]}};
        shared.right[1][at] = {{0, 0}};
      }
    });
  }

  // dm_t = scale (e^{G_t} (U_0 do_t + sum_{j<=t} u_j k_j (v_j . do_t))) into z's place, G and u
  // those of U.
  KALMANET_KERNEL void gradient_of_mix() {
    load_output_gradients();
    this->load_main_transposed(states + L::kDim * L::kDim);
    this->apply(true, value_rows, shared.columns, shared.value_weight);
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        r.y[m][tile][i] *=
            static_cast<float>(job.scale) * shared.value_start[chunk_column(thread, tile, i)];
      }
    });
    this->store_rows(backward.z, [](Registers& r) -> Tiles { return r.y; });
  }

  // z into registers.x: the iteration from its start with alpha_t dm_t.
  KALMANET_KERNEL void solve_adjoint(int steps, int split) {
    this->load_rows(backward.z, [](Registers& r) -> Tiles { return r.r; });
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        r.r[m][tile][i] *= shared.alpha[chunk_column(thread, tile, i)];
      }
    });
    group.barrier();  // the first iteration's ends read gain and momentum
    group.each([&](int thread, Registers& r) {
      if (thread >= L::kTokens) return;
      r.w = 2.0f;
      shared.gain[0][thread] = r.step;
      shared.momentum[0][thread] = 0.0f;
    });
    group.barrier();
    this->iterate(steps, split);
  }

  // With z in registers.x: dq, dalpha, d_ridge, and what the gradients' kernel is told.
  KALMANET_KERNEL void finish() {
    this->load_queries();  // into r
    this->load_rows(backward.z, [](Registers& r) -> Tiles { return r.y; });
    this->load_rows(backward.x, [](Registers& r) -> Tiles { return r.d; });
    this->store_rows(backward.z, [](Registers& r) -> Tiles { return r.x; });
    this->dot_columns(0, [](Registers& r, int, int m, int tile, int i) {
      return r.x[m][tile][i] * r.d[m][tile][i];
    });
    this->dot_columns(1, [](Registers& r, int, int m, int tile, int i) {
      return r.y[m][tile][i] * (r.d[m][tile][i] - r.r[m][tile][i]);
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      r.sum = 0.0;
      if (thread >= n) return;
      const double z_x = this->dot(0, thread), a = shared.ridge[thread];
      const double lambda = shared.lambda[thread];
      const int64_t at = this->place(thread);
      r.sum = z_x;
      store_scalar<float>(backward.dalpha, piece.row, t0 + thread, head, this->dot(1, thread));
      store_scalar<float>(backward.d_ridge, piece.row, t0 + thread, head, -z_x * lambda / a);
      backward.w[at] = lambda != 0.0 && backward.bp_lambda ? z_x * a * a / lambda : 0.0;
      backward.since[2 * at] = before[0] * exp(shared.since[thread]);
      backward.since[2 * at + 1] = before[1] * static_cast<double>(shared.value_start[thread]);
    });
    group.barrier();
    this->dot_columns(0, [](Registers& r, int, int m, int tile, int i) {
      return r.x[m][tile][i] * r.x[m][tile][i];
    });
    this->dot_columns(1, [](Registers& r, int, int m, int tile, int i) {
      return r.d[m][tile][i] * r.d[m][tile][i];
    });
    group.barrier();
    check_amplification();
    if (backward.dq.data == nullptr) return;
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float alpha = shared.alpha[chunk_column(thread, tile, i)];
        r.y[m][tile][i] = (1.0f - alpha) * r.y[m][tile][i] + r.x[m][tile][i];
      }
    });
    if (backward.dq_parts != nullptr) {
      this->store_rows(backward.dq_parts, [](Registers& r) -> Tiles { return r.y; });
    } else {
      this->store_tiles(backward.dq, head);
    }
  }

  // The gradients read x and z along the keys alone: how much longer than that they are is what
  // their rounding errors are magnified by. |z| |x| beside z . x tells, for where x is long z lies
  // among the keys; vectors of all directions come to sqrt(K) of it.
  KALMANET_KERNEL void check_amplification() {
    group.each([&](int thread, Registers& r) {
      if (thread >= L::kTokens) return;
      const bool exact = piece.first && job.h0.data == nullptr &&
                         t0 + thread < piece.begin + BackwardFirstLayout::kTokens;
      const bool counts = thread < n && !exact;
      shared.norm2[thread] = counts ? this->dot(0, thread) * this->dot(1, thread) : 0.0;
      shared.gate[0][thread] = counts ? r.sum * r.sum : 0.0;
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread != 0) return;
      double sizes = 0.0, products = 0.0;
      for (int t = 0; t < L::kTokens; ++t) {
        sizes += shared.norm2[t];
        products += shared.gate[0][t];
      }
      constexpr double kLimit = kLargestChunkAmplification * kLargestChunkAmplification;
      if (!(sizes <= kLimit * key_dims<Group>(job) * products)) shared.ill = 1;
    });
    group.barrier();
  }

  // Returns whether the token kernel must do the piece instead.
  KALMANET_KERNEL bool run() {
    this->load_state(false);
    this->load_state(true);
    group.each([&](int thread, Registers&) {
      if (thread == 0) shared.ill = 0;
    });
    for (t0 = piece.begin; t0 < piece.end; t0 += L::kTokens) {
      n = static_cast<int>(piece.end - t0 < L::kTokens ? piece.end - t0 : L::kTokens);
      group.barrier();
      this->load_tiles(job.k, head / job.k_group, shared.rows, shared.columns);
      this->load_tiles(job.v, head / job.v_group, value_rows, shared.values);
      this->load_scalars();
      if (!(shared.total64[0] >= -kMostDecay && shared.total64[1] >= -kMostDecay)) return true;
      gradient_of_mix();
      const double norm2 = this->load_main(false);
      this->norms(norm2);
      const double ridge = shared.smallest_ridge;
      // (direct: as exact as it promises.)
      const bool counted = job.num_iter == 0 || job.direct;
      const int steps = counted ? counted_steps(ridge, job.tolerance) : job.num_iter;
      // (Every product: d_ridge reads z . x, where what is left of plain ones is not averaged
      // away.)
      const int split = job.split ? steps : 0;
      this->solve(steps, split);
      this->store_rows(backward.x, [](Registers& r) -> Tiles { return r.x; });
      solve_adjoint(steps, split);
      finish();
      if (shared.ill != 0) return true;
      if (t0 + L::kTokens >= piece.end) return false;
      this->advance(false);
      this->advance(true);
      before[0] *= exp(shared.total64[0]);
      before[1] *= exp(shared.total64[1]);
    }
    return false;
  }
};

// The work of block (piece_index, head). After the direct solver's kernel: of what that left over,
// which happens where its chunks are cut short.
template <class Group>
KALMANET_KERNEL void run_backward_chunks(Group& group, BackwardChunkShared& shared,
                                         const BackwardJob& backward, int64_t piece_index,
                                         int64_t head) {
  if (is_short(backward.in, piece_index, head)) return;
  const GkaJob& job = backward.in;
  const int64_t block = piece_index * job.H + head;
  if (job.direct && job.left_over[block] == 0) return;
  float* const states = static_cast<float*>(job.chunk_scratch) + block * (2 * 128 * 128);
  BackwardChunkBody<Group> body{
      {{{{group, shared}, job, piece_of(job, piece_index), head, states}}, backward},
      shared.value_rows};
  const bool left_over = body.run();
  group.each([&](int thread, ChunkRegisters&) {
    if (thread != 0) return;
    job.left_over[block] = left_over ? kLeftOver : 0;
    if (job.direct) *solved_again(job, piece_index, head) = 1;
  });
}

}  // namespace kalmanet::cuda
