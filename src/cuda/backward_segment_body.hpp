// The gradients of the states after each piece, D and E, from x and z: what each piece adds to
// those before it, all pieces at once, then one sum along the sequence, from its end.
//
//   E before a piece = e^{Gamma_end} E after it + scale sum_i e^{Gamma_i} m_i do_i^T
//   D likewise       = e^{G_end} D - sum_i e^{G_i} z_i x_i^T - sum_j h_j k_j k_j^T - w H before it
//   with  r_j = sum_{i>=j} w_i e^{2 (G_i - G_j)} ,  h_j = e^{G_j} r_j ,  w = sum_i w_i e^{2 G_i}
//
// (G and Gamma count from the piece's start.) And the sums over heads that share a gradient.
#pragma once

#include "cuda/backward_job.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

// A block makes one tile of kTile x kTile of D or of E; each thread has 4 x 4 of it, 16 apart.
struct AdjointLayout {
  static constexpr int kTile = 64;
  static constexpr int kTokens = 16;  // on their way at a time
  static constexpr int kThreads = 256;
  static constexpr KALMANET_BOTH int64_t across(int64_t n) { return (n + kTile - 1) / kTile; }
  static constexpr KALMANET_BOTH int64_t d_tiles(int64_t K) { return across(K) * across(K); }
  static constexpr int64_t tiles(int64_t K, int64_t V) {
    return d_tiles(K) + across(K) * across(V);
  }
};

template <class S>
struct AdjointRegisters {
  S sum[4][4];
};

template <class S>
struct AdjointShared {
  // Of D: z and x, then k and k. Of E: m and do.
  S left[2][AdjointLayout::kTokens][AdjointLayout::kTile];
  S right[2][AdjointLayout::kTokens][AdjointLayout::kTile];
  double weight[2][AdjointLayout::kTokens];
  double carried;  // e^{2 gk_t} r_t of the token before (later than) the loaded ones
};

// D or E (`u`) after a piece, or (until summed) what the piece adds to those before it.
template <class S>
KALMANET_KERNEL StateView<S> adjoint_view(const BackwardJob& job, int64_t slot, int64_t head,
                                          bool u) {
  GkaJob in = job.in;
  in.states = job.adjoints;
  return slot_view<S>(in, slot, head, u);
}

// Whether anybody asks for what lies before a piece.
KALMANET_KERNEL bool has_before(const BackwardJob& job, const Piece& piece) {
  return !piece.first || job.d_h0.data != nullptr || job.d_u0.data != nullptr;
}

template <class S>
KALMANET_KERNEL S workspace_at(const void* rows, int64_t place, int64_t K, int64_t c) {
  return static_cast<const S*>(rows)[place * K + c];
}

template <class S, class Group>
struct AdjointBody {
  using L = AdjointLayout;
  using Registers = AdjointRegisters<S>;
  Group& group;
  AdjointShared<S>& shared;
  const BackwardJob& job;
  Piece piece;
  int64_t head;
  bool u;
  int row0, column0;
  int64_t end = 0;  // of the tokens at work, which run backwards: j is token end - 1 - j
  int n = 0;

  KALMANET_KERNEL void weigh() {
    group.each([&](int thread, Registers&) {
      if (thread != 0) return;
      double carried = shared.carried;
      for (int j = 0; j < n; ++j) {
        const int64_t t = end - 1 - j, place = place_of(job, piece, t, head);
        const double since = job.since[2 * place + (u ? 1 : 0)];
        if (u) {
          shared.weight[0][j] = job.in.scale * since;
          continue;
        }
        const double r = job.w[place] + carried;
        const double gate = static_cast<double>(scalar_at<S>(job.in.gk, piece.row, t, head, 0.0));
        carried = exp(2.0 * gate) * r;
        shared.weight[0][j] = -since;
        shared.weight[1][j] = -since * r;
      }
      shared.carried = carried;
    });
    group.barrier();
  }

