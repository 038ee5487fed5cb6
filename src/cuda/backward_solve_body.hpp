// The backward's first kernel: one head of one piece, token by token, forwards. As the token kernel
// does it brings H_t and U_t along; of each token it makes
//
//   dm_t = scale U_t do_t     x_t = (H_t + lambda_t I)^{-1} q_t     z_t, the same of alpha_t dm_t
//
// and with them all gradients that need no others: of q, of alpha and of the ridge ratio. x and z
// go to the workspace, for the kernels that follow. (Beside float32, a sequence's first tokens are
// then solved again in float64: backward_first_body.hpp.)
#pragma once

#include "cuda/backward_job.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

template <class Group, class S, int KP>
struct BackwardSolveBody : TokenBody<Group, S, KP> {
  using Base = TokenBody<Group, S, KP>;
  using Base::group, Base::shared, Base::job, Base::piece, Base::head, Base::u, Base::solver;
  using typename Base::Layout;
  using typename Base::Registers;

  const BackwardJob& backward;

  // Vectors in float64, where the forward's read-out has its partial sums.
  KALMANET_KERNEL double* kept(int i) { return &shared.partial[0][0] + i * KP; }
  KALMANET_KERNEL double* x() { return kept(0); }
  KALMANET_KERNEL double* dm() { return kept(1); }
  KALMANET_KERNEL double* z() { return kept(2); }
  KALMANET_KERNEL double* right_side() { return kept(3); }

  // do_t into shared.o. No barrier.
  KALMANET_KERNEL void load_output_gradient(int64_t t) {
    const int64_t at = offset_of(backward.d_o, piece.row, t, head);
    group.each([&](int thread, Registers&) {
      for (int64_t c = thread; c < job.V; c += Layout::kThreads) {
        shared.o[c] = load_element<S>(backward.d_o, at + c * backward.d_o.stride[3]);
      }
    });
  }

