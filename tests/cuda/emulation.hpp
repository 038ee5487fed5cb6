// The CUDA kernels' bodies run by the CPU: the same source, the same index arithmetic, block after
// block and thread after thread (cuda/group.hpp).
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/problem.hpp"
#include "cuda/chunk_body.hpp"
#include "cuda/direct_body.hpp"
#include "cuda/few_body.hpp"
#include "cuda/first_body.hpp"
#include "cuda/hopper_direct_body.hpp"
#include "cuda/hopper_state_body.hpp"
#include "cuda/plan.hpp"
#include "cuda/segment_body.hpp"
#include "cuda/short_body.hpp"
#include "cuda/state_body.hpp"
#include "cuda/step_wide.hpp"
#include "cuda/token_run.hpp"

namespace kalmanet::cuda {

// Memory as a block finds it: full of NaN, at a 128-byte boundary.
class Poisoned {
 public:
  explicit Poisoned(int64_t bytes) : words_(static_cast<size_t>(bytes / 8 + 17), kNaN) {}
  char* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(words_.data());
    return reinterpret_cast<char*>((at + 127) / 128 * 128);
  }

 private:
  static constexpr uint64_t kNaN = 0x7ff800007ff80000;  // as float64 and as two float32
  std::vector<uint64_t> words_;
};

struct Emulation {
  bool backwards = false;        // the order in which a block's threads run
  bool spill_is_shared = false;  // as on a chip with room for it
  bool hopper = false;           // the kernels for that chip, where there are such
  bool wide = false;             // one token by the kernel for few sequences
};

template <class S, int KP>
void emulate_tokens(GkaJob job, const Emulation& how) {
  job.spill_is_shared = how.spill_is_shared && TokenLayout<S, KP>::kSpilled > 0;
  job.scratch_bytes = token_scratch_bytes<S, KP>(job.K, job.V, job.direct, job.spill_is_shared);
  Poisoned scratch(job.scratch_bytes * job.num_pieces * job.H);
  job.scratch = scratch.data();
  for (int64_t piece = 0; piece < job.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.H; ++head) {
      Poisoned shared(token_shared_bytes<S, KP>(job.direct, job.spill_is_shared));
      HostGroup<TokenRegisters<S, KP>> group(TokenLayout<S, KP>::kThreads, how.backwards);
      if (has_drafts(job)) {
        run_tokens<S, KP, true>(group, shared.data(), job, piece, head);
      } else {
        run_tokens<S, KP, false>(group, shared.data(), job, piece, head);
      }
    }
  }
}

template <class S>
void emulate_segment_sums(const GkaJob& job) {
  for (int64_t piece = 0; piece < job.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.H; ++head) {
      const bool wide = job.K % 4 == 0 && job.V % 4 == 0;
      for (int64_t e = 0; e < job.K * (job.K + job.V); e += wide ? 4 : 1) {
        wide ? run_segment_sums<S, 4>(job, piece, head, e)
             : run_segment_sums<S>(job, piece, head, e);
      }
    }
  }
}

template <class S>
void emulate_segments(const GkaJob& job, const Emulation& how) {
  for (int64_t piece = 0; piece < job.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.H; ++head) {
      for (int64_t tile = 0; tile < SegmentLayout::tiles(job.K, job.V); ++tile) {
        Poisoned shared(sizeof(SegmentShared<S>));
        HostGroup<SegmentRegisters<S>> group(SegmentLayout::kThreads, how.backwards);
        run_segment<S>(group, *reinterpret_cast<SegmentShared<S>*>(shared.data()), job, piece, head,
                       tile);
      }
    }
  }
  emulate_segment_sums<S>(job);
}

template <bool kAny>
void emulate_chunk_blocks(const GkaJob& job, const Emulation& how) {
  for (int64_t piece = 0; piece < job.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.H; ++head) {
      if (job.direct && how.hopper) {
        Poisoned shared(sizeof(HopperShared));
        WithRows<kAny, HostGroup<HopperRegisters>> group(HopperLayout::kThreads, how.backwards);
        run_hopper_direct(group, *reinterpret_cast<HopperShared*>(shared.data()), job, piece, head);
        continue;
      }
      if (job.direct) {
        Poisoned shared(sizeof(DirectShared));
        WithRows<kAny, HostGroup<DirectRegisters>> group(DirectLayout::kThreads, how.backwards);
        run_direct(group, *reinterpret_cast<DirectShared*>(shared.data()), job, piece, head);
        continue;
      }
      Poisoned shared(sizeof(ChunkShared));
      WithRows<kAny, HostGroup<ChunkRegisters>> group(ChunkLayout::kThreads, how.backwards);
      run_chunks(group, *reinterpret_cast<ChunkShared*>(shared.data()), job, piece, head);
    }
  }
}

