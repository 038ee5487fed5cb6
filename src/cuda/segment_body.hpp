// The states before each piece of a sequence that is cut into several: what each piece adds to them
// on its own, all pieces at once, then one sum along the sequence.
//
//   H after piece i = (decay of H over i) H before it + sum_j e^{G_end - G_j} k_j k_j^T ,  U
//   likewise
#pragma once

#include "cuda/group.hpp"
#include "cuda/job.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

// A block makes one tile of kTile x kTile of [K, K + V]: H's columns, then U's. Each thread has 4 x
// 4 of it, 16 apart.
struct SegmentLayout {
  static constexpr int kTile = 64;
  static constexpr int kTokens = 16;  // on their way at a time
  static constexpr int kThreads = 256;
  static constexpr int64_t tiles(int64_t K, int64_t V) {
    return (K + kTile - 1) / kTile * columns(K, V);
  }
  static constexpr KALMANET_BOTH int64_t columns(int64_t K, int64_t V) {
    return (K + V + kTile - 1) / kTile;
  }
};

template <class S>
struct SegmentRegisters {
  S sum[4][4];
};

template <class S>
struct SegmentShared {
  S left[SegmentLayout::kTokens][SegmentLayout::kTile];
  S right[SegmentLayout::kTokens][SegmentLayout::kTile];
  S weight[2][SegmentLayout::kTokens];  // e^{G_end - G_j}, of H and of U
  double decay[2];                      // e^{G_end - G_j} of the token before the loaded ones
};

// Piece `i`, which is not its sequence's last: its contribution into the next piece's slot.
template <class S, class Group>
KALMANET_KERNEL void run_segment(Group& group, SegmentShared<S>& shared, const GkaJob& job,
                                 int64_t i, int64_t head, int64_t tile) {
  using L = SegmentLayout;
  const Piece piece = piece_of(job, i);
  if (piece.last) return;
  const int K = static_cast<int>(job.K), V = static_cast<int>(job.V);
  const int row0 = static_cast<int>(tile / L::columns(K, V)) * L::kTile;
  const int column0 = static_cast<int>(tile % L::columns(K, V)) * L::kTile;
  group.each([&](int thread, SegmentRegisters<S>& r) {
    for (auto& row : r.sum) {
      for (S& e : row) e = 0;
    }
    if (thread < 2) shared.decay[thread] = 1.0;
  });
  group.barrier();
  // From the end backwards, so that every weight is a product of decays and never a quotient.
  for (int64_t end = piece.end; end > piece.begin; end -= L::kTokens) {
    const int n = static_cast<int>(end - piece.begin < L::kTokens ? end - piece.begin : L::kTokens);
    group.each([&](int thread, SegmentRegisters<S>&) {
      if (thread < 2) {
        double decay = shared.decay[thread];
        for (int j = 0; j < n; ++j) {
          shared.weight[thread][j] = static_cast<S>(decay);
          decay *= exp(static_cast<double>(
              scalar_at<S>(thread == 0 ? job.gk : job.g, piece.row, end - 1 - j, head, 0.0)));
        }
        shared.decay[thread] = decay;
      }
      for (int at = thread; at < L::kTokens * L::kTile; at += L::kThreads) {
        const int j = at / L::kTile, c = at % L::kTile;
        S left = 0, right = 0;
        if (j < n) {
          const int64_t t = end - 1 - j;
          const S beta = scalar_at<S>(job.beta, piece.row, t, head, 1.0);
          const int64_t k = offset_of(job.k, piece.row, t, head / job.k_group);
          const auto key = [&](int column) {
            return beta * load_element<S>(job.k, k + column * job.k.stride[3]);
          };
          if (row0 + c < K) left = key(row0 + c);
          const int column = column0 + c;
          if (column < K) {
            right = key(column);
          } else if (column < K + V) {
            right =
                beta * load_element<S>(job.v, offset_of(job.v, piece.row, t, head / job.v_group) +
                                                  (column - K) * job.v.stride[3]);
          }
        }
        shared.left[j][c] = left;
        shared.right[j][c] = right;
      }
    });
    group.barrier();
    group.each([&](int thread, SegmentRegisters<S>& r) {
      const int row = thread / 16, column = thread % 16;
      for (int j = 0; j < n; ++j) {
        S left[4], right[4];
        KALMANET_UNROLL
        for (int a = 0; a < 4; ++a) {
          left[a] = shared.left[j][row + 16 * a];
          const bool u = column0 + column + 16 * a >= K;
          right[a] = shared.weight[u ? 1 : 0][j] * shared.right[j][column + 16 * a];
        }
        KALMANET_UNROLL
        for (int a = 0; a < 4; ++a) {
          KALMANET_UNROLL
          for (int b = 0; b < 4; ++b) r.sum[a][b] += left[a] * right[b];
        }
      }
    });
    group.barrier();
  }
  const StateView<S> h = slot_view<S>(job, piece.slot + 1, head, false);
  const StateView<S> u = slot_view<S>(job, piece.slot + 1, head, true);
  group.each([&](int thread, SegmentRegisters<S>& r) {
    for (int a = 0; a < 4; ++a) {
      for (int b = 0; b < 4; ++b) {
        const int row = row0 + thread / 16 + 16 * a, column = column0 + thread % 16 + 16 * b;
        if (row >= K || column >= K + V) continue;
        S* const to = column < K ? h.data + h.at(row, column) : u.data + u.at(row, column - K);
        *to = r.sum[a][b];
      }
    }
    if (tile == 0 && thread < 2) {
      job.decays[(static_cast<int64_t>(piece.slot + 1) * job.H + head) * 2 + thread] =
          shared.decay[thread];
    }
  });
}

