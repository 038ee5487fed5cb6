// The first tokens of a sequence that starts from nothing, where x is as large as q / lambda in all
// directions that no key has touched and only its small part along the keys is read
// (docs/numerics.md, section 6). With n <= 16 keys that part needs no K x K matrix: by
//
//   H_t = sum_j e_j k_j k_j^T     e_j = beta_j^2 e^{G_t - G_j}     y_j = k_j . x
//   o_t = scale sum_j e'_j v_j (alpha y_j + (1 - alpha) k_j . q)   e'_j likewise from g
//
// and (H_t + lambda) x = q, the n numbers y solve (lambda I + Gram diag(e)) y = K q, without any
// large number to cancel. Chebyshev's iterates are c q + sum_j c_j k_j, so it runs on n + 1
// coefficients. All in float64, every token at once: 16 lanes a token, lane j for key j.
#pragma once

#include "cuda/chunk_body.hpp"

namespace kalmanet::cuda {

struct FirstLayout {
  static constexpr int kTokens = static_cast<int>(kExactTokens);  // 16
  static constexpr int kThreads = kTokens * kTokens;
  static constexpr int kDim = 128;
};

struct FirstShared {
  // (Rows padded by a word: lanes read one column of many rows.)
  float k[FirstLayout::kTokens][FirstLayout::kDim + 1];
  float q[FirstLayout::kTokens][FirstLayout::kDim + 1];
  float v[FirstLayout::kTokens][FirstLayout::kDim + 1];
  double gram[FirstLayout::kTokens][FirstLayout::kTokens + 1];
  double since[2][FirstLayout::kTokens];
  double beta2[FirstLayout::kTokens], ridge[FirstLayout::kTokens], alpha[FirstLayout::kTokens];
  double read[FirstLayout::kTokens][FirstLayout::kTokens];  // what v_j is multiplied by in o_t
};

struct FirstRegisters {
  double row[FirstLayout::kTokens];  // of the Gram matrix, then of the system
  double weight, kq, y;              // e_j, k_j . q_t
  double sum, other, pivot, f, lambda;
  double c, previous, cq, previous_q, w;
};

template <class Group>
struct FirstBody {
  using L = FirstLayout;
  using Registers = FirstRegisters;
  Group& group;
  FirstShared& shared;
  const GkaJob& job;
  Piece piece;
  int64_t head;
  int n;

  KALMANET_KERNEL void load() {
    group.each([&](int thread, Registers&) {
      const auto fill = [&](const Array& a, int64_t a_head, int64_t width, auto& to) {
        for (int at = thread; at < L::kTokens * L::kDim; at += L::kThreads) {
          const int t = at / L::kDim, i = at % L::kDim;
          to[t][i] = t < n && i < width
                         ? load_element<float>(a, offset_of(a, piece.row, piece.begin + t, a_head) +
                                                      i * a.stride[3])
                         : 0.0f;
        }
      };
      fill(job.k, head / job.k_group, job.K, shared.k);
      fill(job.q, head / job.q_group, job.K, shared.q);
      fill(job.v, head / job.v_group, job.V, shared.v);
      if (thread >= L::kTokens) return;
      const int64_t t = piece.begin + thread;
      const auto at = [&](const Array& a, double absent) {
        return thread < n ? static_cast<double>(scalar_at<float>(a, piece.row, t, head, absent))
                          : absent;
      };
      const double beta = at(job.beta, 1.0), ridge = at(job.ridge, job.ridge_ratio);
      shared.beta2[thread] = thread < n ? beta * beta : 0.0;
      shared.ridge[thread] = ridge > 0.0 ? ridge : NAN;
      shared.alpha[thread] = at(job.alpha, 1.0);
      for (int which = 0; which < 2; ++which) {
        double since = 0.0;
        for (int j = 0; j <= thread && j < n; ++j) {
          since += static_cast<double>(
              scalar_at<float>(which == 0 ? job.gk : job.g, piece.row, piece.begin + j, head, 0.0));
        }
        shared.since[which][thread] = since;
      }
    });
    group.barrier();
  }

  KALMANET_KERNEL double decay(int which, int t, int j) const {
    return j <= t ? shared.beta2[j] * exp(shared.since[which][t] - shared.since[which][j]) : 0.0;
  }

  // Thread 16 t + j: the Gram matrix's row j, e_j, k_j . q_t, f_t, lambda_t.
  KALMANET_KERNEL void measure() {
    group.each([&](int thread, Registers& r) {
      const int t = thread / L::kTokens, j = thread % L::kTokens;
      double gram = 0.0, kq = 0.0;
      for (int i = 0; i < L::kDim; ++i) {
        gram += static_cast<double>(shared.k[t][i]) * shared.k[j][i];
        kq += static_cast<double>(shared.q[t][i]) * shared.k[j][i];
      }
      shared.gram[t][j] = gram;
      r.kq = kq;
      r.weight = decay(0, t, j);
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      const int t = thread / L::kTokens, j = thread % L::kTokens;
      r.sum = 0.0;
      KALMANET_UNROLL
      for (int i = 0; i < L::kTokens; ++i) {
        r.row[i] = shared.gram[j][i];
        r.sum += r.weight * decay(0, t, i) * r.row[i] * r.row[i];
      }
    });
    group.template sum_lanes<L::kTokens>([](Registers& r) -> double& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      r.f = sqrt(r.sum);
      if (r.f <= kVanishedNorm) r.f = 0.0;
      r.lambda = shared.ridge[thread / L::kTokens] * r.f;
    });
  }

