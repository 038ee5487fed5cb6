// x and z of the first tokens of a sequence that starts from nothing, where both are as large as
// their right-hand sides / lambda in all directions that no key has touched, and the gradients read
// their small parts along the keys (docs/numerics.md, section 6). With n <= 16 keys
//
//   H_t = sum_j e_j k_j k_j^T     e_j = beta_j^2 e^{G_t - G_j}
//
// maps what b and the keys span into itself, so that x = c_0 b + sum_j c_j k_j is solved for in its
// coefficients, by the same iteration, from exact products of keys; no K x K matrix is rounded. All
// in float64, all tokens at once: 16 lanes a token, lane j for key j. It writes what
// backward_solve_body.hpp does, over what that wrote.
#pragma once

#include "cuda/backward_job.hpp"
#include "cuda/short_plan.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

struct BackwardFirstLayout {
  static constexpr int kTokens = 16;
  static constexpr int kThreads = kTokens * kTokens;
  // Rows of float32, padded by one: lanes read one column of many.
  static constexpr KALMANET_BOTH int64_t row(int64_t n) { return n + 1; }
};

struct BackwardFirstShared {
  static constexpr int C = BackwardFirstLayout::kTokens;
  double gram[C][C + 1];
  double beta2[C], decay[2][C];
  double coefficient[2][C][C];  // of x and of z: of k_j for token t
  double mix[C][C];             // dm_t: of k_j
  int steps;
};

struct BackwardFirstRegisters {
  double weight, f, lambda, ridge, alpha;
  double side[2];  // k_j . b, of q_t and of alpha_t dm_t
  double c0[2], c[2], previous0[2], previous[2], moved[2];
  double w;
  double row[BackwardFirstLayout::kTokens], pivot;
  double sum, sum2;
};

template <class Group>
struct BackwardFirstBody {
  using L = BackwardFirstLayout;
  using Registers = BackwardFirstRegisters;
  static constexpr int C = L::kTokens;

  Group& group;
  BackwardFirstShared& shared;
  const BackwardJob& backward;
  const GkaJob& job;
  Piece piece;
  int64_t head;
  float *k, *q, *v, *d_o;
  double* dm;  // [token][K]
  int n;       // tokens

  KALMANET_KERNEL float* row_of(float* rows, int64_t width, int t) const {
    return rows + t * L::row(width);
  }

  KALMANET_KERNEL void load() {
    group.each([&](int thread, Registers& r) {
      const auto fill = [&](const Array& a, int64_t a_head, int64_t width, float* to) {
        for (int64_t at = thread; at < C * width; at += L::kThreads) {
          const int64_t t = at / width, i = at % width;
          to[t * L::row(width) + i] =
              t < n ? load_element<float>(
                          a, offset_of(a, piece.row, piece.begin + t, a_head) + i * a.stride[3])
                    : 0.0f;
        }
      };
      fill(job.k, head / job.k_group, job.K, k);
      fill(job.q, head / job.q_group, job.K, q);
      fill(job.v, head / job.v_group, job.V, v);
      fill(backward.d_o, head, job.V, d_o);
      const auto number = [&](const Array& a, int t, double absent) {
        if (t >= n) return absent;
        return static_cast<double>(scalar_at<float>(a, piece.row, piece.begin + t, head, absent));
      };
      if (thread < C) {
        const double beta = thread < n ? number(job.beta, thread, 1.0) : 0.0;
        shared.beta2[thread] = beta * beta;
        shared.decay[0][thread] = exp(number(job.gk, thread, 0.0));
        shared.decay[1][thread] = exp(number(job.g, thread, 0.0));
      }
      r.alpha = number(job.alpha, thread / C, 1.0);
      r.ridge =
          static_cast<double>(static_cast<float>(number(job.ridge, thread / C, job.ridge_ratio)));
      if (!(r.ridge > 0.0)) r.ridge = NAN;
    });
    group.barrier();
  }

  // Of two rows in shared memory.
  template <class A, class B>
  KALMANET_KERNEL static double dot(const A* a, const B* b, int64_t width) {
    double sum = 0.0;
    for (int64_t i = 0; i < width; ++i)
      sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
  }

