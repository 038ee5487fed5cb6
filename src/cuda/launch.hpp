// From the host to the kernels: what the .cu files offer to what the C++ compiler compiles.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/job.hpp"

namespace kalmanet::cuda {

// What cudaStream_t points to, to whom does not include CUDA's headers.
using Stream = void*;

struct DeviceInfo {
  int count = 0;           // GPUs
  std::string problem;     // why there is none
  std::string current;     // "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 multiprocessors"
  int64_t max_shared = 0;  // bytes a block
  int multiprocessors = 0;
  int major = 0;  // of the compute capability
};
const DeviceInfo& device_info();  // of the calling thread's device

// Memory in stream order: it may be given back while the work that uses it is still under way. It
// stays with the process for its next calls. Throw Error.
void* allocate(int64_t bytes, Stream stream);
void release(void* memory, Stream stream) noexcept;
// `from` may be changed when this returns.
void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream);
// Waits for the stream, and so brings out the errors of the kernels on it.
void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream);

// What the token kernel needs beside its job, by the states' dtype; fills in job.scratch_bytes and
// job.spill_is_shared. `rows`: every piece is a whole sequence. Returns bytes of scratch over all
// blocks.
int64_t plan_tokens(GkaJob& job, bool float64, bool rows, int64_t max_shared);
void launch_tokens(const GkaJob& job, bool float64, Stream stream);
// The step at full speed (step_kernel.hpp), or a `few` tokens at once (few_kernel.hpp); they need
// nothing beside the job.
int64_t step_shared_bytes();
void launch_step(const GkaJob& job, bool few, Stream stream);
// The states before every piece but a sequence's first.
void launch_segments(const GkaJob& job, bool float64, Stream stream);

// The same, and the outputs, on matrix units; what was left over is for launch_tokens.
int64_t chunk_shared_bytes();
void launch_chunk_states(const GkaJob& job, Stream stream);
void launch_chunks(const GkaJob& job, bool segmented, Stream stream);
int64_t direct_shared_bytes();
// (Called by these.) Those for Hopper on compute capability 9.0 alone.
void launch_direct(const GkaJob& job, Stream stream);
void launch_hopper_states(const GkaJob& job, Stream stream);
void launch_hopper_direct(const GkaJob& job, Stream stream);
// Which pieces and heads are of short memory (short_plan.hpp), after the states before pieces; and
// these in the forward. launch_chunks leaves them out.
void launch_short_plan(const GkaJob& job, bool backward, Stream stream);
void launch_short(const GkaJob& job, Stream stream);
// Blocks of such a kernel, so many of which share a multiprocessor, for pieces of `parts` times 64
// tokens.
unsigned short_blocks(const GkaJob& job, int64_t parts, int64_t a_multiprocessor);
// Pieces [job.num_pieces, num_pieces): sequences' first tokens.
void launch_first_tokens(const GkaJob& job, int64_t num_pieces, Stream stream);

}  // namespace kalmanet::cuda
