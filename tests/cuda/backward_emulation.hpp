// The backward's kernels' bodies run by the CPU (emulation.hpp), in the order of the backend.
#pragma once

#include "cuda/backward_adjoint_chunk.hpp"
#include "cuda/backward_chunk_body.hpp"
#include "cuda/backward_direct_body.hpp"
#include "cuda/backward_first_body.hpp"
#include "cuda/backward_gradient_body.hpp"
#include "cuda/backward_plan.hpp"
#include "cuda/backward_short_body.hpp"
#include "cuda/backward_solve_body.hpp"
#include "cuda/backward_tile_values.hpp"
#include "cuda/emulation.hpp"

namespace kalmanet::cuda {

template <class S, int KP>
void emulate_backward_solve(BackwardJob job, const Emulation& how) {
  GkaJob& in = job.in;
  in.spill_is_shared = how.spill_is_shared && TokenLayout<S, KP>::kSpilled > 0;
  in.scratch_bytes = token_scratch_bytes<S, KP>(in.K, in.V, in.direct, in.spill_is_shared);
  Poisoned scratch(in.scratch_bytes * in.num_pieces * in.H);
  in.scratch = scratch.data();
  for (int64_t piece = 0; piece < in.num_pieces; ++piece) {
    for (int64_t head = 0; head < in.H; ++head) {
      Poisoned shared(token_shared_bytes<S, KP>(in.direct, in.spill_is_shared));
      HostGroup<TokenRegisters<S, KP>> group(TokenLayout<S, KP>::kThreads, how.backwards);
      run_backward_solve<S, KP>(group, shared.data(), job, piece, head);
    }
  }
}

inline void emulate_backward_first(const BackwardJob& job, const Emulation& how,
                                   bool left_over = false) {
  for (int64_t piece = 0; piece < job.in.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.in.H; ++head) {
      Poisoned shared(backward_first_bytes(job.in.K, job.in.V));
      HostGroup<BackwardFirstRegisters> group(BackwardFirstLayout::kThreads, how.backwards);
      run_backward_first(group, shared.data(), job, piece, head, left_over);
    }
  }
}

template <class S>
void emulate_adjoints(const BackwardJob& job, const Emulation& how) {
  const int64_t K = job.in.K, V = job.in.V;
  for (int64_t piece = 0; piece < job.in.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.in.H; ++head) {
      for (int64_t tile = 0; tile < AdjointLayout::tiles(K, V); ++tile) {
        Poisoned shared(sizeof(AdjointShared<S>));
        HostGroup<AdjointRegisters<S>> group(AdjointLayout::kThreads, how.backwards);
        run_adjoint_segment<S>(group, *reinterpret_cast<AdjointShared<S>*>(shared.data()), job,
                               piece, head, tile);
      }
    }
  }
  for (int64_t piece = 0; piece < job.in.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.in.H; ++head) {
      if (K % 4 == 0 && V % 4 == 0) {
        for (int64_t e = 0; e < K * (K + V); e += 4) run_adjoint_sums<S, 4>(job, piece, head, e);
      } else {
        for (int64_t e = 0; e < K * (K + V); ++e) run_adjoint_sums<S, 1>(job, piece, head, e);
      }
    }
  }
}

template <class S>
void emulate_gradients(BackwardJob job, int64_t blocks, const Emulation& how) {
  job.block_bytes = GradientLayout<S>::block_bytes(job.in.K, job.in.V);
  Poisoned scratch(blocks * job.block_bytes);
  job.block_scratch = scratch.data();
  for (int64_t block = 0; block < blocks; ++block) {
    Poisoned shared(GradientLanes<S>::shared_bytes(job.in.K, job.in.V));
    HostGroup<GradientRegisters<S>> group(GradientLayout<S>::kThreads, how.backwards);
    run_gradients<S>(group, shared.data(), job, block, blocks);
  }
}

