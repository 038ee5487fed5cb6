// What the CPU backend's operations allocate: the sums of what gka_forward.cpp and gka_backward.cpp
// ask for. tests/api/memory_test.cpp holds each to what is really allocated.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/gka_ops.hpp"
#include "cpu/gka_split.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {
namespace {

// A buffer as the allocator sees it: rounded up to whole lanes, and a header of its own.
int64_t buffer_bytes(int64_t elements, int64_t each) {
  return padded(elements) * each + 128;
}

// Lists: a problem's sequences, its heads, the tasks, an error's text; rounded up.
int64_t list_bytes(const core::GkaProblem& problem, int64_t pieces) {
  return 8192 + 128 * problem.N + 64 * problem.N * problem.H + 64 * pieces;
}

struct Sizes {
  const core::GkaProblem& problem;
  int64_t K, V, floats, chunk_size, units, threads;
  Solver solver;
  Arithmetic arithmetic;
  int64_t each;  // bytes of a storage element

  explicit Sizes(const core::GkaProblem& p)
      : problem(p),
        K(p.K),
        V(p.V),
        floats(state_floats(p.K, p.V)),
        chunk_size(chosen_chunk_size(p)),
        units(0),
        threads(p.executor->concurrency()),
        solver(p.options.solver),
        arithmetic(p.options.arithmetic),
        each(size_of(core::state_dtype(p))) {
    for (const core::Sequence& s : p.sequences) units += s.length() > 0 ? p.H : 0;
  }
  int64_t chunks(const core::Sequence& s) const {
    return (s.length() + chunk_size - 1) / chunk_size;
  }
  int64_t bytes_of(int64_t elements) const { return buffer_bytes(elements, each); }
  // Each thread at work holds one piece of scratch.
  int64_t scratch_bytes(int64_t tasks, int64_t scratch_floats) const {
    return std::min(threads, std::max<int64_t>(tasks, 1)) * bytes_of(scratch_floats);
  }
};

int64_t forward_bytes(const Sizes& s) {
  const int64_t scratch = forward_scratch_floats(s.K, s.V, s.solver, s.arithmetic);
  if (enough_units(s.units, static_cast<int>(s.threads))) {
    return list_bytes(s.problem, 0) + s.scratch_bytes(s.units, scratch + s.floats);
  }
  // The states before each segment: some four segments a thread.
  const int64_t wanted = (4 * s.threads + s.units - 1) / s.units;
  int64_t pieces = 0;
  for (const core::Sequence& sequence : s.problem.sequences) {
    if (sequence.length() == 0) continue;
    const int64_t group = whole_windows((s.chunks(sequence) + wanted - 1) / wanted, s.solver);
    pieces += s.problem.H * cut(sequence, s.chunk_size, group).count;
  }
  const int64_t lease = std::max({scan_scratch_floats(s.K, s.V), scratch, s.floats});
  return list_bytes(s.problem, pieces) + s.bytes_of(pieces * s.floats) +
         s.scratch_bytes(std::max(pieces, 2 * s.units), lease);
}

// The float32 sums of 16-bit gradients that heads share (gka_shared_gradients.hpp), of the longest
// sequence, for each task at work.
int64_t shared_bytes(const Sizes& s, int64_t tasks) {
  const core::GkaProblem& p = s.problem;
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) return 0;
  int64_t longest = 0;
  for (const core::Sequence& sequence : p.sequences) longest = std::max(longest, sequence.length());
  int64_t bytes = 0;
  if (p.q_group > 1) bytes += buffer_bytes(longest * s.K, 4);
  if (p.k_group > 1) bytes += buffer_bytes(longest * s.K, 4);
  if (p.v_group > 1) bytes += buffer_bytes(longest * s.V, 4);
  return std::min(s.threads, std::max<int64_t>(tasks, 1)) * bytes;
}

int64_t backward_bytes(const Sizes& s, int64_t group, const GkaShape& shape) {
  const int64_t tasks = s.units / group;
  const bool by_units = enough_units(tasks, static_cast<int>(s.threads));
  // A tensor of them without elements is as good as none.
  const bool kept_states = shape.segment_states && s.problem.T >= kSegmentTokens;
  int64_t pieces = 0, starts = 0, most_segments = 0, most_states = 0;
  for (const core::Sequence& sequence : s.problem.sequences) {
    if (sequence.length() == 0) continue;
    const Segments segments = backward_segments(sequence, s.chunk_size, s.solver, kept_states);
    pieces += s.problem.H * segments.count;
    const int64_t kept = kept_states ? 1 : segments.count;
    starts += s.problem.H * kept * s.floats;
    most_segments = std::max(most_segments, kept * s.floats);
    most_states = std::max(most_states, segments.tokens / s.chunk_size * s.floats);
  }
  const int64_t lease =
      std::max(scan_scratch_floats(s.K, s.V),
               s.floats + most_states + backward_scratch_floats(s.K, s.V, s.solver, s.arithmetic));
  if (by_units) {
    return list_bytes(s.problem, 0) + shared_bytes(s, tasks) + s.scratch_bytes(tasks, lease) +
           s.scratch_bytes(tasks, most_segments);
  }
  const int64_t solutions = s.problem.B * s.problem.T * s.problem.H * s.K;
  return list_bytes(s.problem, pieces) + shared_bytes(s, tasks) + s.bytes_of(starts) +
         (shape.saved_x ? 1 : 2) * s.bytes_of(solutions) +
         s.scratch_bytes(std::max(pieces, 2 * s.units), lease);
}

}  // namespace

int64_t workspace_bytes(GkaOperation operation, const core::GkaProblem& problem,
                        const GkaShape& shape) {
  const Sizes sizes(problem);
  // Heads of a backward task, as in backward().
  const int64_t group = std::lcm(std::lcm(problem.q_group, problem.k_group), problem.v_group);
  if (sizes.units == 0) return list_bytes(problem, 0) + sizes.bytes_of(sizes.floats);
  switch (operation) {
    case GkaOperation::forward:
      return forward_bytes(sizes);
    case GkaOperation::backward:
      return backward_bytes(sizes, group, shape);
    case GkaOperation::step:
      break;
  }
  return list_bytes(problem, 0) +
         sizes.scratch_bytes(
             sizes.units,
             step_scratch_floats(problem.K, problem.V, problem.options.solver) + sizes.floats);
}

}  // namespace kalmanet::cpu
