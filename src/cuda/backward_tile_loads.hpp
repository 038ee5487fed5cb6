// The backward's kernels on matrix units that read x and z: their chunks of 64 tokens in shared
// memory, tokens as rows. K = V = 128, bfloat16 tensors, or what any_rows.hpp says.
//
// Keys, values and do are the exact bfloat16 that came in (of float16 the exact sums of a high and
// a low part, which lie in tiles that a kernel does not need); x, z and m are split in high and low
// parts, and already carry the decays that every product of theirs has,
//
//   x_i e^{G_i/2} ,   z_i e^{G_i/2} ,   m_i scale e^{Gamma_i}     (G of H, Gamma of U)
//
// so that what tokens add to a state is a plain product of two tiles.
#pragma once

#include "cuda/backward_segment_body.hpp"
#include "cuda/chunk_state.hpp"
#include "cuda/tile.hpp"

namespace kalmanet::cuda {

struct TileLayout {
  static constexpr int kThreads = 256;
  static constexpr int kTokens = 64;
  static constexpr int kDim = 128;
  static constexpr int kTile = kTokens * kDim;
  static constexpr int kState = kDim * kDim;
  static constexpr int kChunks = static_cast<int>(kBackwardTokens) / kTokens;
  // States before each chunk, of H or of U, and one on its way: of a gradients' block.
  static constexpr int64_t kScratchFloats = int64_t{kChunks + 1} * kState;
};

// Products of a token's own: of the chunk's first state, k H_0 k or m U_0 do; of what comes after
// it, k S k or v E k; z H_0 x; and for beta's gradient.
enum TileDot { kTileStart, kTileCarry, kTileAdjoint, kTileBeta, kTileDots };

// A chunk's numbers, of H or of U.
struct TileScalars {
  static constexpr int C = TileLayout::kTokens;
  // Per token: e^{G_t}; e^{-G_t}; beta_t e^{G_C-G_t}; beta_t^2 e^{G_C-G_t}.
  float start[C], inverse[C], end[C], to_end[C];
  float half[C];  // e^{G_t/2} of H
  float mix[C];   // scale e^{G_t} of U
  float alpha[C], beta[C];
  float w_start[C];                    // w_t e^{G_t}
  float r_start[C];                    // e^{G_t} sum_{i>=t} w_i e^{2 (G_i - G_t)}
  float key_factor[C], key_weight[C];  // - 2 r_start_t beta_t and 2 r_start_t beta_t^2
  float total[2];                      // e^{G_C}, of H and of U
  float through_f;                     // sum_i w_i e^{2 G_i}
};

struct TileShared {
  static constexpr int C = TileLayout::kTokens;
  uint16_t state[2][TileLayout::kState];  // the state that is read: high, low
  uint16_t k[TileLayout::kTile], v[TileLayout::kTile], d_o[TileLayout::kTile];
  uint16_t x[2][TileLayout::kTile], z[2][TileLayout::kTile];
  uint16_t m[2][TileLayout::kTile];  // or keys with their weights
  TileScalars scalars[TileLayout::kChunks];
  float dots[kTileDots][2][C];  // over the two halves of the dims
  float crossing[4][C];         // what tokens before t do to later ones: each row group's part
  float warp[2][TileLayout::kThreads / 32];
};

struct TileRegisters {
  float state[2][8][4], other[2][8][4];
  float dk[8][4], dv[8][4], s[8][4], p[8][4];
  uint32_t a[2][2][4], b[2][2][2];
  uint32_t raw[4][4][4];  // k, v, do, q on their way
  float raw_x[4][8], raw_z[4][8];
  float row[2], column[2], sum[2];
  // Of the scans over a chunk's tokens, a lane two.
  float pair[2], kept[2], gate[2], beta[2], all, decay, passed, passed2;
};

template <class Group>
struct TileLoads : TileProducts<Group, TileRegisters> {
  using Base = TileProducts<Group, TileRegisters>;
  using Base::group;
  using L = TileLayout;
  using Registers = TileRegisters;

  TileShared& shared;
  const BackwardJob& backward;
  const GkaJob& job;
  Piece piece;
  int64_t head;
  int64_t t0 = 0;
  int n = 0;
  int slot = 0;  // where the chunk's numbers are
  // Chunks of fewer tokens than 64 (short_plan.hpp), which share one place for their numbers; or
  // none.
  const ShortPlan* cuts = nullptr;

