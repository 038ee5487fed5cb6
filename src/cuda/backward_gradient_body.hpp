// The body of the backward's last kernel for any shape (backward_gradient_kernel.hpp).
#pragma once

#include "cuda/backward_gradient_kernel.hpp"

namespace kalmanet::cuda {

template <class Group, class S>
struct GradientBody : GradientProducts<Group, S> {
  using Base = GradientProducts<Group, S>;
  using Base::C, Base::group, Base::shared, Base::job, Base::lanes, Base::piece, Base::head;
  using Base::K, Base::V, Base::Kp, Base::Vp, Base::t0, Base::n;
  using typename Base::L;
  using typename Base::Registers;

  // shared.dots[which][token] <- sum over c < width of term(c, token). Begins and ends with a
  // barrier.
  template <class F>
  KALMANET_KERNEL void dot_tokens(int which, int width, F&& term) {
    constexpr int kLanes = L::kThreads / C;  // of a token
    group.barrier();
    group.each([&](int thread, Registers& r) {
      r.sum[0] = 0.0;
      for (int c = thread % kLanes; c < width; c += kLanes) r.sum[0] += term(c, thread / kLanes);
    });
    group.template sum_lanes<kLanes>([](Registers& r) -> double& { return r.sum[0]; });
    group.each([&](int thread, Registers& r) {
      if (thread % kLanes == 0) shared.dots[which][thread / kLanes] = r.sum[0];
    });
    group.barrier();
  }
  // Of `out` with other lanes.
  KALMANET_KERNEL void dot_out(int which, int width, const S* other) {
    dot_tokens(which, width, [&](int c, int token) {
      const int at = c * L::kStride + token;
      return static_cast<double>(lanes.out[at]) * static_cast<double>(other[at]);
    });
  }
  KALMANET_KERNEL void put_out(int column, int t, const S (&values)[L::kItem]) {
    KALMANET_UNROLL
    for (int i = 0; i < L::kItem; ++i) lanes.out[column * L::kStride + t + i] = values[i];
  }

  KALMANET_KERNEL void pair_products() {
    group.each([&](int thread, Registers&) {
      for (int at = thread; at < C * C; at += L::kThreads) {
        const int i = at / C, j = at % C;
        S mix = 0, solution = 0, adjoint = 0, key = 0, output = 0;
        for (int c = 0; c < Kp; ++c) {
          const S k = lanes.k[c * L::kStride + j];
          mix += lanes.m[c * L::kStride + i] * k;
          solution += lanes.x[c * L::kStride + i] * k;
          adjoint += lanes.z[c * L::kStride + i] * k;
          key += lanes.k[c * L::kStride + i] * k;
        }
        for (int c = 0; c < Vp; ++c) {
          output += lanes.d_o[c * L::kStride + i] * lanes.v[c * L::kStride + j];
        }
        shared.pair[kMix][i][j] = mix;
        shared.pair[kOutput][i][j] = output;
        shared.pair[kSolution][i][j] = solution;
        shared.pair[kAdjoint][i][j] = adjoint;
        shared.pair[kKey][i][j] = key;
      }
    });
    group.barrier();
  }

  // What each token's row weighs in the gradients of the others, and h.
  KALMANET_KERNEL void weigh_pairs() {
    const double scale = job.in.scale;
    group.each([&](int thread, Registers&) {
      for (int at = thread; at < C * C; at += L::kThreads) {
        const int i = at / C, t = at % C;
        const double h_decay = shared.between[0][i][t], u_decay = scale * shared.between[1][i][t];
        double p = 0.0;  // (M^T diag(w) M)_it
        for (int l = i > t ? i : t; l < C; ++l) {
          p += shared.between[0][l][i] * shared.w[l] * shared.between[0][l][t];
        }
        const auto weight = [&](int of, double factor, int pair) {
          shared.weight[of][i][t] =
              static_cast<S>(factor * static_cast<double>(shared.pair[pair][i][t]));
        };
        weight(kMix, u_decay, kOutput);
        weight(kOutput, u_decay, kMix);
        weight(kSolution, -h_decay, kAdjoint);
        weight(kAdjoint, -h_decay, kSolution);
        weight(kKey, -2.0 * p, kKey);
      }
      if (thread < C) {
        double h = 0.0;
        for (int i = thread; i < C; ++i) {
          h += shared.between[0][i][thread] * shared.w[i] * shared.since[0][i];
        }
        shared.h[thread] = h;
      }
    });
    group.barrier();
  }

