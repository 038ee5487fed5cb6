// The body of the chunk kernel: a piece's outputs.
#pragma once

#include "cuda/chunk_state.hpp"
#include "cuda/segment_body.hpp"
#include "cuda/token_solve.hpp"

namespace kalmanet::cuda {

// Split products err by 2^-17 or so, which the amplification multiplies: up to this, by less than a
// quarter of what rounding o to bfloat16 does.
inline constexpr double kLargestChunkAmplification = 100.0;
// A sequence's first tokens, whose amplification is larger without a state before them, are always
// the token kernel's.
inline constexpr int64_t kExactTokens = 16;

// Steps of the iteration with split products: until the rest of the way is 2^-4 of x, of which an
// error of 2^-9 a product is 2^-13. 0 where none are asked for.
KALMANET_KERNEL int split_steps(double ridge) {
  const double root = sqrt((1.0 + ridge) / ridge);
  const double steps = ceil(log(0x1p-4) / log((root - 1.0) / (root + 1.0)));
  return steps < (1 << 20) ? static_cast<int>(steps) : 1 << 20;
}

template <class Group>
struct ChunkBody : ChunkState<Group> {
  using Base = ChunkState<Group>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::states, Base::t0,
      Base::n;
  using L = ChunkLayout;
  using Registers = ChunkRegisters;