  KALMANET_KERNEL TileScalars& now() const { return shared.scalars[slot]; }
  // Low parts of keys, values and do: null where the tensors are bfloat16.
  uint16_t *low_k = nullptr, *low_v = nullptr, *low_d_o = nullptr;
  static constexpr bool kLows = kAnyRows<Group>;

  // Where they are to lie, of float16; and how many dims there are. At a kernel's start.
  KALMANET_KERNEL void begin_rows(uint16_t* k, uint16_t* v, uint16_t* d_o) {
    this->dims = most_dims<Group>(job);
    if (!is_float16<Group>(job.k)) return;
    low_k = k, low_v = v, low_d_o = d_o;
  }
  KALMANET_KERNEL Parts keys() const { return {shared.k, kLows ? low_k : nullptr}; }
  KALMANET_KERNEL Parts values() const { return {shared.v, kLows ? low_v : nullptr}; }
  KALMANET_KERNEL Parts output_gradients() const { return {shared.d_o, kLows ? low_d_o : nullptr}; }
  KALMANET_KERNEL Parts x() const { return {shared.x[0], shared.x[1]}; }
  KALMANET_KERNEL Parts z() const { return {shared.z[0], shared.z[1]}; }
  KALMANET_KERNEL Parts m() const { return {shared.m[0], shared.m[1]}; }
  KALMANET_KERNEL Parts state() const { return {shared.state[0], shared.state[1]}; }

  KALMANET_KERNEL void find_cuts(int64_t piece_index) {
    if (!is_short(job, piece_index, head)) return;
    const ShortPlan* const plan = job.short_plans + piece_index * job.H + head;
    if (plan->chunks > 0) cuts = plan;
  }
  KALMANET_KERNEL int num_chunks() const {
    if (cuts != nullptr) return cuts->chunks;
    return static_cast<int>((piece.end - piece.begin + L::kTokens - 1) / L::kTokens);
  }
  KALMANET_KERNEL void set_chunk(int chunk) {
    if (cuts != nullptr) {
      t0 = piece.begin + cuts->begin[chunk];
      n = cuts->begin[chunk + 1] - cuts->begin[chunk];
      return;
    }
    slot = chunk;
    t0 = piece.begin + chunk * L::kTokens;
    n = static_cast<int>(piece.end - t0 < L::kTokens ? piece.end - t0 : L::kTokens);
  }

  // A thread brings pieces of eight elements, four of a row: 8 (thread / 32) + thread % 8 its row,
  // 8 (thread / 8 % 4 + 4 i) the columns. So neighbours read 64 bytes of a row and write a block.
  KALMANET_KERNEL static int piece_row(int thread) { return thread / 32 * 8 + thread % 8; }
  KALMANET_KERNEL static int piece_column(int thread, int i) {
    return (thread / 8 % 4 + 4 * i) * 8;
  }

