// The decode step where a launch has fewer blocks than the GPU has multiprocessors, and latency is
// all that counts: 512 threads a sequence and head, in two halves. One has H in registers and
// solves; the other brings the token, updates U meanwhile, keeps it in registers too, and reads it
// out once there is an m. But for H's way into registers, which nothing else may delay, states
// travel by the copy engine: what takes the path of shared memory holds up the solver's reads of
// the iterate.
//
// Each sum is made by the functions of the step kernel (step_body.hpp), by a half's 256 threads in
// the same order: the same bits, whichever of the two kernels a batch's size chooses.
#pragma once

#include "cuda/step_body.hpp"

namespace kalmanet::cuda {

struct StepWideLayout {
  static constexpr int kThreads = 2 * StepLayout::kThreads;
};

struct StepWideShared : StepShared {
  alignas(128) float h[StepLayout::kDim * StepLayout::kDim];  // on its way back
  uint64_t u_arrival;
};

// What a half does. In the reader's, registers.h holds U: row u_begin + i is h[i / 4][i % 4].
template <class Group>
struct StepHalf : StepBody<Group> {
  using Base = StepBody<Group>;
  using Base::group, Base::shared, Base::job, Base::now;
  using L = StepLayout;
  using Registers = StepRegisters;

  // The solver's.
  KALMANET_KERNEL void find_place() {
    group.each([&](int thread, Registers& r) {
      r.place = kept(L::row(thread) * L::kDim + L::column(thread, 0));
    });
  }
  KALMANET_KERNEL void load_h(const float* from) {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        KALMANET_UNROLL
        for (int i = 0; i < L::kRows; ++i) {
          if (from != nullptr) {
            load4(from + r.place + p * 32 + i * L::kDim, r.h[p][i]);
          } else {
            r.h[p][i][0] = r.h[p][i][1] = r.h[p][i][2] = r.h[p][i][3] = 0;
          }
        }
      }
    });
  }
  // H past the token, and, where it `stores`, in `to` for the copy engine.
  template <bool kStores>
  KALMANET_KERNEL void update_h(float* to) {
    Base::update_h([&](int thread, Registers& r, int p) {
      if (!kStores) return;
      const int at = L::row(thread) * L::kDim + L::column(thread, p);
      KALMANET_UNROLL
      for (int i = 0; i < L::kRows; ++i) store4(to + at + i * L::kDim, r.h[p][i]);
    });
    if (kStores) before_bulk();
  }

  // The reader's: U, in shared memory, past the token; |U|^2 into squares[2].
  KALMANET_KERNEL void update_u(bool is_zero) {
    group.each([&](int thread, Registers& r) {
      float v[4], squares[4] = {};
      this->weighted_values(thread, v);
      KALMANET_UNROLL
      for (int i0 = 0; i0 < L::kUSteps; i0 += 4) {
        float k[4];
        load4(shared.k + thread / 32 * L::kUSteps + i0, k);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          float (&u)[4] = r.h[i0 / 4][i];
          float* const at = shared.u + L::u_begin(thread) + (i0 + i) * L::kDim;
          if (is_zero) {
            u[0] = u[1] = u[2] = u[3] = 0;
          } else {
            load4(at, u);
          }
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            u[j] = fused(now.u_decay, u[j], k[i] * v[j]);
            squares[j] += u[j] * u[j];
          }
          store4(at, u);
        }
      }
      before_bulk();
      r.squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    });
    this->put_squares(2, [](Registers& r) -> float& { return r.squares; });
    group.barrier();
  }
  // o, stored from element `at` on.
  KALMANET_KERNEL void read_u(int64_t at) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) r.o[j] = 0;
      KALMANET_UNROLL
      for (int i0 = 0; i0 < L::kUSteps; i0 += 4) {
        float m[4];
        load4(shared.m + thread / 32 * L::kUSteps + i0, m);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) r.o[j] += m[i] * r.h[i0 / 4][i][j];
        }
      }
      store4(shared.partial[thread / 32] + thread % 32 * 4, r.o);
    });
    this->put_outputs(at);
  }

  template <class F>
  KALMANET_KERNEL void by_one_thread(F&& f) {
    group.each([&](int thread, Registers&) {
      if (thread == 0) f();
    });
  }
};