template <bool kAny>
void emulate_states(const GkaJob& job, const Emulation& how) {
  for (int64_t piece = 0; piece < job.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.H; ++head) {
      for (bool u : {false, true}) {
        if (how.hopper) {
          Poisoned shared(sizeof(HopperStateShared));
          WithRows<kAny, HostGroup<HopperStateRegisters>> group(StateLayout::kThreads,
                                                                how.backwards);
          run_hopper_states(group, *reinterpret_cast<HopperStateShared*>(shared.data()), job, piece,
                            head, u);
          continue;
        }
        Poisoned shared(sizeof(StateShared));
        WithRows<kAny, HostGroup<StateRegisters>> group(StateLayout::kThreads, how.backwards);
        run_states(group, *reinterpret_cast<StateShared*>(shared.data()), job, piece, head, u);
      }
    }
  }
}

// Of the pieces after those of the matrix-unit kernels.
inline void emulate_first_tokens(GkaJob job, int64_t num_pieces, const Emulation& how) {
  for (int64_t piece = job.num_pieces; piece < num_pieces; ++piece) {
    for (int64_t head = 0; head < job.H; ++head) {
      Poisoned shared(sizeof(FirstShared));
      HostGroup<FirstRegisters> group(FirstLayout::kThreads, how.backwards);
      run_first(group, *reinterpret_cast<FirstShared*>(shared.data()), job, piece, head);
    }
  }
}

// Which pieces and heads are of short memory: into job.short_plans.
inline void emulate_short_plan(const GkaJob& job, bool backward, const Emulation& how) {
  for (int64_t piece = 0; piece < job.num_pieces; ++piece) {
    for (int64_t head = 0; head < job.H; ++head) {
      Poisoned shared(sizeof(ShortPlanShared));
      HostGroup<ShortPlanRegisters> group(ShortPlanLayout::kThreads, how.backwards);
      run_short_plan(group, *reinterpret_cast<ShortPlanShared*>(shared.data()), job, piece, head,
                     backward);
    }
  }
  Poisoned shared(sizeof(HeadOrderShared));
  HostGroup<HeadOrderRegisters> group(ShortPlanLayout::kThreads, how.backwards);
  run_head_order(group, *reinterpret_cast<HeadOrderShared*>(shared.data()), job);
}

template <int kRows>
void emulate_short(const GkaJob& job, const Emulation& how) {
  const int64_t blocks = how.backwards ? 1 : 3;
  for (int64_t block = 0; block < blocks; ++block) {
    Poisoned shared(sizeof(ShortShared<1>));
    HostGroup<ShortRegisters<kRows, 1>> group(ShortLayout::kThreads, how.backwards);
    run_short<kRows>(group, *reinterpret_cast<ShortShared<1>*>(shared.data()), job, block, blocks);
  }
}

// What part of the pieces and heads are.
inline double share_of_short(const GkaJob& job) {
  if (job.short_plans == nullptr || job.num_pieces == 0) return 0.0;
  double sum = 0;
  for (int64_t i = 0; i < job.num_pieces * job.H; ++i) sum += job.short_plans[i].is_short;
  return sum / static_cast<double>(job.num_pieces * job.H);
}

