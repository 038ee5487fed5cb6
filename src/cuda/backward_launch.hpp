// From the host to the backward's kernels, in the order in which they run.
#pragma once

#include "cuda/backward_job.hpp"
#include "cuda/launch.hpp"

namespace kalmanet::cuda {

// x, z and what follows from them alone: dq, dalpha, d_ridge.
void launch_backward_solve(const BackwardJob& job, bool float64, Stream stream);
// The same in float64 for the first tokens of sequences that start from nothing, after the others.
void launch_backward_first(const BackwardJob& job, Stream stream);
// The same for pieces and heads of short memory, which the kernels on matrix units leave out.
void launch_backward_short(const BackwardJob& job, Stream stream);
// The same on matrix units; what was left over is for launch_backward_solve.
int64_t backward_chunk_shared_bytes();  // of the kernel that takes most
void launch_backward_chunks(const BackwardJob& job, Stream stream);
// The same by the direct solver.
void launch_backward_direct(const BackwardJob& job, Stream stream);
// What each piece adds to the gradients before it, on matrix units where it was not left over;
// launch_adjoints does the rest.
void launch_adjoint_chunks(const BackwardJob& job, Stream stream);
// launch_gradients of all that was not left over.
int64_t gradient_chunk_block_bytes();
void launch_gradient_chunks(const BackwardJob& job, int64_t blocks, Stream stream);
// The gradients of the states after every piece, and of the initial ones.
void launch_adjoints(const BackwardJob& job, bool float64, Stream stream);
// dk, dv, dg, dgk, dbeta; `blocks` of them, each with gradient_block_bytes of scratch memory.
int64_t gradient_block_bytes(bool float64, int64_t K, int64_t V);
void launch_gradients(const BackwardJob& job, bool float64, int64_t blocks, Stream stream);
// Gradients that several heads share, from their parts. B: batch rows.
void launch_head_sums(const BackwardJob& job, int64_t B, bool float64, Stream stream);

}  // namespace kalmanet::cuda