  // Of a [B,T,heads,128] tensor.
  KALMANET_KERNEL void fetch(const Array& a, int64_t a_head, int which) {
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0, a_head);
    const int64_t stride = a.stride[1];
    group.each([&](int thread, Registers& r) {
      const int row = piece_row(thread);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) r.raw[which][i][j] = 0;
        const int column = piece_column(thread, i);
        if (row < n && has_column<Group>(a, column)) {
          load16(base + row * stride + column, r.raw[which][i]);
        }
      }
    });
  }
  KALMANET_KERNEL void put(int which, const Parts& tile) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = Blocks<128>::at(piece_row(thread), piece_column(thread, i));
        if (kLows && tile.low != nullptr) {
          uint32_t high[4], low[4];
          split_eight(r.raw[which][i], high, low);
          store16(tile.high + at, high);
          store16(tile.low + at, low);
        } else {
          store16(tile.high + at, r.raw[which][i]);
        }
      }
    });
  }
  // Of x or z.
  template <class Of>
  KALMANET_KERNEL void fetch_solutions(const void* rows, Of&& of) {
    const int width = key_dims<Group>(job);
    const float* const base =
        static_cast<const float*>(rows) + place_of(backward, piece, t0, head) * width;
    const int64_t stride = job.H * width;
    group.each([&](int thread, Registers& r) {
      const int row = piece_row(thread);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          float v[4] = {};
          const int column = piece_column(thread, i);
          if (row < n && reaches<Group>(width, column))
            load4(base + row * stride + column + 4 * j, v);
          KALMANET_UNROLL
          for (int e = 0; e < 4; ++e) of(r)[i][4 * j + e] = v[e];
        }
      }
    });
  }
  template <class Of>
  KALMANET_KERNEL void put_solutions(const float* weight, const Parts& to, Of&& of) {
    group.each([&](int thread, Registers& r) {
      const int row = piece_row(thread);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        float v[8];
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) v[e] = weight[row] * of(r)[i][e];
        store_eight<128>(to, row, piece_column(thread, i), v);
      }
    });
  }
  // m from raw_x and the raw queries.
  KALMANET_KERNEL void put_mix(int queries) {
    group.each([&](int thread, Registers& r) {
      const int row = piece_row(thread);
      const float alpha = this->now().alpha[row], weight = this->now().mix[row];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        float v[8];
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) {
          const uint32_t both = r.raw[queries][i][e / 2];
          const float q =
              e % 2 == 0 ? low_number<Group>(job.q, both) : high_number<Group>(job.q, both);
          v[e] = weight * (q + alpha * (r.raw_x[i][e] - q));
        }
        store_eight<128>(m(), row, piece_column(thread, i), v);
      }
    });
  }
  // Keys times `weight`, split.
  KALMANET_KERNEL void put_weighted_keys(const float* weights, const Parts& to,
                                         float factor = 1.0f) {
    group.each([&](int thread, Registers&) {
      const int row = piece_row(thread);
      const float weight = factor * weights[row];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t both[4];
        float v[8];
        const int at = Blocks<128>::at(row, piece_column(thread, i));
        load16(shared.k + at, both);
        KALMANET_UNROLL
        for (int e = 0; e < 8; ++e) {
          v[e] = weight * (e % 2 == 0 ? low_bfloat16(both[e / 2]) : high_bfloat16(both[e / 2]));
        }
        if (kLows && low_k != nullptr) {
          load16(low_k + at, both);
          KALMANET_UNROLL
          for (int e = 0; e < 8; ++e) {
            v[e] += weight * (e % 2 == 0 ? low_bfloat16(both[e / 2]) : high_bfloat16(both[e / 2]));
          }
        }
        store_eight<128>(to, row, piece_column(thread, i), v);
      }
    });
  }

  // The chunk before this one, on its way from memory to the second-level cache: a row's lines by
  // turns, [place][K] float32 or a tensor of 16 bits.
  KALMANET_KERNEL void prefetch_solutions(const void* rows) {
    if (t0 == piece.begin) return;
    const int width = key_dims<Group>(job);
    const float* const base =
        static_cast<const float*>(rows) + place_of(backward, piece, t0 - L::kTokens, head) * width;
    const int64_t stride = job.H * width;
    group.each([&](int thread, Registers&) {
      const int column = thread % 4 * 32;
      if (reaches<Group>(width, column)) prefetch(base + thread / 4 * stride + column);
    });
  }
  KALMANET_KERNEL void prefetch_tensor(const Array& a, int64_t a_head) {
    if (t0 == piece.begin) return;
    const uint16_t* const base =
        static_cast<const uint16_t*>(a.data) + offset_of(a, piece.row, t0 - L::kTokens, a_head);
    group.each([&](int thread, Registers&) {
      const int column = thread % 2 * 64;
      if (thread < 128 && has_column<Group>(a, column)) {
        prefetch(base + thread / 2 * a.stride[1] + column);
      }
    });
  }

  // A state in the layout of registers.state, as what products read.
  KALMANET_KERNEL void put_state() {
    each_of_state([&](Registers& r, int thread, int mm, int tile) {
      KALMANET_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float (&v)[4] = r.state[mm][tile];
        store_two<128>(state(), Base::state_row(thread, mm, 2 * h),
                       Base::column_of(thread, tile, 0), v[2 * h], v[2 * h + 1]);
      }
    });
  }
  template <class F>
  KALMANET_KERNEL void each_of_state(F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int mm = 0; mm < 2; ++mm) {
        KALMANET_UNROLL
        for (int tile = 0; tile < 8; ++tile) f(r, thread, mm, tile);
      }
    });
  }
  // Where four elements of a thread lie in a state's scratch memory.
  KALMANET_KERNEL static int scratch_at(int thread, int mm, int tile) {
    return ((mm * 8 + tile) * L::kThreads + thread) * 4;
  }
};

}  // namespace kalmanet::cuda
