// One interface over the solvers for a chunk: prepare once, solve for any number of right-hand
// sides (the forward has one, the backward two).
#pragma once

#include <type_traits>

#include "cpu/cg.hpp"
#include "cpu/chebyshev.hpp"
#include "cpu/chunk.hpp"
#include "cpu/direct.hpp"
#include "cpu/direct_plan.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

template <class Vec>
struct ChunkSolver {
  using Elem = typename Vec::Elem;
  Solver solver;
  DirectBlock<Vec> block;  // direct
  Elem* extra[2];          // cg
  ChunkPlan plan;
  const Bf16Kernels* bf16 = nullptr;  // Chebyshev with products in bfloat16
  float* words = nullptr;
};

// `capacity`: chunks a block may have, 1 where there is no more than one.
template <class Vec, class S>
void carve_solver(ChunkSolver<Vec>& s, const HeadInputs& in, int64_t capacity, Arena<S>& arena) {
  s.solver = in.solver;
  using Elem = typename Vec::Elem;
  constexpr int64_t kEach = sizeof(Elem) / sizeof(S);
  if constexpr (std::is_same_v<Elem, float>) {
    s.bf16 = in.bf16;
    if (s.bf16 != nullptr) s.words = arena.take(bf16_floats(in.K));
  }
  if (by_blocks(in.solver)) {
    carve_direct<Vec>(s.block, in.K, capacity, arena);
  } else if (in.solver == Solver::cg) {
    for (auto& p : s.extra) {
      p = reinterpret_cast<Elem*>(arena.take(kEach * padded(in.K) * kLanes));
    }
  }
}

template <class Vec>
void count_steps(SolverCount* count, int steps) {
  if (count == nullptr) return;
  if (count->chunks == 0 || steps < count->min) count->min = steps;
  if (steps > count->max) count->max = steps;
  ++count->chunks;
}

// Call once a chunk, after its norms. `window_chunks`: from this chunk to its window's end
// (direct_plan.hpp). `count` may be null.
template <class Vec, class S>
void prepare_solver(ChunkSolver<Vec>& s, const Chunk<S>& c, const HeadInputs& in, const S* h,
                    bool h_is_zero, int64_t window_chunks, SolverCount* count) {
  if (!by_blocks(s.solver)) {
    s.plan.steps = in.num_iter != 0 ? in.num_iter : chebyshev_steps<Vec>(c, in.tolerance);
    count_steps<Vec>(count, s.plan.steps);
    if constexpr (std::is_same_v<typename Vec::Elem, float>) {
      if (s.bf16 != nullptr) {
        s.bf16->prepare(c, h, h_is_zero, s.words);
        if (count != nullptr) ++count->bf16_chunks;
      }
    }
    return;
  }
  DirectBlock<Vec>& d = s.block;
  if (window_chunks == d.capacity) d.active = false;  // a window begins
  s.plan = plan_direct<Vec>(c, d, h_is_zero, window_chunks, in.tolerance);
  count_steps<Vec>(count, s.plan.way == ChunkWay::zero ? 0 : s.plan.steps);
  if (s.plan.way == ChunkWay::new_block) start_block<Vec>(d, h, h_is_zero, s.plan.mu);
  if (s.plan.way == ChunkWay::new_block || s.plan.way == ChunkWay::continue_block) {
    append_chunk<Vec>(d, c);
    load_shifts<Vec>(d, c);
    d.decay *= c.h_decay->since_start64[c.n - 1];
  } else {
    d.active = false;
  }
  if (count != nullptr) {
    count->factorizations += s.plan.way == ChunkWay::new_block && !h_is_zero;
    count->direct_chunks += s.plan.way != ChunkWay::chebyshev;
  }
}

// Solves (H_t + lambda_t I) x_t = b_t for every token of the prepared chunk. b, x, other: lanes
// [Kp][t]; returns which of x and other holds the solution.
// `corrected`: direct, with corrections where they are needed.
template <class Vec, class B, class S>
typename Vec::Elem* solve_chunk_system(const ChunkSolver<Vec>& s, const Chunk<S>& c, const S* h,
                                       bool h_is_zero, const B* b, typename Vec::Elem* x,
                                       typename Vec::Elem* other, bool corrected) {
  if constexpr (std::is_same_v<typename Vec::Elem, float>) {
    if (s.bf16 != nullptr) return s.bf16->solve(c, h_is_zero, s.words, b, s.plan.steps, x, other);
  }
  if (s.solver == Solver::cg) {
    conjugate_gradients<Vec>(c, h, h_is_zero, b, s.plan.steps, x, other, s.extra[0], s.extra[1]);
    return x;
  }
  if (s.solver == Solver::chebyshev || s.plan.way == ChunkWay::chebyshev) {
    return chebyshev<Vec>(c, h, h_is_zero, b, s.plan.steps, x, other);
  }
  if (s.plan.way == ChunkWay::zero) {
    for (int64_t i = 0; i < c.Kp * kLanes; ++i) x[i] = 0;
    return x;
  }
  return solve_direct<Vec>(s.block, c, h, h_is_zero, b, s.plan.steps, x, other, corrected);
}

}  // namespace kalmanet::cpu
