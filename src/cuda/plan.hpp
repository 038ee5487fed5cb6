// From a validated problem to a kernel's job: pieces, strides, the workspace.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.hpp"
#include "cuda/job.hpp"

namespace kalmanet::cuda {

// The problem's sequences in pieces of so many tokens (an empty sequence is one empty piece). Slots
// number them; a sequence's pieces follow one another.
std::vector<Piece> pieces_of(const core::GkaProblem& problem, bool whole,
                             int64_t tokens = kSegmentTokens);

// Whether pieces_of is what GkaJob::pieces == nullptr stands for.
bool are_rows(const core::GkaProblem& problem, const std::vector<Piece>& pieces);

// Whether pairs of a view's elements, of 16 bits, can be read and written as 4 bytes.
bool in_pairs(const ConstView& view);
// Eight as 16 bytes.
bool in_vectors(const ConstView& view);

// Whether K and V are what the matrix-unit kernels know (any_rows.hpp).
bool have_chunk_dims(const core::GkaProblem& problem);
// Whether the matrix-unit kernels compute the problem, as far as its tensors say.
bool fits_chunks(const core::GkaProblem& problem, const GkaOutputs& outputs);

// For them: pieces_of (not `always`: the token kernel does what is left over), then the
// first tokens of sequences that start from nothing, whose slots are -1: the forward's kernel of
// first tokens (first_body.hpp), the backward's token kernel.
std::vector<Piece> chunk_pieces_of(const core::GkaProblem& problem);
int64_t num_chunk_pieces(const std::vector<Piece>& pieces);
int64_t chunk_scratch_bytes();  // a block

// Whether heads of such a problem can be of short memory (short_plan.hpp): bfloat16 of K = V = 128,
// and one gate for H and U.
bool may_be_short(const core::GkaProblem& problem);
// Of the plans and what lies behind them.
int64_t short_plan_bytes(int64_t num_pieces, int64_t heads);

Array array_of(const ConstView& view);

// All but pieces and workspace.
GkaJob job_of(const core::GkaProblem& problem, const GkaOutputs& outputs);

// Whether the step kernel (step_kernel.hpp) does a step; the token kernel does the others.
bool fits_step(const core::GkaProblem& problem, const GkaOutputs& outputs);
// From how many tokens on they are done at once. One H200, batch 128, 32 heads: two one after the
// other take 0.449 ms; three, and four, at once 0.445 and 0.450.
inline constexpr int64_t kFewestTokensAtOnce = 3;
// Whether, of those, the kernel of a few tokens at once does it (few_kernel.hpp).
bool fits_few(const core::GkaProblem& problem, const GkaOutputs& outputs);
// Its job. direct is so many of Chebyshev's steps that truncation is half the tolerance, or half of
// what a 16-bit o can show: truncation is relative to x's own components, which U does not magnify,
// and 2^-12 is a sixteenth of what rounding o to bfloat16 costs, half of float16's.
GkaJob step_job_of(const core::GkaProblem& problem, const GkaOutputs& outputs);
double direct_tolerance(const core::GkaProblem& problem);
int direct_steps(const core::GkaProblem& problem);
// Beyond these a Cholesky factorisation a token (the token kernel's) is the cheaper one: 157 us on
// one H100 beside 0.16 us a step.
inline constexpr int kMostDirectSteps = 1000;

// Bytes of GkaJob::states and ::decays.
int64_t states_bytes(const core::GkaProblem& problem, int64_t num_pieces);
int64_t decays_bytes(const core::GkaProblem& problem, int64_t num_pieces);

}  // namespace kalmanet::cuda
