// The body of the token kernel: states in, tokens one after the other, states out.
#pragma once

#include "cuda/state_view.hpp"
#include "cuda/token_memory.hpp"
#include "cuda/token_solve.hpp"

namespace kalmanet::cuda {

// float32 is enough where its rounding errors, magnified so often, stay below the bound of the
// output's dtype: 1e-5 (src/cpu/gka_step.hpp measured 5 for it), or a twentieth of a bfloat16's.
KALMANET_KERNEL double largest_amplification(DType output) {
  return output == DType::float32 ? 5.0 : 200.0;
}

KALMANET_KERNEL float exp_of(float x) {
  return expf(x);
}
KALMANET_KERNEL double exp_of(double x) {
  return exp(x);
}
// sqrt(x) to 1e-13, without the long division of float64 (x: a sum of squares of float32).
KALMANET_KERNEL double root_of(double x) {
#ifdef __CUDACC__
  if (x < 1e36 && x > 1e-36) {
    const double y = rsqrtf(static_cast<float>(x));
    return x * (y * (1.5 - 0.5 * x * y * y));
  }
#endif
  return sqrt(x);
}

template <class Group, class S, int KP>
struct TokenBody {
  using Layout = TokenLayout<S, KP>;
  using Registers = TokenRegisters<S, KP>;
  using Solver = TokenSolver<Group, S, KP>;
  static constexpr bool kHasWider = sizeof(S) == 4;
  static constexpr int kRows = 4;  // of U that a thread has on their way at a time

  Group& group;
  TokenShared<S, KP>& shared;
  const GkaJob& job;
  Piece piece;
  int64_t head;
  StateView<S> u;  // what U is worked on in
  Solver solver;