  KALMANET_KERNEL S key(int64_t t, S beta, int64_t c) const {
    const Array& k = job.in.k;
    const int64_t at = offset_of(k, piece.row, t, head / job.in.k_group);
    return beta * load_element<S>(k, at + c * k.stride[3]);
  }
  KALMANET_KERNEL S mixed(int64_t t, int64_t c) const {
    const Array& q_of = job.in.q;
    const int64_t at = offset_of(q_of, piece.row, t, head / job.in.q_group);
    const S q = load_element<S>(q_of, at + c * q_of.stride[3]);
    const S alpha = scalar_at<S>(job.in.alpha, piece.row, t, head, 1.0);
    const S x = workspace_at<S>(job.x, place_of(job, piece, t, head), job.in.K, c);
    return q + alpha * (x - q);
  }

  KALMANET_KERNEL void load() {
    const int64_t K = job.in.K, V = job.in.V;
    group.each([&](int thread, Registers&) {
      for (int at = thread; at < L::kTokens * L::kTile; at += L::kThreads) {
        const int j = at / L::kTile, c = at % L::kTile;
        const int64_t t = end - 1 - j, row = row0 + c, column = column0 + c;
        S left[2] = {}, right[2] = {};
        if (j < n && u) {
          if (row < K) left[0] = mixed(t, row);
          if (column < V) {
            const S d_o = load_element<S>(
                job.d_o, offset_of(job.d_o, piece.row, t, head) + column * job.d_o.stride[3]);
            right[0] = static_cast<S>(shared.weight[0][j] * static_cast<double>(d_o));
          }
        } else if (j < n) {
          const int64_t place = place_of(job, piece, t, head);
          const S beta = scalar_at<S>(job.in.beta, piece.row, t, head, 1.0);
          if (row < K) {
            left[0] = workspace_at<S>(job.z, place, K, row);
            left[1] = key(t, beta, row);
          }
          if (column < K) {
            const double x = static_cast<double>(workspace_at<S>(job.x, place, K, column));
            right[0] = static_cast<S>(shared.weight[0][j] * x);
            right[1] =
                static_cast<S>(shared.weight[1][j] * static_cast<double>(key(t, beta, column)));
          }
        }
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          shared.left[i][j][c] = left[i];
          shared.right[i][j][c] = right[i];
        }
      }
    });
    group.barrier();
  }

  KALMANET_KERNEL void add() {
    const int products = u ? 1 : 2;
    group.each([&](int thread, Registers& r) {
      for (int j = 0; j < n; ++j) {
        for (int i = 0; i < products; ++i) {
          S left[4], right[4];
          KALMANET_UNROLL
          for (int a = 0; a < 4; ++a) {
            left[a] = shared.left[i][j][thread / 16 + 16 * a];
            right[a] = shared.right[i][j][thread % 16 + 16 * a];
          }
          KALMANET_UNROLL
          for (int a = 0; a < 4; ++a) {
            KALMANET_UNROLL
            for (int b = 0; b < 4; ++b) r.sum[a][b] += left[a] * right[b];
          }
        }
      }
    });
    group.barrier();
  }

  KALMANET_KERNEL void run() {
    group.each([&](int thread, Registers& r) {
      for (auto& row : r.sum) {
        for (S& e : row) e = 0;
      }
      if (thread == 0) shared.carried = 0.0;
    });
    group.barrier();
    for (end = piece.end; end > piece.begin; end -= L::kTokens) {
      n = static_cast<int>(end - piece.begin < L::kTokens ? end - piece.begin : L::kTokens);
      weigh();
      load();
      add();
    }
    const StateView<S> to = adjoint_view<S>(job, piece.slot, head, u);
    StateView<S> start;
    if (!u) {
      start = piece.first ? state_view<S>(job.in.h0, piece.sequence, head)
                          : slot_view<S>(job.in, piece.slot, head, false);
    }
    const int64_t columns = u ? job.in.V : job.in.K;
    group.each([&](int thread, Registers& r) {
      for (int a = 0; a < 4; ++a) {
        for (int b = 0; b < 4; ++b) {
          const int row = row0 + thread / 16 + 16 * a, column = column0 + thread % 16 + 16 * b;
          if (row >= job.in.K || column >= columns) continue;
          double e = static_cast<double>(r.sum[a][b]);
          if (start.data != nullptr) {
            e -= shared.carried * static_cast<double>(start.data[start.at(row, column)]);
          }
          to.data[to.at(row, column)] = static_cast<S>(e);
        }
      }
    });
  }
};

