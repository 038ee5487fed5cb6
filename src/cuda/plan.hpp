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

// Whether pairs of a view's elements, bfloat16, can be read and written as 4 bytes.
bool in_pairs(const ConstView& view);
// Eight as 16 bytes.
bool in_vectors(const ConstView& view);

// Whether the matrix-unit kernels compute the problem, as far as its tensors say.
bool fits_chunks(const core::GkaProblem& problem, const GkaOutputs& outputs);

// For them: pieces_of (not `always`: the token kernel does what is left over), then the
// first tokens of sequences that start from nothing, whose slots are -1: the forward's kernel of
// first tokens (first_body.hpp), the backward's token kernel.
std::vector<Piece> chunk_pieces_of(const core::GkaProblem& problem);
int64_t num_chunk_pieces(const std::vector<Piece>& pieces);
int64_t chunk_scratch_bytes();  // a block

Array array_of(const ConstView& view);

// All but pieces and workspace.
GkaJob job_of(const core::GkaProblem& problem, const GkaOutputs& outputs);

// Bytes of GkaJob::states and ::decays.
int64_t states_bytes(const core::GkaProblem& problem, int64_t num_pieces);
int64_t decays_bytes(const core::GkaProblem& problem, int64_t num_pieces);

}  // namespace kalmanet::cuda