  // U <- decay source + beta2 k v^T, and dm_t of it. A thread has its rows of U as it has H's.
  KALMANET_KERNEL void advance_u(const StateView<S> source, S decay, S beta2) {
    const int K = static_cast<int>(job.K), V = static_cast<int>(job.V);
    const bool vectors =
        V % 4 == 0 && u.whole_pieces() && (source.data == nullptr || source.whole_pieces());
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = Layout::row(thread, i);
        S sum = 0;
        if (row < K) {
          const S k = beta2 * shared.k[row];
          for (int c = thread % 4 * 4; c < V; c += 16) {
            S e[4] = {};
            if (vectors && source.data != nullptr) {
              load4(source.data + source.at(row, c), e);
            } else if (source.data != nullptr) {
              KALMANET_UNROLL
              for (int j = 0; j < 4; ++j) {
                if (c + j < V) e[j] = source.data[source.at(row, c + j)];
              }
            }
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              if (c + j >= V) continue;
              e[j] = decay * e[j] + k * shared.v[c + j];
              sum += e[j] * shared.o[c + j];
              if (!vectors) u.data[u.at(row, c + j)] = e[j];
            }
            if (vectors) store4(u.data + u.at(row, c), e);
          }
        }
        r.product[i] = sum;
      }
    });
    group.template sum_lanes<4>([](Registers& r) -> S& { return r.product[0]; });
    group.template sum_lanes<4>([](Registers& r) -> S& { return r.product[1]; });
    group.each([&](int thread, Registers& r) {
      Base::Solver::put_rows(thread, job.scale * static_cast<double>(r.product[0]),
                             job.scale * static_cast<double>(r.product[1]), dm());
    });
    group.barrier();
  }

  // alpha_t dm_t, in both precisions.
  KALMANET_KERNEL void put_right_side() {
    const double alpha = static_cast<double>(shared.scalar[kAlpha]);
    group.each([&](int thread, Registers&) {
      if (thread >= KP) return;
      right_side()[thread] = alpha * dm()[thread];
      shared.m[thread] = static_cast<S>(alpha * dm()[thread]);
    });
    group.barrier();
  }

  // The solution in registers, as the solver leaves it in A's precision, into `to`.
  template <class A>
  KALMANET_KERNEL void keep(double* to) {
    group.each([&](int thread, Registers& r) {
      Base::Solver::put_rows(thread, x_of(r, A())[0], x_of(r, A())[1], to);
    });
    group.barrier();
  }

  KALMANET_KERNEL void solve(const TokenSystem& system, int num_iter) {
    if (system.f == 0.0) {
      group.each([&](int thread, Registers&) {
        if (thread < KP) x()[thread] = z()[thread] = 0.0;
      });
      group.barrier();
    } else if (job.direct) {
      solver.direct(system, static_cast<int>(job.K), right_side());
      keep<double>(x());
      group.each([&](int thread, Registers&) {
        if (thread < KP) z()[thread] = thread < job.K ? solver.second_row()[thread] : 0.0;
      });
      group.barrier();
    } else {
      solver.template chebyshev<S>(system, num_iter, shared.q);
      keep<S>(x());
      solver.template chebyshev<S>(system, num_iter, shared.m);
      keep<S>(z());
    }
  }

  KALMANET_KERNEL void store(int64_t t, const TokenSystem& system, double since_h, double since_u) {
    const int64_t place = place_of(backward, piece, t, head);
    const double alpha = static_cast<double>(shared.scalar[kAlpha]);
    group.each([&](int thread, Registers& r) {
      r.sum = r.sum2 = 0.0;
      if (thread >= job.K) return;
      const double xt = x()[thread], zt = z()[thread], dmt = dm()[thread];
      r.sum = zt * xt;
      r.sum2 = dmt * (xt - static_cast<double>(shared.q[thread]));
      static_cast<S*>(backward.x)[place * job.K + thread] = static_cast<S>(xt);
      static_cast<S*>(backward.z)[place * job.K + thread] = static_cast<S>(zt);
      store_gradient(backward, backward.dq, backward.dq_parts, job.K, piece, t, head, thread,
                     static_cast<S>((1.0 - alpha) * dmt + zt));
    });
    double z_x, dm_xq;
    solver.sum_block(&z_x, &dm_xq);
    group.each([&](int thread, Registers&) {
      if (thread != 0) return;
      store_scalar<S>(backward.dalpha, piece.row, t, head, dm_xq);
      store_scalar<S>(backward.d_ridge, piece.row, t, head, -z_x * system.f);
      const bool through_f = system.f != 0.0 && backward.bp_lambda;
      backward.w[place] = through_f ? z_x * system.ridge / system.f : 0.0;
      backward.since[2 * place] = since_h;
      backward.since[2 * place + 1] = since_u;
    });
    group.barrier();  // the next token's numbers come into the same memory
  }

  KALMANET_KERNEL void run() {
    StateView<S> from = piece.first ? state_view<S>(job.u0, piece.sequence, head)
                                    : slot_view<S>(job, piece.slot, head, true);
    double since_h = 1.0, since_u = 1.0;
    this->fetch_token(piece.begin);
    this->load_h();
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      load_output_gradient(t);
      this->take_token();
      this->fetch_token(t + 1);
      const S decay = exp_of(shared.scalar[kGateOfH]), u_decay = exp_of(shared.scalar[kGateOfU]);
      const S beta2 = shared.scalar[kBeta] * shared.scalar[kBeta];
      since_h *= exp(static_cast<double>(shared.scalar[kGateOfH]));
      since_u *= exp(static_cast<double>(shared.scalar[kGateOfU]));
      TokenSystem system;
      system.ridge = static_cast<double>(shared.scalar[kRidge]);
      if (!(system.ridge > 0.0)) system.ridge = NAN;
      system.f = this->update_h(decay, beta2);
      system.lambda = system.ridge * system.f;
      advance_u(from, u_decay, beta2);
      put_right_side();
      from = u;
      int num_iter = job.num_iter;
      if (num_iter == 0) num_iter = counted_steps(system.ridge, job.tolerance);
      solve(system, num_iter);
      store(t, system, since_h, since_u);
    }
  }
};

// The work of block (piece_index, head); memory as run_tokens has it.
template <class S, int KP, class Group>
KALMANET_KERNEL void run_backward_solve(Group& group, char* shared_memory,
                                        const BackwardJob& backward, int64_t piece_index,
                                        int64_t head) {
  const GkaJob& job = backward.in;
  if (is_solved(job, piece_index, head)) return;
  TokenMemory<S, KP> memory(shared_memory, job, piece_index, head);
  const Piece piece = piece_of(job, piece_index);
  const StateView<S> u = {memory.u, job.V, 1};
  BackwardSolveBody<Group, S, KP> body{
      {group,
       memory.shared,
       job,
       piece,
       head,
       u,
       {{group, memory.shared, memory.spilled, memory.parked, memory.factor}}},
      backward};
  body.run();
}

}  // namespace kalmanet::cuda
