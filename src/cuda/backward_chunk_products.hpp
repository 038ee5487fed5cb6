// Products that the backward's matrix-unit kernels are made of, beside the forward's
// (chunk_kernel.hpp): vectors of the workspace as fragments, pairs of tokens, sums over tokens, and
// updates of a state. K = V = 128.
//
// Left fragments of a matrix of tokens x dims ("rows") are right fragments of its transpose; those
// of dims x tokens ("columns") likewise. What is not exact comes in two parts, high and low.
#pragma once

#include "cuda/backward_job.hpp"
#include "cuda/backward_segment_body.hpp"
#include "cuda/chunk_body.hpp"

namespace kalmanet::cuda {

// A matrix's high and low parts.
struct Split {
  Left* high;
  Left* low;  // null: exact
};

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

  // A thread's elements of a matrix of the workspace, [place][128], in the layout of y.
  template <class Of>
  KALMANET_KERNEL void store_rows(void* rows, Of&& of) {
    float* const to = static_cast<float*>(rows) + place(0) * L::kDim;
    const int64_t stride = job.H * L::kDim;
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = chunk_column(thread, tile, i);
        if (token < n) to[token * stride + chunk_row(thread, m, i)] = of(r)[m][tile][i];
      }
    });
  }
  template <class Of>
  KALMANET_KERNEL void load_rows(const void* rows, Of&& of) {
    const float* const from = static_cast<const float*>(rows) + place(0) * L::kDim;
    const int64_t stride = job.H * L::kDim;
    this->each_tile([&](Registers& r, int thread, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = chunk_column(thread, tile, i);
        of(r)[m][tile][i] = token < n ? from[token * stride + chunk_row(thread, m, i)] : 0.0f;
      }
    });
  }

  // x or z of the chunk (or, `mixed`, m = q + alpha (x - q)) as fragments by rows and by columns,
  // each where it is not null. Takes registers.y, where everything is under way before the first is
  // used: warp w has tokens 16 (w / 2) .. and dims 64 (w % 2) .. . No barrier.
  KALMANET_KERNEL void load_solutions(const void* solutions, bool mixed, Split rows,
                                      Split columns) {
    const float* const from = static_cast<const float*>(solutions) + place(0) * L::kDim;
    const uint16_t* const q = static_cast<const uint16_t*>(job.q.data) +
                              offset_of(job.q, piece.row, t0, head / job.q_group);
    const int64_t stride = job.H * L::kDim;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int token = thread / 64 * 16 + thread % 32 / 4 + half * 8;
        const int first = thread / 32 % 2 * 64 + thread % 4 * 2;
        const bool real = token < n;
        const float alpha = shared.alpha[token];
        KALMANET_UNROLL
        for (int tile = 0; tile < 4; ++tile) {
          KALMANET_UNROLL
          for (int right = 0; right < 2; ++right) {
            const int dim = first + tile * 16 + right * 8;
            float (&v)[4] = r.y[tile / 2][tile % 2 * 2 + right];
            v[2 * half] = v[2 * half + 1] = 0.0f;
            if (real) memcpy(&v[2 * half], from + token * stride + dim, 8);
            if (real && mixed) {
              uint32_t both;
              memcpy(&both, q + token * job.q.stride[1] + dim, 4);
              const float a = low_bfloat16(both), b = high_bfloat16(both);
              v[2 * half] = a + alpha * (v[2 * half] - a);
              v[2 * half + 1] = b + alpha * (v[2 * half + 1] - b);
            }
          }
        }
      }
    });
    KALMANET_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int low = i % 2, tile = i / 2;
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int part = 0; part < 4; ++part) {
          const float (&v)[4] = r.y[tile / 2][tile % 2 * 2 + part / 2];
          const float a = v[part % 2 * 2], b = v[part % 2 * 2 + 1];
          const uint32_t high = pack_bfloat16(a, b);
          r.t[part] = low == 1 ? low_parts(a, b, high) : high;
        }
        Left* const to = low == 1 ? rows.low : rows.high;
        if (to != nullptr) {
          to[(thread / 32 * 4 + tile) * 32 + thread % 32] = {{r.t[0], r.t[1], r.t[2], r.t[3]}};
        }
      });
      if (columns.high == nullptr) continue;
      transpose_four();
      group.each([&](int thread, Registers& r) {
        const int at = (thread / 32 % 2 * 4 + tile) * 4 + thread / 64;
        (low == 1 ? columns.low
                  : columns.high)[at * 32 + thread % 32] = {{r.t[0], r.t[2], r.t[1], r.t[3]}};
      });
    }
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

  // b <- right fragments of rows, k-step k, of the warp's four token tiles.
  KALMANET_KERNEL void load_right(Split rows, int k) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        const int at = ((thread / 128 * 2 + tile / 2) * 8 + k) * 32 + thread % 32;
        const Left high = rows.high[at];
        r.b[0][tile][0] = high.part[tile % 2], r.b[0][tile][1] = high.part[tile % 2 + 2];
        if (rows.low == nullptr) continue;
        const Left low = rows.low[at];
        r.b[1][tile][0] = low.part[tile % 2], r.b[1][tile][1] = low.part[tile % 2 + 2];
      }
    });
  }

  // sums += a b for the loaded fragments; which low parts there are.
  template <class Of>
  KALMANET_KERNEL void add_products(Of&& of, bool low_left, bool low_right) {
    KALMANET_UNROLL
    for (int m = 0; m < 2; ++m) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        const auto sum = [of, m, tile](Registers& r) -> float (&)[4] { return of(r)[m][tile]; };
        const auto a = [m](Registers& r) -> uint32_t (&)[4] { return r.a[0][m]; };
        const auto b = [tile](Registers& r) -> uint32_t (&)[2] { return r.b[0][tile]; };
        if (low_left) {
          group.multiply_add(sum, [m](Registers& r) -> uint32_t (&)[4] { return r.a[1][m]; }, b);
        }
        if (low_right) {
          group.multiply_add(sum, a,
                             [tile](Registers& r) -> uint32_t (&)[2] { return r.b[1][tile]; });
        }
        group.multiply_add(sum, a, b);
      }
    }
  }

  // y <- main rows^T.
  KALMANET_KERNEL void multiply_main(Split rows) {
    this->each_tile([](Registers& r, int, int m, int tile) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.y[m][tile][i] = 0;
    });
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      load_right(rows, k);
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int m = 0; m < 2; ++m) {
          const int at = ((thread / 32 % 4 * 2 + m) * 8 + k) * 32 + thread % 32;
          const Left high = shared.main[0][at], low = shared.main[1][at];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.a[0][m][i] = high.part[i], r.a[1][m][i] = low.part[i];
        }
      });
      add_products([](Registers& r) -> Tiles { return r.y; }, true, rows.low != nullptr);
    }
  }

  // Token t (row) and token i (column) of element e of tile n of s.
  KALMANET_KERNEL static int pair_row(int thread, int e) {
    return thread / 32 % 4 * 16 + thread % 32 / 4 + e / 2 * 8;
  }

  // s <- left rows^T, tokens x tokens; left is exact.
  KALMANET_KERNEL void multiply_pairs(const Left* left, Split rows) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) r.s[tile][e] = 0;
      }
    });
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      load_right(rows, k);
      group.each([&](int thread, Registers& r) {
        const Left a = left[(thread / 32 % 4 * 8 + k) * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.a[0][0][i] = a.part[i];
      });
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        const auto s = [tile](Registers& r) -> float (&)[4] { return r.s[tile]; };
        const auto a = [](Registers& r) -> uint32_t (&)[4] { return r.a[0][0]; };
        if (rows.low != nullptr) {
          group.multiply_add(s, a,
                             [tile](Registers& r) -> uint32_t (&)[2] { return r.b[1][tile]; });
        }
        group.multiply_add(s, a, [tile](Registers& r) -> uint32_t (&)[2] { return r.b[0][tile]; });
      }
    }
  }

  // f(registers, tile, e, t, i) for the elements of s.
  template <class F>
  KALMANET_KERNEL void each_pair(F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) {
          f(r, tile, e, pair_row(thread, e), chunk_column(thread, tile, e));
        }
      }
    });
  }

  // shared.middle <- weights of what token i adds to token t: of(registers, tile, e, t, i). Begins
  // and ends with a barrier.
  template <class Of>
  KALMANET_KERNEL void put_weights(Of&& of) {
    group.barrier();
    each_pair(
        [&](Registers& r, int tile, int e, int t, int i) { r.s[tile][e] = of(r, tile, e, t, i); });
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int p = 0; p < 2; ++p) {
        KALMANET_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float (&a)[4] = r.s[2 * p], (&b)[4] = r.s[2 * p + 1];
          const int at = ((thread / 128 * 2 + p) * 8 + thread / 32 % 4 * 2 + half) * 32;
          const uint32_t a_high = pack_bfloat16(a[2 * half], a[2 * half + 1]);
          const uint32_t b_high = pack_bfloat16(b[2 * half], b[2 * half + 1]);
          shared.middle[0][at + thread % 32] = {{a_high, b_high}};
          shared.middle[1][at + thread % 32] = {{low_parts(a[2 * half], a[2 * half + 1], a_high),
                                                 low_parts(b[2 * half], b[2 * half + 1], b_high)}};
        }
      }
    });
    group.barrier();
  }

  // sums += columns middle.
  template <class Of>
  KALMANET_KERNEL void add_columns(Split columns, Of&& of) {
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 4; ++tile) {
          const int at = (k * 8 + thread / 128 * 4 + tile) * 32 + thread % 32;
          const Right high = shared.middle[0][at], low = shared.middle[1][at];
          r.b[0][tile][0] = high.part[0], r.b[0][tile][1] = high.part[1];
          r.b[1][tile][0] = low.part[0], r.b[1][tile][1] = low.part[1];
        }
        KALMANET_UNROLL
        for (int m = 0; m < 2; ++m) {
          const int at = ((thread / 32 % 4 * 2 + m) * 4 + k) * 32 + thread % 32;
          const Left high = columns.high[at];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.a[0][m][i] = high.part[i];
          if (columns.low == nullptr) continue;
          const Left low = columns.low[at];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.a[1][m][i] = low.part[i];
        }
      });
      add_products(of, columns.low != nullptr, true);
    }
  }

  // of(registers)[tile / 4][tile % 4] += left diag(weight) right^T for the warp's 16 rows and the
  // columns of `half`, tiles of 8.
  template <class Weight, class Of>
  KALMANET_KERNEL void add_update(int half, Split left, const Weight* weight, Split right,
                                  Of&& of) {
    KALMANET_UNROLL
    for (int k = 0; k < 4; ++k) {
      group.each([&](int thread, Registers& r) {
        const int at = (thread / 32 * 4 + k) * 32 + thread % 32;
        const Left high = left.high[at];
        Left low = {{0, 0, 0, 0}};
        if (left.low != nullptr) low = left.low[at];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int j = k * 16 + thread % 4 * 2 + i / 2 * 8;
          const float a = static_cast<float>(
              static_cast<Weight>(low_bfloat16(high.part[i]) + low_bfloat16(low.part[i])) *
              weight[j]);
          const float b = static_cast<float>(
              static_cast<Weight>(high_bfloat16(high.part[i]) + high_bfloat16(low.part[i])) *
              weight[j + 1]);
          r.a[0][0][i] = pack_bfloat16(a, b);
          r.a[1][0][i] = low_parts(a, b, r.a[0][0][i]);
        }
      });
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        group.each([&](int thread, Registers& r) {
          const int at = ((half * 4 + tile / 2) * 4 + k) * 32 + thread % 32;
          const Left high = right.high[at];
          r.b[0][0][0] = high.part[tile % 2], r.b[0][0][1] = high.part[tile % 2 + 2];
          if (right.low == nullptr) return;
          const Left low = right.low[at];
          r.b[1][0][0] = low.part[tile % 2], r.b[1][0][1] = low.part[tile % 2 + 2];
        });
        const auto y = [of, tile](Registers& r) -> float (&)[4] {
          return of(r)[tile / 4][tile % 4];
        };
        const auto a = [](Registers& r) -> uint32_t (&)[4] { return r.a[0][0]; };
        const auto b = [](Registers& r) -> uint32_t (&)[2] { return r.b[0][0]; };
        group.multiply_add(y, [](Registers& r) -> uint32_t (&)[4] { return r.a[1][0]; }, b);
        if (right.low != nullptr) {
          group.multiply_add(y, a, [](Registers& r) -> uint32_t (&)[2] { return r.b[1][0]; });
        }
        group.multiply_add(y, a, b);
      }
    }
  }

  template <class Weight>
  KALMANET_KERNEL void add_update(int half, Split left, const Weight* weight, Split right) {
    add_update(half, left, weight, right, [](Registers& r) -> Tiles { return r.y; });
  }

  // f(registers, thread, half tile, place in a state) for a half of the warp's rows of it.
  template <class F>
  KALMANET_KERNEL void each_half_tile(int half, F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 8; ++tile) {
        f(r, thread, r.y[tile / 4][tile % 4], Base::state_at(thread, half * 8 + tile));
      }
    });
  }
};

}  // namespace kalmanet::cuda