  // other(registers) <- value(registers) of the token's lane j.
  template <class Value>
  KALMANET_KERNEL void take(int j, Value&& value) {
    group.shuffle([](Registers& r) -> double& { return r.other; }, value,
                  [j](int thread) { return thread % 32 / L::kTokens * L::kTokens + j; });
  }

  // y by elimination without pivoting: the matrix is similar to a positive definite one.
  KALMANET_KERNEL void solve_direct() {
    group.each([&](int thread, Registers& r) {
      const int t = thread / L::kTokens, j = thread % L::kTokens;
      KALMANET_UNROLL
      for (int i = 0; i < L::kTokens; ++i) {
        r.row[i] = r.row[i] * decay(0, t, i) + (i == j ? r.lambda : 0.0);
      }
      r.y = r.kq;
    });
    KALMANET_UNROLL
    for (int p = 0; p < L::kTokens; ++p) {
      take(p, [p](Registers& r) { return r.row[p]; });
      group.each([&](int thread, Registers& r) {
        r.pivot = r.row[p] / r.other;
        if (thread % L::kTokens == p) r.pivot = 0.0;
      });
      KALMANET_UNROLL
      for (int i = p + 1; i < L::kTokens; ++i) {
        take(p, [i](Registers& r) { return r.row[i]; });
        group.each([&](int, Registers& r) { r.row[i] -= r.pivot * r.other; });
      }
      take(p, [](Registers& r) { return r.y; });
      group.each([&](int, Registers& r) { r.y -= r.pivot * r.other; });
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int p = 0; p < L::kTokens; ++p) {
        if (thread % L::kTokens == p) r.y /= r.row[p];
      }
    });
  }

  // y of x = cq q + sum_i c_i k_i.
  KALMANET_KERNEL void multiply() {
    group.each([&](int, Registers& r) { r.y = r.cq * r.kq; });
    KALMANET_UNROLL
    for (int i = 0; i < L::kTokens; ++i) {
      take(i, [](Registers& r) { return r.c; });
      group.each([&](int, Registers& r) { r.y += r.row[i] * r.other; });
    }
  }

  KALMANET_KERNEL void solve_chebyshev() {
    // (As many steps as the token that needs most: the others' last ones change nothing.)
    int most = 0;
    for (int t = 0; t < n; ++t) {
      const int steps = steps_of(t);
      most = steps > most ? steps : most;
    }
    group.each([&](int, Registers& r) {
      r.c = r.previous = r.previous_q = 0.0;
      r.w = 2.0;
      r.cq = 2.0 / (2.0 * r.lambda + r.f);
    });
    for (int k = 0; k < most; ++k) {
      multiply();
      group.each([&](int thread, Registers& r) {
        if (k >= steps_of(thread / L::kTokens)) return;
        const double step = 2.0 / (2.0 * r.lambda + r.f);
        const double rho = 0.5 * r.f / (2.0 * r.lambda + r.f);
        r.w = 1.0 / (1.0 - rho * rho * r.w);
        const double c =
            r.w * r.c - step * r.w * (r.weight * r.y + r.lambda * r.c) - (r.w - 1.0) * r.previous;
        const double cq =
            r.w * r.cq - step * r.w * (r.lambda * r.cq - 1.0) - (r.w - 1.0) * r.previous_q;
        r.previous = r.c, r.previous_q = r.cq;
        r.c = c, r.cq = cq;
      });
    }
    multiply();
  }
  KALMANET_KERNEL int steps_of(int t) const {
    return job.num_iter != 0 ? job.num_iter : counted_steps(shared.ridge[t], job.tolerance);
  }

  KALMANET_KERNEL void run() {
    load();
    measure();
    if (job.direct) {
      solve_direct();
    } else {
      solve_chebyshev();
    }
    group.each([&](int thread, Registers& r) {
      const int t = thread / L::kTokens, j = thread % L::kTokens;
      const double y = r.f == 0.0 ? 0.0 : r.y;
      shared.read[t][j] = job.scale * decay(1, t, j) * (r.kq + shared.alpha[t] * (y - r.kq));
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      for (int64_t at = thread; at < n * job.V; at += L::kThreads) {
        const int t = static_cast<int>(at / job.V), c = static_cast<int>(at % job.V);
        double o = 0.0;
        for (int j = 0; j <= t; ++j) o += shared.read[t][j] * shared.v[j][c];
        store_element(job.o,
                      offset_of(job.o, piece.row, piece.begin + t, head) + c * job.o.stride[3],
                      static_cast<float>(o));
      }
    });
  }
};

template <class Group>
KALMANET_KERNEL void run_first(Group& group, FirstShared& shared, const GkaJob& job,
                               int64_t piece_index, int64_t head) {
  const Piece piece = piece_of(job, piece_index);
  FirstBody<Group> body{group, shared, job, piece, head, static_cast<int>(piece.end - piece.begin)};
  body.run();
}

}  // namespace kalmanet::cuda
