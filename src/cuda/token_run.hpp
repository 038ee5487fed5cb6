// The work of a block of the token kernel.
#pragma once

#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

// Whether a job's pieces are run_tokens<.., true>'s: with slots or drafts.
inline bool has_drafts(const GkaJob& job) {
  return job.slots != nullptr || job.accepted != nullptr || job.is_draft;
}

// The work of block (piece_index, head).
template <class S, int KP, bool kDrafts, class Group>
KALMANET_KERNEL void run_tokens(Group& group, char* shared_memory, const GkaJob& job,
                                int64_t piece_index, int64_t head) {
  if (is_done(job, piece_index, head)) return;
  Piece piece = piece_of(job, piece_index);
  int64_t accepted = 0;
  if constexpr (kDrafts) {
    accepted = accepted_of(job, piece.sequence);
    const int64_t row = state_row(job, piece.sequence);
    if (!has_states(job, row)) {
      answer_nothing(group, job, piece, head, row);
      return;
    }
    piece.sequence = static_cast<int32_t>(row);
  }
  const TokenMemory<S, KP> memory(shared_memory, job, piece_index, head);
  StateView<S> u = state_view<S>(job.u_final, piece.sequence, head);
  if (!piece.last || u.data == nullptr) u = {memory.u, job.V, 1};
  TokenBody<Group, S, KP> body{
      group,
      memory.shared,
      job,
      piece,
      head,
      u,
      {{group, memory.shared, memory.spilled, memory.parked, memory.factor}}};
  body.template run<kDrafts>(accepted, memory.u);
}

}  // namespace kalmanet::cuda
