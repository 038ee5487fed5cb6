// The decode step where a launch has fewer blocks than the GPU has multiprocessors, and latency is
// all that counts: 512 threads a sequence and head, in two halves. One has H in registers and
// solves; the other brings the token, keeps U in registers, updates and stores it meanwhile, and
// reads it out once there is an m. H goes back by the copy engine.
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
};

// What a half does. In the reader's, registers.h holds U: row u_begin + i is h[i / 4][i % 4].
template <class Group>
struct StepHalf : StepBody<Group> {
  using Base = StepBody<Group>;
  using Base::group, Base::shared, Base::job, Base::now, Base::u_to;
  using L = StepLayout;
  using Registers = StepRegisters;

  // The solver's: its part of H to `to`, for the copy engine.
  KALMANET_KERNEL void put_h(float* to) {
    group.each([&](int thread, Registers& r) {
      const int at = L::row(thread) * L::kDim;
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        KALMANET_UNROLL
        for (int i = 0; i < L::kRows; ++i) {
          store4(to + at + L::column(thread, p) + i * L::kDim, r.h[p][i]);
        }
      }
      before_bulk();
    });
  }

  // The reader's.
  KALMANET_KERNEL void load_u(const float* from) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < L::kUSteps; ++i) {
        float(&u)[4] = r.h[i / 4][i % 4];
        if (from != nullptr) {
          load4(from + L::u_begin(thread) + i * L::kDim, u);
        } else {
          u[0] = u[1] = u[2] = u[3] = 0;
        }
      }
    });
  }
  KALMANET_KERNEL void put_u(float* to) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < L::kUSteps; ++i) {
        store4(to + L::u_begin(thread) + i * L::kDim, r.h[i / 4][i % 4]);
      }
    });
  }
  // U past the token, and where it belongs; |U|^2 into squares[2].
  KALMANET_KERNEL void update_u() {
    group.each([&](int thread, Registers& r) {
      float v[4], squares[4] = {};
      this->weighted_values(thread, v);
      KALMANET_UNROLL
      for (int i0 = 0; i0 < L::kUSteps; i0 += 4) {
        float k[4];
        load4(shared.k + thread / 32 * L::kUSteps + i0, k);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            float& u = r.h[i0 / 4][i][j];
            u = fused(now.u_decay, u, k[i] * v[j]);
            squares[j] += u * u;
          }
        }
      }
      r.squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    });
    if (u_to != nullptr) put_u(u_to);
    this->put_squares(2, [](Registers& r) -> float& { return r.squares; });
  }
  KALMANET_KERNEL void read_u(int64_t t) {
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
    this->put_outputs(t);
  }
};

// Which half a thread belongs to; the CPU plays both, one after the other.
enum class StepRole { both, solver, reader };

// The work of block (sequence, head): one token that is no draft's. `barrier`: of both halves.
// `reader_first`: the order of the two on the CPU.
template <StepRole kRole, class Group, class Barrier>
KALMANET_KERNEL void run_step_wide(Group& solver_group, Group& reader_group, StepWideShared& shared,
                                   const GkaJob& job, int64_t sequence, int64_t head,
                                   Barrier&& barrier, bool reader_first = false) {
  const int64_t row = state_row(job, sequence);
  if (!has_states(job, row)) {
    if (kRole != StepRole::solver) {
      answer_nothing(reader_group, job, {sequence, 0, 1, 0, 1, 1, 0}, head, row);
    }
    return;
  }
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
  };
  float* const h_to = dense_state(job.h_final, row, head);
  float f = 0;
  int num_iter = 0;
  side_by_side([&] { solver.load_h(dense_state(job.h0, row, head)); },
               [&] {
                 reader.template fetch<false>(0);
                 reader.template put_token<false>();
               });
  barrier();
  side_by_side(
      [&] {
        solver.read_scalars();
        num_iter = solver.count_steps();
        f = solver.update_h([&] {
          if (h_to != nullptr) solver.put_h(shared.h);
        });
        solver.group.each([&](int thread, StepRegisters&) {
          if (thread == 0 && h_to != nullptr) store_bulk(h_to, shared.h, sizeof(shared.h));
        });
        solver.template solve<false>(f, num_iter, false);
      },
      [&] {
        reader.load_u(dense_state(job.u0, row, head));
        reader.u_to = dense_state(job.u_final, row, head);
        reader.read_scalars();
        reader.update_u();
      });
  barrier();
  side_by_side([] {}, [&] { reader.read_u(0); });
  barrier();
  bool ill = false;
  side_by_side([&] { ill = solver.amplified(); }, [&] { ill = reader.amplified(); });
  if (ill) {
    side_by_side([&] { solver.solve64(f, num_iter); }, [&] { reader.put_u(shared.u); });
    barrier();
    side_by_side([] {}, [&] { reader.read_out64(0, false); });
  }
  side_by_side(
      [&] {
        solver.group.each([&](int thread, StepRegisters&) {
          if (thread == 0) wait_bulk();
        });
      },
      [] {});
}

}  // namespace kalmanet::cuda