template <class S>
void emulate_head_sums(const BackwardJob& job, int64_t B) {
  const auto sum = [&](const Array& gradient, const void* parts, int64_t group, int64_t width) {
    if (parts == nullptr) return;
    for (int64_t row = 0; row < B; ++row) {
      for (int64_t t = 0; t < job.in.T; ++t) {
        for (int64_t head = 0; head < job.in.H / group; ++head) {
          for (int64_t c = 0; c < width; ++c) {
            run_head_sum<S>(job, gradient, parts, group, width, row, t, head, c);
          }
        }
      }
    }
  };
  sum(job.dq, job.dq_parts, job.in.q_group, job.in.K);
  sum(job.dk, job.dk_parts, job.in.k_group, job.in.K);
  sum(job.dv, job.dv_parts, job.in.v_group, job.in.V);
}

// A job's workspace, all of it poisoned.
struct BackwardMemory {
  std::vector<Piece> pieces;
  Poisoned states, decays, adjoints, x, z, w, since, dq_parts, dk_parts, dv_parts;

  BackwardMemory(const core::GkaProblem& problem, BackwardJob& job, bool chunks = false)
      : pieces(backward_pieces_of(problem, chunks)),
        states(states_bytes(problem, count())),
        decays(decays_bytes(problem, count())),
        adjoints(states_bytes(problem, count())),
        x(places(problem) * problem.K * 8),
        z(places(problem) * problem.K * 8),
        w(places(problem) * 8),
        since(places(problem) * 16),
        dq_parts(places(problem) * problem.K * 8),
        dk_parts(places(problem) * problem.K * 8),
        dv_parts(places(problem) * problem.V * 8) {
    job.in.pieces = pieces.data();
    job.in.num_pieces = count();
    job.in.states = states.data();
    job.in.decays = reinterpret_cast<double*>(decays.data());
    job.adjoints = adjoints.data();
    job.x = x.data();
    job.z = z.data();
    job.w = reinterpret_cast<double*>(w.data());
    job.since = reinterpret_cast<double*>(since.data());
    if (problem.q_group > 1 && job.dq.data != nullptr) job.dq_parts = dq_parts.data();
    if (problem.k_group > 1 && job.dk.data != nullptr) job.dk_parts = dk_parts.data();
    if (problem.v_group > 1 && job.dv.data != nullptr) job.dv_parts = dv_parts.data();
  }
  int64_t count() const { return static_cast<int64_t>(pieces.size()); }
  static int64_t places(const core::GkaProblem& p) { return p.B * p.T * p.H; }
};

inline void emulate_backward(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                             const GkaInputGrads& grads, const Emulation& how) {
  BackwardJob job = backward_job_of(problem, output_grads, grads);
  const BackwardMemory memory(problem, job);
  const auto run = [&]<class S>(S) {
    if (memory.count() > problem.N) emulate_segments<S>(job.in, how);
    if (problem.K <= 64) {
      emulate_backward_solve<S, 64>(job, how);
    } else if (problem.K <= 128) {
      emulate_backward_solve<S, 128>(job, how);
    } else {
      emulate_backward_solve<S, 256>(job, how);
    }
    if (sizeof(S) == 4) emulate_backward_first(job, how);
    emulate_adjoints<S>(job, how);
    emulate_gradients<S>(job, how.backwards ? 1 : 3, how);  // any number gives the same bits
    emulate_head_sums<S>(job, problem.B);
  };
  if (problem.dtype == DType::float64) {
    run(double());
  } else {
    run(float());
  }
}

template <bool kAny>
void emulate_backward_chunk_blocks(const BackwardJob& job, const Emulation& how) {
  for (int64_t piece = 0; piece < job.in.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.in.H; ++head) {
      Poisoned shared(sizeof(BackwardChunkShared));
      WithRows<kAny, HostGroup<ChunkRegisters>> group(ChunkLayout::kThreads, how.backwards);
      run_backward_chunks(group, *reinterpret_cast<BackwardChunkShared*>(shared.data()), job, piece,
                          head);
    }
  }
}

template <int kRows>
void emulate_backward_short(const BackwardJob& job, const Emulation& how) {
  const int64_t blocks = how.backwards ? 1 : 3;
  for (int64_t block = 0; block < blocks; ++block) {
    Poisoned shared(sizeof(BackwardShortShared));
    HostGroup<ShortRegisters<kRows, 2>> group(ShortLayout::kThreads, how.backwards);
    run_backward_short<kRows>(group, *reinterpret_cast<BackwardShortShared*>(shared.data()), job,
                              block, blocks);
  }
}