  // shared.dots[which][row group][token] <- sums over a thread's rows, then its warp's.
  template <class F>
  KALMANET_KERNEL void dot_columns(int which, F&& term) {
    KALMANET_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int c = 0; c < 2; ++c) {
          r.dot[c] = 0;
          KALMANET_UNROLL
          for (int m = 0; m < 2; ++m) {
            r.dot[c] += term(r, thread, m, tile, c) + term(r, thread, m, tile, c + 2);
          }
        }
      });
      group.sum_rows([](Registers& r) -> float& { return r.dot[0]; });
      group.sum_rows([](Registers& r) -> float& { return r.dot[1]; });
      group.each([&](int thread, Registers& r) {
        if (thread % 32 >= 4) return;
        float* const to = shared.dots[which][thread / 32 % 4];
        to[chunk_column(thread, tile, 0)] = r.dot[0];
        to[chunk_column(thread, tile, 1)] = r.dot[1];
      });
    }
  }
  KALMANET_KERNEL double dot(int which, int token) const {
    const auto& d = shared.dots[which];
    return static_cast<double>(d[0][token]) + d[1][token] + d[2][token] + d[3][token];
  }

  // |H_t|, and with it lambda_t and the iteration's constants, from
  //   |H_t|^2 = e^{2 gk_t} |H_{t-1}|^2 + 2 k_t^T H_t k_t - |k_t|^4 .
  KALMANET_KERNEL void norms(double start_norm2) {
    group.each([&](int thread, Registers&) {  // K as the right factor
      KALMANET_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int k = thread / 32, tile = i;  // dims, tokens
        const Left rows = shared.rows[(tile / 2 * 8 + k) * 32 + thread % 32];
        const int at = (k * 8 + tile) * 32 + thread % 32;
        shared.right[0][at] = {{rows.part[tile % 2], rows.part[tile % 2 + 2]}};
        shared.right[1][at] = {{0, 0}};
      }
    });
    group.barrier();
    this->apply(true, shared.columns, shared.weight);
    dot_columns(0, [&](Registers& r, int thread, int m, int tile, int i) {
      float k[4];
      Base::unpack(shared.columns, thread, m, tile, k);
      return k[i] * r.y[m][tile][i];
    });
    dot_columns(1, [&](Registers&, int thread, int m, int tile, int i) {
      float k[4];
      Base::unpack(shared.columns, thread, m, tile, k);
      return k[i] * k[i];
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread >= L::kTokens) return;
      const double beta2 = shared.beta2[thread], k2 = beta2 * dot(1, thread);
      const double added = 2.0 * beta2 * shared.start[thread] * dot(0, thread) - k2 * k2;
      shared.norm2[thread] = added * exp(-2.0 * shared.since[thread]);
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      if (thread >= L::kTokens) return;
      double f = start_norm2;  // times e^{-2 G_t}: every token its own sum, none waits for another
      for (int j = 0; j < L::kTokens; ++j) f += j <= thread ? shared.norm2[j] : 0.0;
      f = thread < n ? exp(shared.since[thread]) * sqrt(f) : 0.0;
      if (f <= kVanishedNorm) f = 0.0;
      const double a = shared.ridge[thread];
      const double rho = 0.5 / (2.0 * a + 1.0);
      r.w = 2.0f;
      r.rho2 = static_cast<float>(rho * rho);
      r.step = f == 0.0 ? 0.0f : static_cast<float>(2.0 / (2.0 * a * f + f));
      shared.lambda[thread] = f == 0.0 ? 0.0f : static_cast<float>(a * f);
      shared.gain[0][thread] = r.step;
      shared.momentum[0][thread] = 0.0f;
    });
    group.barrier();
  }

  // x of the chunk's systems into registers.x. right and middle are free before and after.
  KALMANET_KERNEL void solve(int steps, int split) {
    load_queries();
    iterate(steps, split);
  }

  // The same for the right-hand sides in registers.r. Begins after a barrier.
  KALMANET_KERNEL void iterate(int steps, int split) {
    this->each_tile([&](Registers& r, int, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.x[m][tile][i] = r.d[m][tile][i] = 0;
    });
    for (int k = 0;; ++k) {
      this->each_tile([&](Registers& r, int thread, int m, int tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = chunk_column(thread, tile, i);
          float& d = r.d[m][tile][i];
          d = shared.momentum[k % 2][t] * d + shared.gain[k % 2][t] * r.r[m][tile][i];
          r.x[m][tile][i] += d;
        }
      });
      if (k == steps) break;
      // (put_right's barrier also ends the reads of the other half of gain and momentum.)
      this->put_right(k < split, [](Registers& r) -> float (&)[2][4][4] { return r.d; });
      group.each([&](int thread, Registers& r) {
        if (thread >= L::kTokens) return;
        r.w = divide(1.0f, 1.0f - r.rho2 * r.w);
        shared.gain[1 - k % 2][thread] = r.step * r.w;
        shared.momentum[1 - k % 2][thread] = r.w - 1.0f;
      });
      if (k < split) {
        this->apply(true, shared.columns, shared.weight);
      } else {
        this->apply(false, shared.columns, shared.weight);
      }
      this->each_tile([&](Registers& r, int thread, int m, int tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = chunk_column(thread, tile, i);
          r.r[m][tile][i] -= shared.start[t] * r.y[m][tile][i] + shared.lambda[t] * r.d[m][tile][i];
        }
      });
    }
  }

  // The queries into registers.r, by way of right's memory.
  KALMANET_KERNEL void load_queries() {
    Left* const q = reinterpret_cast<Left*>(shared.right[0]);
    group.barrier();
    this->load_tiles(job.q, head / job.q_group, nullptr, q);
    group.barrier();
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      Base::unpack(q, thread, m, tile, r.r[m][tile]);
    });
    group.barrier();
  }

  // o of the chunk from registers.x.
  KALMANET_KERNEL void read_out() {
    load_queries();
    dot_columns(0, [&](Registers& r, int, int m, int tile, int i) {
      return r.x[m][tile][i] * r.x[m][tile][i];
    });
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float q = r.r[m][tile][i];
        const float alpha = shared.alpha[chunk_column(thread, tile, i)];
        r.d[m][tile][i] = q + alpha * (r.x[m][tile][i] - q);
      }
    });
    this->put_right(true, [](Registers& r) -> float (&)[2][4][4] { return r.d; });
    const double u2 = this->load_main(true);
    this->apply(true, shared.values, shared.value_weight);
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        r.y[m][tile][i] *=
            static_cast<float>(job.scale) * shared.value_start[chunk_column(thread, tile, i)];
      }
    });
    dot_columns(1, [&](Registers& r, int, int m, int tile, int i) {
      return r.y[m][tile][i] * r.y[m][tile][i];
    });
    store_tiles(job.o, head);
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread >= n) return;
      // |U_t| is at most |U_0| and what the chunk's values add; the former says enough where it is
      // not small, and where it is these are a sequence's first tokens.
      const double weight = shared.alpha[thread] * job.scale;
      const double x2 = weight * weight * dot(0, thread) * u2 / key_dims<Group>(job);
      const double limit = kLargestChunkAmplification * kLargestChunkAmplification;
      const bool exact = piece.first && t0 + thread < piece.begin + kExactTokens;
      if (!exact && x2 > limit * dot(1, thread)) shared.ill = 1;
    });
    group.barrier();
  }

  // registers.y into a bfloat16 tensor's rows.
  KALMANET_KERNEL void store_tiles(const Array& a, int64_t a_head) {
    uint16_t* const base = static_cast<uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head);
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        group.each([&](int, Registers& r) {
          r.t[0] = pack_bfloat16(r.y[m][tile][0], r.y[m][tile][1]);
          r.t[1] = pack_bfloat16(r.y[m][tile][2], r.y[m][tile][3]);
        });
        group.transpose([](Registers& r) -> uint32_t& { return r.t[0]; });
        group.transpose([](Registers& r) -> uint32_t& { return r.t[1]; });
        group.each([&](int thread, Registers& r) {
          const int token = thread / 128 * 32 + tile * 8 + thread % 32 / 4;
          const int dim = thread / 32 % 4 * 32 + m * 16 + thread % 4 * 2;
          if (token >= n) return;
          uint16_t* const to = base + token * a.stride[1] + dim;
          if (has_column<Group>(a, dim)) memcpy(to, &r.t[0], 4);
          if (has_column<Group>(a, dim + 8)) memcpy(to + 8, &r.t[1], 4);
        });
      }
    }
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
      this->load_tiles(job.v, head / job.v_group, nullptr, shared.values);
      this->load_scalars();
      if (!(shared.total64[0] >= -kMostDecay && shared.total64[1] >= -kMostDecay)) return true;
      const double norm2 = this->load_main(false);
      norms(norm2);
      const double ridge = shared.smallest_ridge;
      const int steps = job.num_iter != 0 ? job.num_iter : counted_steps(ridge, job.tolerance);
      solve(steps, job.split ? split_steps(ridge) : 0);
      read_out();
      if (shared.ill != 0) return true;
      if (t0 + L::kTokens >= piece.end && !piece.last) return false;
      this->advance(false);
      this->advance(true);
    }
    this->store_state(false, state_view<float>(job.h_final, piece.sequence, head));
    this->store_state(true, state_view<float>(job.u_final, piece.sequence, head));
    return false;
  }
};

// The work of block (piece_index, head). `scratch`: ChunkState::kStateFloats of the block's own.
template <class Group>
KALMANET_KERNEL void run_chunks(Group& group, ChunkShared& shared, const GkaJob& job,
                                int64_t piece_index, int64_t head) {
  if (is_short(job, piece_index, head)) return;
  const Piece piece = piece_of(job, piece_index);
  const int64_t block = piece_index * job.H + head;
  float* const states = static_cast<float*>(job.chunk_scratch) + block * (2 * 128 * 128);
  ChunkBody<Group> body{{{group, shared}, job, piece, head, states}};
  const bool left_over = body.run();
  group.each([&](int thread, ChunkRegisters&) {
    if (thread == 0) job.left_over[block] = left_over ? kLeftOver : 0;
  });
}

}  // namespace kalmanet::cuda