// The matrix-unit kernels, and the token kernel for what they leave over.
// (returns how much that is, of all pieces and heads; `is_short`, how much is of short memory).
inline double emulate_chunks(const core::GkaProblem& problem, const GkaOutputs& outputs,
                             const Emulation& how, double* is_short = nullptr) {
  const std::vector<Piece> pieces = chunk_pieces_of(problem);
  GkaJob job = job_of(problem, outputs);
  job.pieces = pieces.data();
  job.num_pieces = num_chunk_pieces(pieces);
  Poisoned states(states_bytes(problem, job.num_pieces));
  Poisoned decays(decays_bytes(problem, job.num_pieces));
  Poisoned scratch(job.num_pieces * job.H * chunk_scratch_bytes());
  std::vector<int32_t> left_over(static_cast<size_t>(job.num_pieces * job.H), -1);
  job.states = states.data();
  job.decays = reinterpret_cast<double*>(decays.data());
  job.chunk_scratch = scratch.data();
  job.left_over = left_over.data();
  with_rows(job, [&](auto any) {
    if (job.num_pieces > problem.N) {
      emulate_states<any>(job, how);
      emulate_segment_sums<float>(job);
    }
  });
  Poisoned plans(short_plan_bytes(job.num_pieces, job.H));
  if (may_be_short(problem)) {
    job.short_plans = reinterpret_cast<ShortPlan*>(plans.data());
    emulate_short_plan(job, false, how);
    emulate_short<1>(job, how);
    emulate_short<2>(job, how);
  }
  if (is_short != nullptr) *is_short = share_of_short(job);
  with_rows(job, [&](auto any) { emulate_chunk_blocks<any>(job, how); });
  if (problem.K <= 64) {
    emulate_tokens<float, 64>(job, how);
  } else {
    emulate_tokens<float, 128>(job, how);
  }
  emulate_first_tokens(job, static_cast<int64_t>(pieces.size()), how);
  double sum = 0;
  for (int32_t e : left_over) sum += e;
  return left_over.empty() ? 0.0 : sum / static_cast<double>(left_over.size());
}

// The step kernel, or that of a few tokens at once. Returns how many blocks of the latter were left
// to the former.
inline int64_t emulate_step(const core::GkaProblem& problem, const GkaOutputs& outputs,
                            const Emulation& how) {
  const GkaJob job = step_job_of(problem, outputs);
  const bool few = fits_few(problem, outputs);
  int64_t left = 0;
  for (int64_t sequence = 0; sequence < job.num_pieces; ++sequence) {
    for (int64_t head = 0; head < job.H; ++head) {
      if (few) {
        Poisoned shared(sizeof(FewShared));
        HostGroup<FewRegisters> group(FewLayout::kThreads, how.backwards);
        auto& memory = *reinterpret_cast<FewShared*>(shared.data());
        const bool is_left = is_long(job) ? run_few<true>(group, memory, job, sequence, head)
                                          : run_few<false>(group, memory, job, sequence, head);
        if (!is_left) continue;
        ++left;
      }
      if (how.wide && is_one_token(job)) {
        Poisoned shared(sizeof(StepWideShared));
        HostGroup<StepRegisters> solver(StepLayout::kThreads, how.backwards);
        HostGroup<StepRegisters> reader(StepLayout::kThreads, how.backwards);
        run_step_wide<StepRole::both>(
            solver, reader, *reinterpret_cast<StepWideShared*>(shared.data()), job, sequence, head,
            [] {}, [] {}, how.backwards);
        continue;
      }
      Poisoned shared(sizeof(StepShared));
      HostGroup<StepRegisters> group(StepLayout::kThreads, how.backwards);
      auto& memory = *reinterpret_cast<StepShared*>(shared.data());
      if (is_one_token(job)) {
        run_step<true>(group, memory, job, sequence, head);
      } else {
        run_step<false>(group, memory, job, sequence, head, few && job.is_draft);
      }
    }
  }
  return left;
}

// What the backend does, without a GPU, by the general kernels.
inline void emulate(const core::GkaProblem& problem, const GkaOutputs& outputs, bool whole,
                    const Emulation& how) {
  const std::vector<Piece> pieces = pieces_of(problem, whole);
  GkaJob job = job_of(problem, outputs);
  job.num_pieces = static_cast<int64_t>(pieces.size());
  if (!are_rows(problem, pieces)) job.pieces = pieces.data();
  Poisoned states(states_bytes(problem, job.num_pieces));
  Poisoned decays(decays_bytes(problem, job.num_pieces));
  job.states = states.data();
  job.decays = reinterpret_cast<double*>(decays.data());
  const auto run = [&]<class S>(S) {
    if (pieces.size() > problem.sequences.size()) emulate_segments<S>(job, how);
    if (problem.K <= 64) return emulate_tokens<S, 64>(job, how);
    if (problem.K <= 128) return emulate_tokens<S, 128>(job, how);
    return emulate_tokens<S, 256>(job, how);
  };
  if (problem.dtype == DType::float64) {
    run(double());
  } else {
    run(float());
  }
}

}  // namespace kalmanet::cuda
