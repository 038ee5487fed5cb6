// From a validated problem to a kernel's job.
#include "cuda/plan.hpp"

#include <algorithm>
#include <cstdint>

#include "core/half.hpp"
#include "cuda/chunk_body.hpp"
#include "cuda/step_kernel.hpp"

namespace kalmanet::cuda {

Array array_of(const ConstView& view) {
  Array a;
  a.data = const_cast<void*>(view.data);  // of an output, or never written
  a.dtype = view.dtype;
  if (view.rank == 4) a.width = static_cast<int32_t>(view.size[3]);
  for (int d = 0; d < view.rank; ++d) a.stride[d] = view.stride[d];
  return a;
}

bool in_pairs(const ConstView& view) {
  return core::is_half(view.dtype) && view.stride[3] == 1 && view.stride[0] % 2 == 0 &&
         view.stride[1] % 2 == 0 && view.stride[2] % 2 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 4 == 0;
}

bool in_vectors(const ConstView& view) {
  return core::is_half(view.dtype) && view.stride[3] == 1 && view.stride[0] % 8 == 0 &&
         view.stride[1] % 8 == 0 && view.stride[2] % 8 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

bool have_chunk_dims(const core::GkaProblem& problem) {
  const auto fits = [](int64_t n) { return n > 0 && n <= ChunkLayout::kDim && n % 8 == 0; };
  return fits(problem.K) && fits(problem.V);
}

bool fits_chunks(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  const GkaInputs& in = problem.inputs;
  return have_chunk_dims(problem) &&
         ((problem.options.solver == Solver::chebyshev && problem.dtype == DType::bfloat16) ||
          problem.options.solver == Solver::direct) &&
         !outputs.x.defined() && !outputs.residual.defined() && in_vectors(in.q) &&
         in_vectors(in.k) && in_vectors(in.v) && in_vectors(outputs.o);
}

std::vector<Piece> chunk_pieces_of(const core::GkaProblem& problem) {
  std::vector<Piece> pieces = pieces_of(problem, false);
  for (Piece& piece : pieces) piece.always = 0;
  if (problem.inputs.h0.defined()) return pieces;
  const size_t count = pieces.size();
  for (size_t i = 0; i < count; ++i) {
    Piece piece = pieces[i];
    if (piece.first == 0 || piece.begin == piece.end) continue;
    piece.end = std::min(piece.end, piece.begin + kExactTokens);
    piece.last = 0;
    piece.slot = -1;
    piece.always = 1;
    pieces.push_back(piece);
  }
  return pieces;
}

int64_t num_chunk_pieces(const std::vector<Piece>& pieces) {
  return std::count_if(pieces.begin(), pieces.end(), [](const Piece& p) { return p.slot >= 0; });
}

int64_t chunk_scratch_bytes() {
  return 2 * ChunkLayout::kDim * ChunkLayout::kDim * static_cast<int64_t>(sizeof(float));
}

bool may_be_short(const core::GkaProblem& problem) {
  const ConstView &g = problem.inputs.g, &gk = problem.inputs.gk;
  const bool fits = problem.K == ChunkLayout::kDim && problem.V == ChunkLayout::kDim &&
                    problem.dtype == DType::bfloat16;
  return fits && gk.defined() && g.data == gk.data && g.dtype == gk.dtype &&
         std::equal(g.stride.begin(), g.stride.begin() + 3, gk.stride.begin());
}

int64_t short_plan_bytes(int64_t num_pieces, int64_t heads) {
  return num_pieces * heads * static_cast<int64_t>(sizeof(ShortPlan) + 2 * sizeof(int32_t)) +
         heads * static_cast<int64_t>(sizeof(int32_t));
}

std::vector<Piece> pieces_of(const core::GkaProblem& problem, bool whole, int64_t tokens) {
  std::vector<Piece> pieces;
  for (const core::Sequence& sequence : problem.sequences) {
    int64_t begin = sequence.begin;
    do {
      const int64_t end = whole || sequence.end - begin <= tokens ? sequence.end : begin + tokens;
      pieces.push_back({sequence.row, begin, end, static_cast<int32_t>(sequence.index),
                        begin == sequence.begin, end == sequence.end,
                        static_cast<int32_t>(pieces.size()), 1});
      begin = end;
    } while (begin < sequence.end);
  }
  return pieces;
}

bool are_rows(const core::GkaProblem& problem, const std::vector<Piece>& pieces) {
  return problem.inputs.cu_seqlens.empty() && pieces.size() == problem.sequences.size();
}

GkaJob job_of(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  const GkaInputs& in = problem.inputs;
  GkaJob job;
  job.H = problem.H;
  job.K = problem.K;
  job.V = problem.V;
  job.T = problem.T;
  job.q_group = problem.q_group;
  job.k_group = problem.k_group;
  job.v_group = problem.v_group;
  job.q = array_of(in.q);
  job.k = array_of(in.k);
  job.v = array_of(in.v);
  job.g = array_of(in.g);
  job.gk = array_of(in.gk);
  job.alpha = array_of(in.alpha);
  job.beta = array_of(in.beta);
  job.ridge = array_of(in.ridge_ratio);
  job.h0 = array_of(in.h0);
  job.u0 = array_of(in.u0);
  job.o = array_of(outputs.o);
  job.x = array_of(outputs.x);
  job.residual = array_of(outputs.residual);
  job.h_final = array_of(outputs.h_final);
  job.u_final = array_of(outputs.u_final);
  job.scale = problem.scale;
  job.ridge_ratio = problem.options.ridge_ratio;
  job.tolerance = problem.options.tolerance;
  job.num_iter = problem.options.num_iter;
  job.direct = problem.options.solver == Solver::direct;
  const GkaDraft& draft = in.last_draft;
  job.slots = in.slots.empty() ? nullptr : in.slots.data();
  job.num_slots = problem.num_states;
  job.draft_k = array_of(draft.k);
  job.draft_v = array_of(draft.v);
  job.draft_g = array_of(draft.g);
  job.draft_gk = array_of(draft.gk);
  job.draft_beta = array_of(draft.beta);
  job.accepted = in.accepted.empty() ? nullptr : in.accepted.data();
  job.num_drafted = draft.k.rank == 4 ? draft.k.size[1] : 0;
  job.is_draft = in.is_draft;
  return job;
}

bool fits_step(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  const GkaInputs& in = problem.inputs;
  const auto is_dense = [](const ConstView& state) {
    return !state.defined() || (state.stride[3] == 1 && state.stride[0] % 4 == 0 &&
                                state.stride[1] % 4 == 0 && state.stride[2] == StepLayout::kDim &&
                                reinterpret_cast<uintptr_t>(state.data) % 16 == 0);
  };
  if (problem.K != StepLayout::kDim || problem.V != StepLayout::kDim ||
      problem.dtype == DType::float64 || problem.T == 0 || !in.cu_seqlens.empty() ||
      problem.B > 65535 || outputs.x.defined() || outputs.residual.defined()) {
    return false;
  }
  if (problem.options.solver == Solver::direct && !in.ridge_ratio.defined() &&
      direct_steps(problem) > kMostDirectSteps) {
    return false;
  }
  return is_dense(in.h0) && is_dense(in.u0) && is_dense(outputs.h_final) &&
         is_dense(outputs.u_final);
}

bool fits_few(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  const auto in_fours = [](const ConstView& view) {
    return !view.defined() ||
           (view.stride[3] == 1 && view.stride[0] % 4 == 0 && view.stride[1] % 4 == 0 &&
            view.stride[2] % 4 == 0 && reinterpret_cast<uintptr_t>(view.data) % 8 == 0);
  };
  const GkaInputs& in = problem.inputs;
  return problem.T >= kFewestTokensAtOnce && core::is_half(problem.dtype) && in_fours(in.q) &&
         in_fours(in.k) && in_fours(in.v) && in_fours(in.last_draft.k) &&
         in_fours(in.last_draft.v) &&
         (!problem.inputs.is_draft || (outputs.h_final.defined() && outputs.u_final.defined()));
}

double direct_tolerance(const core::GkaProblem& problem) {
  const double tolerance = problem.options.tolerance / 2;
  return core::is_half(problem.dtype) ? std::max(tolerance, 0x1p-13) : tolerance;
}

int direct_steps(const core::GkaProblem& problem) {
  return chebyshev_num_iter(problem.options.ridge_ratio, direct_tolerance(problem));
}

GkaJob step_job_of(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  GkaJob job = job_of(problem, outputs);
  job.num_pieces = problem.B;
  const Array own[] = {job.gk, job.g, job.beta, job.alpha, job.ridge};
  const Array drafted[] = {job.draft_gk, job.draft_g, job.draft_beta, {}, {}};
  std::copy(std::begin(own), std::end(own), job.scalars[0]);
  std::copy(std::begin(drafted), std::end(drafted), job.scalars[1]);
  if (!job.direct) return job;
  job.direct = false;
  job.tolerance = direct_tolerance(problem);
  job.num_iter = problem.inputs.ridge_ratio.defined() ? 0 : direct_steps(problem);
  return job;
}

int64_t states_bytes(const core::GkaProblem& problem, int64_t num_pieces) {
  return num_pieces * problem.H * problem.K * (problem.K + problem.V) *
         size_of(core::state_dtype(problem));
}

int64_t decays_bytes(const core::GkaProblem& problem, int64_t num_pieces) {
  return num_pieces * problem.H * 2 * static_cast<int64_t>(sizeof(double));
}

}  // namespace kalmanet::cuda