  // Products of tokens t and j, f_t, and dm_t in the keys' coefficients.
  KALMANET_KERNEL void prepare() {
    group.each([&](int thread, Registers& r) {
      const int t = thread / C, j = thread % C;
      shared.gram[t][j] = dot(row_of(k, job.K, t), row_of(k, job.K, j), job.K);
      r.side[0] = dot(row_of(q, job.K, t), row_of(k, job.K, j), job.K);
      double weight[2] = {};
      for (int which = 0; which < 2 && j <= t; ++which) {
        weight[which] = shared.beta2[j];
        for (int i = j + 1; i <= t; ++i) weight[which] *= shared.decay[which][i];
      }
      r.weight = weight[0];
      shared.mix[t][j] =
          job.scale * weight[1] * dot(row_of(d_o, job.V, t), row_of(v, job.V, j), job.V);
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      const int t = thread / C, j = thread % C;
      double sum = 0.0;
      for (int i = 0; i <= t; ++i) {
        double weight = shared.beta2[i];
        for (int l = i + 1; l <= t; ++l) weight *= shared.decay[0][l];
        sum += weight * shared.gram[i][j] * shared.gram[i][j];
      }
      r.sum = r.weight * sum;
    });
    group.template sum_lanes<C>([](Registers& r) -> double& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      const int t = thread / C;
      r.f = sqrt(r.sum);
      if (t >= n || r.f <= kVanishedNorm) r.f = 0.0;
      r.lambda = r.ridge * r.f;
      if (thread == 0) shared.steps = 0;
    });
  }

  // dm_t as a vector, what U before the sequence adds to it included; and its products with keys.
  KALMANET_KERNEL void put_dm() {
    const StateView<float> start = state_view<float>(job.u0, piece.sequence, head);
    group.each([&](int thread, Registers&) {
      const int t = thread / C;
      double since = job.scale;
      for (int i = 0; i <= t; ++i) since *= shared.decay[1][i];
      for (int64_t c = thread % C; c < job.K; c += C) {
        double sum = 0.0;
        if (start.data != nullptr) {
          for (int64_t i = 0; i < job.V; ++i) {
            sum += static_cast<double>(start.data[start.at(c, i)]) *
                   static_cast<double>(row_of(d_o, job.V, t)[i]);
          }
        }
        sum *= since;
        for (int j = 0; j <= t; ++j) {
          sum += shared.mix[t][j] * static_cast<double>(row_of(k, job.K, j)[c]);
        }
        dm[t * job.K + c] = sum;
      }
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      const int t = thread / C, j = thread % C;
      r.side[1] = r.alpha * dot(dm + t * job.K, row_of(k, job.K, j), job.K);
    });
  }

  // H_t times what the coefficients stand for, for key j: e_j (c_0 k_j . b + sum_i gram_ji c_i).
  KALMANET_KERNEL double image(const Registers& r, int which, int t, int j) const {
    double sum = r.c0[which] * r.side[which];
    for (int i = 0; i < C; ++i) sum += shared.gram[j][i] * shared.coefficient[which][t][i];
    return r.weight * sum;
  }

  KALMANET_KERNEL int steps_of(double ridge) const {
    if (!(ridge > 0.0)) return 0;
    return job.num_iter != 0 ? job.num_iter : counted_steps(ridge, job.tolerance);
  }

  KALMANET_KERNEL void chebyshev() {
    group.barrier();
    group.each([&](int thread, Registers& r) {
      const double step = r.f == 0.0 ? 0.0 : 2.0 / (2.0 * r.lambda + r.f);
      r.w = 2.0;
      for (int which = 0; which < 2; ++which) {
        r.c0[which] = step;
        r.c[which] = r.previous0[which] = r.previous[which] = 0.0;
        shared.coefficient[which][thread / C][thread % C] = 0.0;
      }
      // (Steps differ by token where they are counted; barriers must not.)
      if (thread != 0) return;
      int most = 0;
      for (int t = 0; t < n; ++t) {
        const int steps = steps_of(static_cast<double>(
            scalar_at<float>(job.ridge, piece.row, piece.begin + t, head, job.ridge_ratio)));
        most = steps > most ? steps : most;
      }
      shared.steps = most;
    });
    group.barrier();
    for (int s = 0; s < shared.steps; ++s) {
      group.each([&](int thread, Registers& r) {
        const int t = thread / C, j = thread % C;
        const bool active = r.f != 0.0 && s < steps_of(r.ridge);
        const double step = active ? 2.0 / (2.0 * r.lambda + r.f) : 0.0;
        const double rho = 0.5 / (2.0 * r.ridge + 1.0);
        if (active) r.w = 1.0 / (1.0 - rho * rho * r.w);
        const double gain = step * r.w, momentum = r.w - 1.0;
        for (int which = 0; which < 2; ++which) {
          r.moved[which] = r.c[which];
          if (!active) continue;
          const double c = r.c[which], c0 = r.c0[which];
          r.moved[which] = c + momentum * (c - r.previous[which]) -
                           gain * (r.lambda * c + image(r, which, t, j));
          r.c0[which] = c0 + momentum * (c0 - r.previous0[which]) - gain * (r.lambda * c0 - 1.0);
          r.previous[which] = c;
          r.previous0[which] = c0;
        }
      });
      group.barrier();
      publish();
    }
  }
  KALMANET_KERNEL void publish() {
    group.each([&](int thread, Registers& r) {
      for (int which = 0; which < 2; ++which) {
        r.c[which] = r.moved[which];
        shared.coefficient[which][thread / C][thread % C] = r.c[which];
      }
    });
    group.barrier();
  }

  // y_j = k_j . x from (lambda I + Gram diag(e)) y = K b by elimination, both right-hand sides at
  // once; then c_0 = 1 / lambda, c_j = - e_j y_j / lambda.
  KALMANET_KERNEL void direct() {
    group.barrier();
    group.each([&](int thread, Registers& r) {
      const int t = thread / C, j = thread % C;
      for (int i = 0; i < C; ++i) {
        double weight = i <= t ? shared.beta2[i] : 0.0;
        for (int l = i + 1; l <= t; ++l) weight *= shared.decay[0][l];
        r.row[i] = shared.gram[j][i] * weight + (i == j ? r.lambda : 0.0);
      }
      if (r.f == 0.0) {
        for (int i = 0; i < C; ++i) r.row[i] = i == j ? 1.0 : 0.0;
      }
    });
    for (int pivot = 0; pivot < C; ++pivot) {
      // The pivot's row in turn through shared memory, element by element: coefficient[0] its left
      // part, coefficient[1] its right-hand sides.
      group.each([&](int thread, Registers& r) {
        const int t = thread / C;
        if (thread % C != pivot) return;
        for (int i = 0; i < C; ++i) shared.coefficient[0][t][i] = r.row[i];
        for (int which = 0; which < 2; ++which) shared.coefficient[1][t][which] = r.side[which];
      });
      group.barrier();
      group.each([&](int thread, Registers& r) {
        const int t = thread / C;
        if (thread % C == pivot) return;
        double own = 0.0;
        for (int i = 0; i < C; ++i) own = i == pivot ? r.row[i] : own;
        const double factor = own / shared.coefficient[0][t][pivot];
        for (int i = 0; i < C; ++i) r.row[i] -= factor * shared.coefficient[0][t][i];
        for (int which = 0; which < 2; ++which) {
          r.side[which] -= factor * shared.coefficient[1][t][which];
        }
      });
      group.barrier();
    }
    group.each([&](int thread, Registers& r) {
      double diagonal = 1.0;
      for (int i = 0; i < C; ++i) diagonal = i == thread % C ? r.row[i] : diagonal;
      for (int which = 0; which < 2; ++which) {
        r.c0[which] = r.f == 0.0 ? 0.0 : 1.0 / r.lambda;
        r.moved[which] = r.f == 0.0 ? 0.0 : -r.weight * r.side[which] / diagonal / r.lambda;
      }
    });
    publish();
  }

  // x, z and what follows from them.
  KALMANET_KERNEL void store() {
    group.each([&](int thread, Registers& r) {
      const int t = thread / C;
      r.sum = r.sum2 = 0.0;
      if (t >= n) return;
      const int64_t place = place_of(backward, piece, piece.begin + t, head);
      const bool zero = r.f == 0.0;
      for (int64_t c = thread % C; c < job.K; c += C) {
        const double b = static_cast<double>(row_of(q, job.K, t)[c]), d = dm[t * job.K + c];
        double x = zero ? 0.0 : r.c0[0] * b, z = zero ? 0.0 : r.c0[1] * r.alpha * d;
        for (int j = 0; j <= t && !zero; ++j) {
          const double key = static_cast<double>(row_of(k, job.K, j)[c]);
          x += shared.coefficient[0][t][j] * key;
          z += shared.coefficient[1][t][j] * key;
        }
        r.sum += z * x;
        r.sum2 += d * (x - b);
        static_cast<float*>(backward.x)[place * job.K + c] = static_cast<float>(x);
        static_cast<float*>(backward.z)[place * job.K + c] = static_cast<float>(z);
        store_gradient(backward, backward.dq, backward.dq_parts, job.K, piece, piece.begin + t,
                       head, c, static_cast<float>((1.0 - r.alpha) * d + z));
      }
    });
    group.template sum_lanes<C>([](Registers& r) -> double& { return r.sum; });
    group.template sum_lanes<C>([](Registers& r) -> double& { return r.sum2; });
    group.each([&](int thread, Registers& r) {
      const int t = thread / C;
      if (thread % C != 0 || t >= n) return;
      const int64_t place = place_of(backward, piece, piece.begin + t, head);
      store_scalar<float>(backward.dalpha, piece.row, piece.begin + t, head, r.sum2);
      store_scalar<float>(backward.d_ridge, piece.row, piece.begin + t, head, -r.sum * r.f);
      const bool through_f = r.f != 0.0 && backward.bp_lambda;
      backward.w[place] = through_f ? r.sum * r.ridge / r.f : 0.0;
    });
  }

  KALMANET_KERNEL void run() {
    load();
    prepare();
    put_dm();
    if (job.direct) {
      direct();
    } else {
      chebyshev();
    }
    store();
  }
};