// Piece `i`: what it adds, into its own slot.
template <class S, class Group>
KALMANET_KERNEL void run_adjoint_segment(Group& group, AdjointShared<S>& shared,
                                         const BackwardJob& job, int64_t i, int64_t head,
                                         int64_t tile) {
  using L = AdjointLayout;
  const Piece piece = piece_of(job.in, i);
  if (!has_before(job, piece) || is_done(job.in, i, head)) return;
  const bool u = tile >= L::d_tiles(job.in.K);
  if (u) tile -= L::d_tiles(job.in.K);
  const int64_t across = L::across(u ? job.in.V : job.in.K);
  AdjointBody<S, Group> body{group,
                             shared,
                             job,
                             piece,
                             head,
                             u,
                             static_cast<int>(tile / across) * L::kTile,
                             static_cast<int>(tile % across) * L::kTile};
  body.run();
}

// Elements e .. e + kWide of [K (K + V)], of one row, of one sequence, whose last piece is `i`:
// from there to the first, the gradient after each piece takes the place of what the piece adds.
template <class S, int kWide>
KALMANET_KERNEL void run_adjoint_sums(const BackwardJob& job, int64_t i, int64_t head, int64_t e) {
  Piece piece = piece_of(job.in, i);
  if (!piece.last) return;
  const int64_t K = job.in.K, V = job.in.V, elements = K * (K + V);
  const bool u = e >= K * K;
  const auto columns = static_cast<uint32_t>(u ? V : K);
  const auto within = static_cast<uint32_t>(u ? e - K * K : e);
  const int64_t row = within / columns, column = within % columns;
  const StateView<S> from = state_view<S>(u ? job.d_u_final : job.d_h_final, piece.sequence, head);
  S state[kWide], added[kWide], next[kWide] = {};
  for (int c = 0; c < kWide; ++c) {
    state[c] = from.data != nullptr ? from.data[from.at(row, column + c)] : S{0};
  }
  S* const adjoints = static_cast<S*>(job.adjoints) + head * elements + e;
  const auto load = [&](const Piece& of, S(&part)[kWide]) {
    const S* const at = adjoints + of.slot * job.in.H * elements;
    const bool has = has_before(job, of);
    if constexpr (kWide == 4) {
      if (has) load4(at, part);
    } else {
      if (has) part[0] = at[0];
    }
    for (int c = 0; c < kWide && !has; ++c) part[c] = S{0};
    if (of.end == of.begin) return S{1};
    return static_cast<S>(job.since[2 * place_of(job, of, of.end - 1, head) + (u ? 1 : 0)]);
  };
  S decay = load(piece, added);
  for (;;) {
    Piece before = piece;
    S next_decay{};
    if (!piece.first) {  // under way before this piece's is written
      before = piece_of(job.in, --i);
      next_decay = load(before, next);
    }
    S* const at = adjoints + piece.slot * job.in.H * elements;
    if constexpr (kWide == 4) {
      store4(at, state);
    } else {
      at[0] = state[0];
    }
    for (int c = 0; c < kWide; ++c) state[c] = decay * state[c] + added[c];
    if (piece.first) break;
    piece = before, decay = next_decay;
    for (int c = 0; c < kWide; ++c) added[c] = next[c];
  }
  const StateView<S> to = state_view<S>(u ? job.d_u0 : job.d_h0, piece.sequence, head);
  for (int c = 0; c < kWide && to.data != nullptr; ++c) to.data[to.at(row, column + c)] = state[c];
}

// Element (row, t, shared head, c) of a gradient, from its heads' parts in their order.
template <class S>
KALMANET_KERNEL void run_head_sum(const BackwardJob& job, const Array& gradient, const void* parts,
                                  int64_t group, int64_t width, int64_t row, int64_t t,
                                  int64_t shared_head, int64_t c) {
  S sum = 0;
  for (int64_t i = 0; i < group; ++i) {
    const int64_t place = (row * job.in.T + t) * job.in.H + shared_head * group + i;
    sum += workspace_at<S>(parts, place, width, c);
  }
  store_element(gradient, offset_of(gradient, row, t, shared_head) + c * gradient.stride[3], sum);
}

}  // namespace kalmanet::cuda