  KALMANET_KERNEL void load_h() {
    const StateView<S> from = piece.first ? state_view<S>(job.h0, piece.sequence, head)
                                          : slot_view<S>(job, piece.slot, head, false);
    const int K = static_cast<int>(job.K);
    if (from.data != nullptr && from.whole_pieces() && K == KP) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int p = 0; p < Layout::kPieces; ++p) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            S h[4];
            load4(from.data + from.at(Layout::row(thread, i), Layout::column(thread, p)), h);
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) solver.set(r, thread, p * 8 + i * 4 + j, h[j]);
          }
        }
      });
      return;
    }
    solver.for_each([&](Registers& r, int thread, int e, int row, int column) {
      const bool inside = from.data != nullptr && row < K && column < K;
      solver.set(r, thread, e, inside ? from.data[from.at(row, column)] : S{0});
    });
  }

  KALMANET_KERNEL void store_h() {
    const StateView<S> to = state_view<S>(job.h_final, piece.sequence, head);
    const int K = static_cast<int>(job.K);
    if (!piece.last || to.data == nullptr) return;
    if (to.whole_pieces() && K == KP) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int p = 0; p < Layout::kPieces; ++p) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            S h[4];
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) h[j] = solver.get(r, thread, p * 8 + i * 4 + j);
            store4(to.data + to.at(Layout::row(thread, i), Layout::column(thread, p)), h);
          }
        }
      });
      return;
    }
    solver.for_each([&](Registers& r, int thread, int e, int row, int column) {
      if (row < K && column < K) to.data[to.at(row, column)] = solver.get(r, thread, e);
    });
  }

  // k, q, v and the scalars of token t, on their way into registers.
  // (kDraft: of the last draft, whose queries and what belongs to them nobody asks about.)
  template <bool kDraft = false>
  KALMANET_KERNEL void fetch_token(int64_t t) {
    if (!kDraft && t >= piece.end) return;
    const Array& from_k = kDraft ? job.draft_k : job.k;
    const Array& from_v = kDraft ? job.draft_v : job.v;
    const int64_t k = offset_of(from_k, piece.row, t, head / job.k_group);
    const int64_t q = kDraft ? 0 : offset_of(job.q, piece.row, t, head / job.q_group);
    const int64_t v = offset_of(from_v, piece.row, t, head / job.v_group);
    group.each([&](int thread, Registers& r) {
      const bool inside = thread < job.K;
      r.k = inside ? load_element<S>(from_k, k + thread * from_k.stride[3]) : S{0};
      r.q = inside && !kDraft ? load_element<S>(job.q, q + thread * job.q.stride[3]) : S{0};
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t c = thread + i * Layout::kThreads;
        r.v[i] = c < job.V ? load_element<S>(from_v, v + c * from_v.stride[3]) : S{0};
      }
      if (thread >= kTokenScalars || (kDraft && (thread == kAlpha || thread == kRidge))) return;
      const Array a = thread == kGateOfH   ? (kDraft ? job.draft_gk : job.gk)
                      : thread == kGateOfU ? (kDraft ? job.draft_g : job.g)
                      : thread == kAlpha   ? job.alpha
                      : thread == kBeta    ? (kDraft ? job.draft_beta : job.beta)
                                           : job.ridge;
      const double absent = thread <= kGateOfU ? 0.0 : thread == kRidge ? job.ridge_ratio : 1.0;
      r.scalar = scalar_at<S>(a, piece.row, t, head, absent);
    });
  }

  // What fetch_token brought, into shared memory.
  KALMANET_KERNEL void take_token() {
    group.each([&](int thread, Registers& r) {
      if (thread < KP) {
        shared.k[thread] = r.k;
        shared.q[thread] = r.q;
      }
      if (thread < kMostValues) shared.v[thread] = r.v[0];
      if (thread + Layout::kThreads < kMostValues) shared.v[thread + Layout::kThreads] = r.v[1];
      if (thread < kTokenScalars) shared.scalar[thread] = r.scalar;
    });
    group.barrier();
  }

  // H <- decay H + beta2 k k^T; returns |H|_F.
  KALMANET_KERNEL double update_h(S decay, S beta2) {
    group.each([&](int thread, Registers& r) {
      S sum[4] = {};
      const S k0 = beta2 * shared.k[Layout::row(thread, 0)];
      const S k1 = beta2 * shared.k[Layout::row(thread, 1)];
      KALMANET_UNROLL
      for (int p = 0; p < Layout::kPieces; ++p) {
        S k4[4];
        load4(shared.k + Layout::column(thread, p), k4);
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) {
          const S h = decay * solver.get(r, thread, p * 8 + i) + (i < 4 ? k0 : k1) * k4[i % 4];
          solver.set(r, thread, p * 8 + i, h);
          sum[i % 4] += h * h;
        }
      }
      r.sum = (static_cast<double>(sum[0]) + sum[1]) + (static_cast<double>(sum[2]) + sum[3]);
      r.sum2 = 0.0;
    });
    double f2, unused;
    solver.sum_block(&f2, &unused);
    return f2 <= kVanishedNorm * kVanishedNorm ? 0.0 : root_of(f2);
  }

  // x_t and m_t = q_t + alpha_t (x_t - q_t), in shared memory.
  template <class A>
  KALMANET_KERNEL void solve_and_mix(const TokenSystem& system, int num_iter, A alpha) {
    if (system.f == 0.0) {
      group.each([&](int thread, Registers& r) {
        r.x[0] = r.x[1] = 0;
        r.x64[0] = r.x64[1] = 0;
        if (thread < KP) shared.x[0][thread] = 0;
      });
      group.barrier();
    } else if (job.direct) {
      solver.direct(system, static_cast<int>(job.K));
    } else {
      solver.template chebyshev<A>(system, num_iter, shared.q);
    }
    group.each([&](int thread, Registers& r) {
      A m[2];
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const A q = static_cast<A>(shared.q[Layout::row(thread, i)]);
        m[i] = alpha * (x_of(r, A())[i] - q) + q;
      }
      solver.put_rows(thread, m[0], m[1], shared.m);
      solver.put_rows(thread, m[0], m[1], shared.x64[0]);
    });
    group.barrier();
  }

  // o = scale U^T m in A's precision, into shared.o. kUpdate: U <- decay source + beta2 k v^T on
  // the way; else source is U itself. Returns |U|_F^2.
  template <class A, bool kUpdate>
  KALMANET_KERNEL double read_out(const StateView<S> source, S decay, S beta2) {
    const int K = static_cast<int>(job.K), V = static_cast<int>(job.V);
    int groups = 1;  // of four columns, a power of two of them
    while (groups * 4 < V) groups *= 2;
    const int row_step = Layout::kThreads / groups;
    const bool vectors =
        V % 4 == 0 && u.whole_pieces() && (source.data == nullptr || source.whole_pieces());
    group.each([&](int thread, Registers& r) {
      const int c = thread % groups * 4;
      A sum[4] = {};
      r.sum = r.sum2 = 0.0;
      S v4[4];
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) v4[j] = c + j < V ? shared.v[c + j] : S{0};
      for (int row0 = thread / groups; row0 < K; row0 += kRows * row_step) {
        S rows[kRows][4];
        KALMANET_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const int row = row0 + i * row_step;
          if (vectors && source.data != nullptr && row < K && c < V) {
            load4(source.data + source.at(row, c), rows[i]);
          } else {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              const bool inside = row < K && c + j < V && source.data != nullptr;
              rows[i][j] = inside ? source.data[source.at(row, c + j)] : S{0};
            }
          }
        }
        KALMANET_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const int row = row0 + i * row_step;
          if (row >= K) continue;
          const A m = sizeof(A) == sizeof(S) ? static_cast<A>(shared.m[row])
                                             : static_cast<A>(shared.x64[0][row]);
          const S k = beta2 * shared.k[row];
          S squares = 0;
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            if constexpr (kUpdate) rows[i][j] = decay * rows[i][j] + k * v4[j];
            sum[j] += m * static_cast<A>(rows[i][j]);
            squares += rows[i][j] * rows[i][j];
          }
          r.sum += squares;
          if constexpr (!kUpdate) continue;
          if (vectors && c < V) {
            store4(u.data + u.at(row, c), rows[i]);
          } else {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              if (c + j < V) u.data[u.at(row, c + j)] = rows[i][j];
            }
          }
        }
      }
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) shared.partial[thread][j] = static_cast<double>(sum[j]);
    });
    double u2, unused;
    solver.sum_block(&u2, &unused);
    group.each([&](int thread, Registers&) {
      for (int c = thread; c < V; c += Layout::kThreads) {
        double sum = 0;
        for (int i = c / 4; i < Layout::kThreads; i += groups) sum += shared.partial[i][c % 4];
        shared.o[c] = static_cast<S>(job.scale * sum);
      }
    });
    group.barrier();
    return u2;
  }

  // Whether the amplification alpha scale |x| |U|_F / (sqrt(K) |o|) is more than float32 bears.
  KALMANET_KERNEL bool amplified(double alpha, double u2) {
    group.each([&](int thread, Registers& r) {
      r.sum = r.sum2 = 0.0;
      if (thread < KP) r.sum = static_cast<double>(shared.x[0][thread]) * shared.x[0][thread];
      for (int64_t c = thread; c < job.V; c += Layout::kThreads) {
        r.sum2 += static_cast<double>(shared.o[c]) * shared.o[c];
      }
    });
    double x2, o2;
    solver.sum_block(&x2, &o2);
    const double weight = alpha * job.scale, limit = largest_amplification(job.o.dtype);
    return o2 > 0.0 && weight * weight * x2 * u2 > limit * limit * static_cast<double>(job.K) * o2;
  }

  // U into the second-level cache while x is solved for.
  KALMANET_KERNEL void fetch_u(const StateView<S>& from) {
    if (from.data == nullptr || from.column != 1 || from.row != job.V) return;
    group.each([&](int thread, Registers&) {
      constexpr int64_t kLine = 128 / static_cast<int64_t>(sizeof(S));
      for (int64_t at = thread * kLine; at < job.K * job.V; at += Layout::kThreads * kLine) {
        prefetch(from.data + at);
      }
    });
  }

  // The states past the first `accepted` tokens of the last draft; where the call's own are one
  // too, into their places, and U is worked on in `scratch` from then on.
  KALMANET_KERNEL void run_drafts(int64_t accepted, const StateView<S>& final, S* scratch,
                                  StateView<S>* from) {
    for (int64_t i = 0; i < accepted; ++i) {
      fetch_token<true>(i);
      take_token();
      const S beta2 = shared.scalar[kBeta] * shared.scalar[kBeta];
      update_h(exp_of(shared.scalar[kGateOfH]), beta2);
      read_out<S, true>(*from, exp_of(shared.scalar[kGateOfU]), beta2);  // of any m: nobody reads o
      *from = u;
    }
    if (!job.is_draft) return;
    store_h();
    if (final.data == nullptr) return;
    if (accepted == 0 && final.data != from->data) copy_u(*from, final);
    u = {scratch, job.V, 1};
  }

  // kDrafts: a step with slots or drafts; `accepted` and `scratch`: of run_drafts.
  template <bool kDrafts>
  KALMANET_KERNEL void run(int64_t accepted, S* scratch) {
    const StateView<S> final = state_view<S>(job.u_final, piece.sequence, head);
    StateView<S> from = piece.first ? state_view<S>(job.u0, piece.sequence, head)
                                    : slot_view<S>(job, piece.slot, head, true);
    if constexpr (!kDrafts) fetch_token(piece.begin);
    load_h();
    fetch_u(from);
    if constexpr (kDrafts) {
      run_drafts(accepted, final, scratch, &from);
      fetch_token(piece.begin);
    }
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      take_token();
      fetch_token(t + 1);
      const S decay = exp_of(shared.scalar[kGateOfH]), u_decay = exp_of(shared.scalar[kGateOfU]);
      const S beta2 = shared.scalar[kBeta] * shared.scalar[kBeta];
      const S alpha = shared.scalar[kAlpha];
      TokenSystem system;
      // A ratio that is not positive has no answer, and must not look as if it had one.
      system.ridge = static_cast<double>(shared.scalar[kRidge]);
      if (!(system.ridge > 0.0)) system.ridge = NAN;
      system.f = update_h(decay, beta2);
      system.lambda = system.ridge * system.f;
      int num_iter = job.num_iter;
      if (num_iter == 0) num_iter = counted_steps(system.ridge, job.tolerance);
      solve_and_mix<S>(system, num_iter, alpha);
      const double u2 = read_out<S, true>(from, u_decay, beta2);
      from = u;
      if constexpr (kHasWider) {
        if (system.f != 0.0 && amplified(static_cast<double>(alpha), u2)) {
          solver.park();
          solve_and_mix<double>(system, num_iter, static_cast<double>(alpha));
          read_out<double, false>(u, S{0}, S{0});
          solver.unpark();
        }
      }
      store_token(t, system);
    }
    if (kDrafts && job.is_draft) return;
    if (piece.begin == piece.end && piece.last && final.data != nullptr) copy_u(from, final);
    store_h();
  }

  KALMANET_KERNEL void store_token(int64_t t, const TokenSystem& system) {
    const int64_t o = offset_of(job.o, piece.row, t, head);
    const int64_t x = offset_of(job.x, piece.row, t, head);
    group.each([&](int thread, Registers&) {
      for (int64_t c = thread; c < job.V; c += Layout::kThreads) {
        store_element(job.o, o + c * job.o.stride[3], shared.o[c]);
      }
      if (job.x.data != nullptr && thread < job.K) {
        store_element(job.x, x + thread * job.x.stride[3], shared.x[0][thread]);
      }
    });
    if (job.residual.data != nullptr) {
      double r2, q2;
      if constexpr (kHasWider) solver.park();
      solver.residual(system, &r2, &q2);
      if constexpr (kHasWider) solver.unpark();
      group.each([&](int thread, Registers&) {
        if (thread != 0) return;
        const double r = system.f == 0.0 || q2 == 0.0 ? 0.0 : sqrt(r2 / q2);
        store_element(job.residual, offset_of(job.residual, piece.row, t, head), static_cast<S>(r));
      });
    }
    group.barrier();  // the next token's numbers come into the same memory
  }

  // An empty sequence leaves its states as they were.
  KALMANET_KERNEL void copy_u(const StateView<S>& from, const StateView<S>& to) {
    group.each([&](int thread, Registers&) {
      for (int64_t i = thread; i < job.K * job.V; i += Layout::kThreads) {
        const int64_t r = i / job.V, c = i % job.V;
        to.data[to.at(r, c)] = from.data != nullptr ? from.data[from.at(r, c)] : S{0};
      }
    });
  }
};

}  // namespace kalmanet::cuda