  KALMANET_KERNEL void gradients_of_keys(const S* h, const S* u) {
    S* const s = this->carry();
    S* const e = this->second(s);
    using Sum = const S(&)[L::kItem];
    this->template multiply<false>(
        h, Kp, Kp, Kp, lanes.k, [&](Registers& r, int round, int column, int t, Sum sum) {
          KALMANET_UNROLL
          for (int i = 0; i < L::kItem; ++i) {
            r.dk[round][i] = static_cast<S>(-2.0 * shared.h[t + i] * static_cast<double>(sum[i]));
          }
          put_out(column, t, sum);
        });
    dot_out(kKeyStart, K, lanes.k);
    this->template multiply<false>(s, Kp, Kp, Kp, lanes.k,
                                   [&](Registers& r, int round, int column, int t, Sum sum) {
                                     S scaled[L::kItem];
                                     KALMANET_UNROLL
                                     for (int i = 0; i < L::kItem; ++i) {
                                       scaled[i] = static_cast<S>(shared.to_end[0][t + i]) * sum[i];
                                       r.dk[round][i] += scaled[i];
                                     }
                                     put_out(column, t, scaled);
                                   });
    dot_out(kKeyCarry, K, lanes.k);
    if (job.dgk.data != nullptr) {
      this->template multiply<false>(
          h, Kp, Kp, Kp, lanes.x,
          [&](Registers&, int, int column, int t, Sum sum) { put_out(column, t, sum); });
      dot_out(kAdjointStart, K, lanes.z);
    }
    if (job.dg.data != nullptr) {
      this->template multiply<true>(
          u, Vp, Vp, Kp, lanes.d_o,
          [&](Registers&, int, int column, int t, Sum sum) { put_out(column, t, sum); });
      dot_out(kMixStart, K, lanes.m);
    }
    this->template multiply<true>(
        e, Vp, Vp, Kp, lanes.v, [&](Registers& r, int round, int column, int t, Sum sum) {
          KALMANET_UNROLL
          for (int i = 0; i < L::kItem; ++i) {
            r.dk[round][i] += static_cast<S>(shared.to_end[1][t + i]) * sum[i];
          }
          S others[L::kItem] = {};
          for (int i = 0; i < C; ++i) {
            const int row = column * L::kStride + i;
            Base::add_lanes(lanes.m[row], &shared.weight[kMix][i][t], others);
            Base::add_lanes(lanes.x[row], &shared.weight[kSolution][i][t], others);
            Base::add_lanes(lanes.z[row], &shared.weight[kAdjoint][i][t], others);
            Base::add_lanes(lanes.k[row], &shared.weight[kKey][i][t], others);
          }
          KALMANET_UNROLL
          for (int i = 0; i < L::kItem; ++i) r.dk[round][i] += others[i];
        });
  }

  KALMANET_KERNEL void gradients_of_values() {
    const S* const e = this->second(this->carry());
    this->template multiply<false>(
        e, Vp, Kp, Vp, lanes.k,
        [&](Registers& r, int round, int column, int t, const S(&sum)[L::kItem]) {
          S others[L::kItem] = {}, scaled[L::kItem];
          KALMANET_UNROLL
          for (int i = 0; i < L::kItem; ++i) {
            scaled[i] = static_cast<S>(shared.to_end[1][t + i]) * sum[i];
          }
          for (int i = 0; i < C; ++i) {
            Base::add_lanes(lanes.d_o[column * L::kStride + i], &shared.weight[kOutput][i][t],
                            others);
          }
          KALMANET_UNROLL
          for (int i = 0; i < L::kItem; ++i) r.dv[round][i] = scaled[i] + others[i];
          put_out(column, t, scaled);
        });
    dot_out(kValueCarry, V, lanes.v);
  }