// Elements e .. e + kWide of [K (K + V)], of one row, of one sequence's states, from its first
// piece (`i`) to its last.
template <class S, int kWide = 1>
KALMANET_KERNEL void run_segment_sums(const GkaJob& job, int64_t i, int64_t head, int64_t e) {
  Piece piece = piece_of(job, i);
  if (!piece.first || piece.last) return;
  const int64_t elements = job.K * (job.K + job.V);
  const bool u = e >= job.K * job.K;
  const StateView<S> from = state_view<S>(u ? job.u0 : job.h0, piece.sequence, head);
  const auto columns = static_cast<uint32_t>(u ? job.V : job.K);
  const auto within = static_cast<uint32_t>(u ? e - job.K * job.K : e);
  S state[kWide], added[kWide], next[kWide] = {};
  for (int c = 0; c < kWide; ++c) {
    state[c] =
        from.data != nullptr ? from.data[from.at(within / columns, within % columns + c)] : S{0};
  }
  const auto load = [&](int64_t slot, S(&part)[kWide]) {
    const S* const at = static_cast<const S*>(job.states) + (slot * job.H + head) * elements + e;
    if constexpr (kWide == 4) {
      load4(at, part);
    } else {
      part[0] = at[0];
    }
    return static_cast<S>(job.decays[(slot * job.H + head) * 2 + (u ? 1 : 0)]);
  };
  int64_t slot = piece.slot + 1;
  S decay = load(slot, added), next_decay{};
  for (;; ++slot) {
    const bool last = piece_of(job, ++i).last;
    if (!last) next_decay = load(slot + 1, next);  // under way before this one is written
    for (int c = 0; c < kWide; ++c) state[c] = decay * state[c] + added[c];
    S* const at = static_cast<S*>(job.states) + (slot * job.H + head) * elements + e;
    if constexpr (kWide == 4) {
      store4(at, state);
    } else {
      at[0] = state[0];
    }
    if (last) return;
    decay = next_decay;
    for (int c = 0; c < kWide; ++c) added[c] = next[c];
  }
}

}  // namespace kalmanet::cuda