// The same with x and z solved for on matrix units; returns what part of the pieces and heads was
// left over to the token kernel (`is_short`: of short memory).
template <bool kAny>
double emulate_backward_chunks_of(const core::GkaProblem& problem,
                                  const GkaOutputGrads& output_grads, const GkaInputGrads& grads,
                                  const Emulation& how, double* is_short) {
  BackwardJob job = backward_job_of(problem, output_grads, grads);
  const BackwardMemory memory(problem, job, true);
  const int64_t own = memory.count();
  Poisoned scratch(own * problem.H * chunk_scratch_bytes());
  std::vector<int32_t> left_over(static_cast<size_t>(own * problem.H), -1);
  job.in.chunk_scratch = scratch.data();
  job.in.left_over = left_over.data();
  job.in.split = problem.options.arithmetic == Arithmetic::standard;
  if (own > problem.N) {
    emulate_states<kAny>(job.in, how);
    emulate_segment_sums<float>(job.in);
  }
  Poisoned plans(short_plan_bytes(own, problem.H));
  if (may_be_short(problem)) {
    job.in.short_plans = reinterpret_cast<ShortPlan*>(plans.data());
    emulate_short_plan(job.in, true, how);
    emulate_backward_short<1>(job, how);
    emulate_backward_short<2>(job, how);
  }
  if (is_short != nullptr) *is_short = share_of_short(job.in);
  for (int64_t piece = 0; piece < own; ++piece) {
    for (int64_t head = 0; head < problem.H; ++head) {
      if (job.in.direct) {
        Poisoned shared(sizeof(direct32::BackwardDirectShared));
        WithRows<kAny, HostGroup<direct32::BackwardDirectRegisters>> group(
            direct32::DirectLayout::kThreads, how.backwards);
        direct32::run_backward_direct(
            group, *reinterpret_cast<direct32::BackwardDirectShared*>(shared.data()), job, piece,
            head);
      }
    }
  }
  if (job.in.direct) emulate_backward_first(job, how);
  if (!job.in.direct || job.in.short_plans != nullptr) {
    emulate_backward_chunk_blocks<kAny>(job, how);
  }
  if (problem.K <= 64) {
    emulate_backward_solve<float, 64>(job, how);
  } else {
    emulate_backward_solve<float, 128>(job, how);
  }
  emulate_backward_first(job, how, job.in.direct);
  for (int64_t i = 0; i < own * problem.H; ++i) {
    Poisoned shared(sizeof(TileShared));
    WithRows<kAny, HostGroup<TileRegisters>> group(TileLayout::kThreads, how.backwards);
    run_tile_adjoints(group, *reinterpret_cast<TileShared*>(shared.data()), job, i / problem.H,
                      i % problem.H);
  }
  emulate_adjoints<float>(job, how);
  const int64_t blocks = how.backwards ? 1 : 3;
  Poisoned states(blocks * 4 * TileLayout::kScratchFloats);
  job.block_scratch = states.data();
  const auto run_tiles = [&]<template <class> class Body>() {
    for (int64_t block = 0; block < blocks; ++block) {
      Poisoned shared(sizeof(TileShared));
      WithRows<kAny, HostGroup<TileRegisters>> group(TileLayout::kThreads, how.backwards);
      run_tile_gradients<Body>(group, *reinterpret_cast<TileShared*>(shared.data()), job, block,
                               blocks);
    }
  };
  run_tiles.template operator()<TileKeys>();
  run_tiles.template operator()<TileValues>();
  emulate_gradients<float>(job, blocks, how);
  emulate_head_sums<float>(job, problem.B);
  double sum = 0;
  for (int32_t e : left_over) sum += e;
  return left_over.empty() ? 0.0 : sum / static_cast<double>(left_over.size());
}

inline double emulate_backward_chunks(const core::GkaProblem& problem,
                                      const GkaOutputGrads& output_grads,
                                      const GkaInputGrads& grads, const Emulation& how,
                                      double* is_short = nullptr) {
  double left_over = 0;
  with_rows(job_of(problem, {}), [&](auto any) {
    left_over = emulate_backward_chunks_of<any>(problem, output_grads, grads, how, is_short);
  });
  return left_over;
}

}  // namespace kalmanet::cuda