  // dk and dv through beta, and beta's gradient.
  KALMANET_KERNEL void store() {
    if (job.dbeta.data != nullptr) {
      each_item(
          Kp, [&](Registers& r, int round, int column, int t) { put_out(column, t, r.dk[round]); });
      dot_tokens(kBetaKey, K, [&](int c, int token) {
        if (token >= n) return 0.0;
        return static_cast<double>(lanes.out[c * L::kStride + token]) *
               static_cast<double>(this->key(t0 + token, c));
      });
      each_item(
          Vp, [&](Registers& r, int round, int column, int t) { put_out(column, t, r.dv[round]); });
      dot_tokens(kBetaValue, V, [&](int c, int token) {
        if (token >= n) return 0.0;
        return static_cast<double>(lanes.out[c * L::kStride + token]) *
               static_cast<double>(this->value(t0 + token, c));
      });
      group.each([&](int thread, Registers&) {
        if (thread >= n) return;
        store_scalar<S>(job.dbeta, piece.row, t0 + thread, head,
                        shared.dots[kBetaKey][thread] + shared.dots[kBetaValue][thread]);
      });
    }
    each_item(Kp, [&](Registers& r, int round, int column, int t) {
      store_item(job.dk, job.dk_parts, K, column, t, r.dk[round]);
    });
    each_item(Vp, [&](Registers& r, int round, int column, int t) {
      store_item(job.dv, job.dv_parts, V, column, t, r.dv[round]);
    });
  }
  // The items of multiply.
  template <class F>
  KALMANET_KERNEL void each_item(int width, F&& f) {
    const int columns = (width + 31) / 32 * 32;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int round = 0; round < L::kRounds; ++round) {
        const int item = round * L::kThreads + thread;
        const int column = item % columns, t = item / columns * L::kItem;
        if (t < C && column < width) f(r, round, column, t);
      }
    });
  }
  KALMANET_KERNEL void store_item(const Array& gradient, void* parts, int width, int column,
                                  int first, const S (&values)[L::kItem]) {
    if (column >= width) return;
    KALMANET_UNROLL
    for (int i = 0; i < L::kItem; ++i) {
      const int64_t t = t0 + first + i;
      if (first + i >= n) continue;
      const S beta = scalar_at<S>(job.in.beta, piece.row, t, head, 1.0);
      store_gradient(job, gradient, parts, width, piece, t, head, column, beta * values[i]);
    }
  }

  // The block's sums of registers.sum into shared.states. Ends with a barrier.
  KALMANET_KERNEL void sum_states() {
    for (int i = 0; i < 3; ++i) {
      group.template sum_lanes<32>([i](Registers& r) -> double& { return r.sum[i]; });
    }
    group.each([&](int thread, Registers& r) {
      if (thread % 32 != 0) return;
      for (int i = 0; i < 3; ++i) shared.warp[i][thread / 32] = r.sum[i];
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread >= 3) return;
      double sum = 0.0;
      for (int w = 0; w < L::kThreads / 32; ++w) sum += shared.warp[thread][w];
      shared.states[thread] = sum;
    });
    group.barrier();
  }

  // The gradient of a decay is the sum of all interactions that cross it, of what tokens before it
  // (and the start) put into a state with what tokens from it on (and the carry) take out: exact
  // also where it is tiny (src/cpu/gka_gate_gradient.hpp).
  KALMANET_KERNEL void gradients_of_gates() {
    const auto& between = shared.between[0];
    group.each([&](int thread, Registers&) {
      for (int at = thread; at < (C + 1) * (C + 1); at += L::kThreads) {
        const int i = at / (C + 1), j = at % (C + 1);
        double of_h = 0.0, of_u = 0.0;
        if (i == C && j == C) {
          of_h = shared.total[0] * 0.5 * shared.states[0];
          of_u = shared.total[1] * shared.states[2];
        } else if (i == C) {
          of_h = 0.5 * shared.dots[kKeyCarry][j];
          of_u = shared.dots[kValueCarry][j];
        } else if (j == C) {
          double norm = shared.since[0][i] * shared.states[1];  // <H_i, H_0>
          for (int l = 0; l <= i; ++l) norm += between[i][l] * shared.dots[kKeyStart][l];
          if (job.dgk.data != nullptr) {
            of_h = -shared.since[0][i] * (shared.dots[kAdjointStart][i] + shared.w[i] * norm);
          }
          if (job.dg.data != nullptr) {
            of_u = job.in.scale * shared.since[1][i] * shared.dots[kMixStart][i];
          }
        } else if (j <= i) {
          double k_h_k = shared.since[0][i] * shared.dots[kKeyStart][j];
          for (int l = 0; l <= i; ++l) {
            const double k_k = static_cast<double>(shared.pair[kKey][l][j]);
            k_h_k += between[i][l] * k_k * k_k;
          }
          of_h = -between[i][j] * (static_cast<double>(shared.pair[kAdjoint][i][j]) *
                                       static_cast<double>(shared.pair[kSolution][i][j]) +
                                   shared.w[i] * k_h_k);
          of_u = job.in.scale * shared.between[1][i][j] *
                 static_cast<double>(shared.pair[kMix][i][j]) *
                 static_cast<double>(shared.pair[kOutput][i][j]);
        }
        shared.actions[0][i][j] = of_h;
        shared.actions[1][i][j] = of_u;
      }
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      const int which = thread / C, t = thread % C;
      if (which >= 2 || t >= n) return;
      double sum = 0.0;
      for (int i = t; i <= C; ++i) {
        sum += shared.actions[which][i][C];
        for (int j = 0; j < t; ++j) sum += shared.actions[which][i][j];
      }
      store_scalar<S>(which == 0 ? job.dgk : job.dg, piece.row, t0 + t, head, sum);
    });
  }

  // The piece's first state, and what comes to it from later pieces.
  KALMANET_KERNEL void load_states() {
    const StateView<S> h = piece.first ? state_view<S>(job.in.h0, piece.sequence, head)
                                       : slot_view<S>(job.in, piece.slot, head, false);
    const StateView<S> u = piece.first ? state_view<S>(job.in.u0, piece.sequence, head)
                                       : slot_view<S>(job.in, piece.slot, head, true);
    const StateView<S> d = adjoint_view<S>(job, piece.slot, head, false);
    const StateView<S> e = adjoint_view<S>(job, piece.slot, head, true);
    S* const start = this->state(0);
    S* const s = this->carry();
    group.each([&](int thread, Registers&) {
      for (int at = thread; at < Kp * Kp; at += L::kThreads) {
        const int row = at / Kp, c = at % Kp;
        const bool inside = row < K && c < K;
        start[at] = inside && h.data != nullptr ? h.data[h.at(row, c)] : S{0};
        s[at] = inside ? d.data[d.at(row, c)] + d.data[d.at(c, row)] : S{0};
      }
      for (int at = thread; at < Kp * Vp; at += L::kThreads) {
        const int row = at / Vp, c = at % Vp;
        const bool inside = row < K && c < V;
        this->second(start)[at] = inside && u.data != nullptr ? u.data[u.at(row, c)] : S{0};
        this->second(s)[at] = inside ? e.data[e.at(row, c)] : S{0};
      }
    });
    group.barrier();
  }

  KALMANET_KERNEL void set_chunk(int64_t begin) {
    t0 = begin;
    n = static_cast<int>(piece.end - t0 < C ? piece.end - t0 : C);
  }

  KALMANET_KERNEL void run_chunk(const S* h) {
    this->load_keys_and_values();
    this->load_rest();
    this->load_decays();
    pair_products();
    weigh_pairs();
    gradients_of_keys(h, h + static_cast<int64_t>(Kp) * Kp);
    gradients_of_values();
    store();
    group.barrier();
    this->retreat(h, h + static_cast<int64_t>(Kp) * Kp);
    sum_states();
    gradients_of_gates();
    group.barrier();
  }

  KALMANET_KERNEL void run() {
    load_states();
    const int64_t tokens = piece.end - piece.begin;
    const int windows = static_cast<int>((tokens + L::kWindow - 1) / L::kWindow);
    const auto advance = [&](int64_t begin, const S* from, S* to) {
      set_chunk(begin);
      this->load_keys_and_values();
      this->load_decays();
      this->advance(from, to);
      group.barrier();
    };
    for (int i = 0; i + 1 < windows; ++i) {
      for (int chunk = 0; chunk < L::kFine; ++chunk) {
        advance(piece.begin + i * L::kWindow + chunk * C, this->state(chunk == 0 ? i : i + 1),
                this->state(i + 1));
      }
    }
    for (int i = windows; i-- > 0;) {
      const int64_t begin = piece.begin + i * L::kWindow;
      const int64_t rest = piece.end - begin < L::kWindow ? piece.end - begin : L::kWindow;
      const int chunks = static_cast<int>((rest + C - 1) / C);
      for (int chunk = 0; chunk + 1 < chunks; ++chunk) {
        advance(begin + chunk * C, this->chunk_state(i, chunk), this->chunk_state(i, chunk + 1));
      }
      for (int chunk = chunks; chunk-- > 0;) {
        set_chunk(begin + chunk * C);
        run_chunk(this->chunk_state(i, chunk));
      }
    }
  }
};

// Block `block` of `blocks`, each with its own memory: every so-manieth piece and head.
template <class S, class Group>
KALMANET_KERNEL void run_gradients(Group& group, char* shared_memory, const BackwardJob& job,
                                   int64_t block, int64_t blocks) {
  using L = GradientLayout<S>;
  const int K = static_cast<int>(job.in.K), V = static_cast<int>(job.in.V);
  S* const scratch =
      reinterpret_cast<S*>(static_cast<char*>(job.block_scratch) + block * job.block_bytes);
  for (int64_t i = block; i < job.in.num_pieces * job.in.H; i += blocks) {
    if (is_done(job.in, i / job.in.H, i % job.in.H)) continue;
    GradientBody<Group, S> body{{group, *reinterpret_cast<GradientShared<S>*>(shared_memory), job,
                                 GradientLanes<S>(shared_memory, K, V), scratch,
                                 piece_of(job.in, i / job.in.H), i % job.in.H, K, V,
                                 static_cast<int>(L::padded(K)), static_cast<int>(L::padded(V))}};
    body.run();
    group.barrier();
  }
}

}  // namespace kalmanet::cuda