static_assert(sizeof(BackwardFirstShared) % 8 == 0);

inline constexpr KALMANET_BOTH int64_t backward_first_bytes(int64_t K, int64_t V) {
  using L = BackwardFirstLayout;
  return static_cast<int64_t>(sizeof(BackwardFirstShared)) + L::kTokens * K * 8 +
         2 * L::kTokens * (L::row(K) + L::row(V)) * 4;
}

// The work of block (piece_index, head); `memory`: backward_first_bytes, at a multiple of 8.
// left_over: only if another kernel did the piece after the usual one. (Beside the direct solver on
// matrix units, which leaves these tokens out, such blocks run at the same time as its own.)
template <class Group>
KALMANET_KERNEL void run_backward_first(Group& group, char* memory, const BackwardJob& backward,
                                        int64_t piece_index, int64_t head, bool left_over) {
  using L = BackwardFirstLayout;
  const GkaJob& job = backward.in;
  const Piece piece = piece_of(job, piece_index);
  const bool again = job.short_plans != nullptr && *solved_again(job, piece_index, head) != 0;
  if (left_over && !again && is_done(job, piece_index, head)) return;
  if (!piece.first || job.h0.data != nullptr || piece.begin == piece.end) return;
  double* const dm = reinterpret_cast<double*>(memory + sizeof(BackwardFirstShared));
  float* const rows = reinterpret_cast<float*>(dm + L::kTokens * job.K);
  const int64_t key_rows = L::kTokens * L::row(job.K), value_rows = L::kTokens * L::row(job.V);
  const int64_t tokens = piece.end - piece.begin;
  BackwardFirstBody<Group> body{group,
                                *reinterpret_cast<BackwardFirstShared*>(memory),
                                backward,
                                job,
                                piece,
                                head,
                                rows,
                                rows + key_rows,
                                rows + 2 * key_rows,
                                rows + 2 * key_rows + value_rows,
                                dm,
                                static_cast<int>(tokens < L::kTokens ? tokens : L::kTokens)};
  body.run();
}

}  // namespace kalmanet::cuda