// Whether run_step_wide does a job: every block has a multiprocessor to itself. (A block of the
// step kernel leaves room for a second one, which is what many sequences need.)
inline bool is_wide(const GkaJob& job, int multiprocessors) {
  return is_one_token(job) && job.num_pieces * job.H <= multiprocessors;
}

// Which half a thread belongs to; the CPU plays both, one after the other.
enum class StepRole { both, solver, reader };

// The work of block (sequence, head): one token that is no draft's. `barrier`: of both halves.
// `wait`: for what the kernel before has written; before it comes what needs nothing of that.
// `reader_first`: the order of the two on the CPU.
template <StepRole kRole, class Group, class Barrier, class Wait>
KALMANET_KERNEL void run_step_wide(Group& solver_group, Group& reader_group, StepWideShared& shared,
                                   const GkaJob& job, int64_t sequence, int64_t head,
                                   Barrier&& barrier, Wait&& wait, bool reader_first = false) {
  StepHalf<Group> solver{{{{solver_group, shared}, job, sequence, head}}};
  StepHalf<Group> reader{{{{reader_group, shared}, job, sequence, head}}};
  const auto side_by_side = [&](auto&& solves, auto&& reads) {
    if constexpr (kRole == StepRole::reader) {
      reads();
    } else if constexpr (kRole == StepRole::solver) {
      solves();
    } else {
      if (reader_first) reads();
      solves();
      if (!reader_first) reads();
    }
    barrier();
  };
  int64_t row = sequence;
  const float* h_from = nullptr;
  if (kRole != StepRole::reader) {
    h_from = kept(dense_state(job.h0, row, head));
    solver.find_place();
  }
  wait();
  if (job.slots != nullptr) {
    row = state_row(job, sequence);
    if (!has_states(job, row)) {
      if (kRole != StepRole::solver) {
        answer_nothing(reader_group, job, {sequence, 0, 1, 0, 1, 1, 0}, head, row);
      }
      return;
    }
    h_from = dense_state(job.h0, row, head);
  }
  side_by_side([&] { solver.load_h(h_from); },
               [&] {
                 reader.template fetch<false>(0);
                 reader.by_one_thread([&] { begin_arrival(&shared.u_arrival); });
                 reader.template put_token<false>();
               });
  int num_iter = 0;
  side_by_side(
      [&] {
        solver.read_scalars();
        num_iter = solver.count_steps();
        solver.template update_h<true>(shared.h);
      },
      [&] { reader.read_scalars(); });
  int64_t o_at = 0;
  side_by_side([&] { solver.template solve<false>(solver.norm(), num_iter, false); },
               [&] {
                 const float* const from = dense_state(job.u0, row, head);
                 float* const h_to = dense_state(job.h_final, row, head);
                 float* const u_to = dense_state(job.u_final, row, head);
                 reader.by_one_thread([&] {
                   if (from != nullptr)
                     load_bulk(shared.u, from, sizeof(shared.u), &shared.u_arrival);
                   if (h_to != nullptr) store_bulk(h_to, shared.h, sizeof(shared.h));
                 });
                 if (from != nullptr) wait_arrival(&shared.u_arrival);
                 reader.update_u(from == nullptr);
                 reader.by_one_thread([&] {
                   if (u_to != nullptr) store_bulk(u_to, shared.u, sizeof(shared.u));
                 });
                 o_at = opaque(offset_of(job.o, sequence, 0, head));
               });
  side_by_side(
      [&] {
        solver.put_solution_squares();
        solver.group.barrier();
        solver.by_one_thread([&] { shared.least_o2 = solver.least_o2(); });
      },
      [&] { reader.read_u(o_at); });
  if ((kRole == StepRole::reader ? reader : solver).amplified(shared.least_o2)) {
    side_by_side([&] { solver.solve64(solver.norm(), num_iter); }, [] {});
    if (kRole != StepRole::solver) reader.read_out64(0, false);
  }
  if (kRole != StepRole::solver) reader.by_one_thread([] { wait_bulk_stores(); });
}

}  // namespace kalmanet::cuda
