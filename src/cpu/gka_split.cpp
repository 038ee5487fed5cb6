// How a GKA problem is cut into tasks.
#include "cpu/gka_split.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/dispatch.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {

std::vector<Unit> units_of(const core::GkaProblem& problem) {
  std::vector<Unit> units;
  units.reserve(static_cast<size_t>(problem.N * problem.H));
  for (const core::Sequence& sequence : problem.sequences) {
    if (sequence.length() == 0) continue;
    for (int64_t head = 0; head < problem.H; ++head) units.push_back({&sequence, head});
  }
  return units;
}

bool enough_units(int64_t units, int threads) {
  // With four tasks a thread the last to finish wastes at most a quarter of a thread's share.
  return threads == 1 || units >= 4 * threads || units % threads == 0;
}

int64_t whole_windows(int64_t chunks, Solver solver) {
  const int64_t window = by_blocks(solver) ? kBlockChunks : 1;
  return std::max<int64_t>(1, (chunks + window - 1) / window) * window;
}

Segments cut(const core::Sequence& sequence, int64_t chunk_size, int64_t chunks_per_segment) {
  Segments s;
  s.begin = sequence.begin;
  s.end = sequence.end;
  s.tokens = chunk_size * chunks_per_segment;
  s.count = (sequence.length() + s.tokens - 1) / s.tokens;
  return s;
}

Segments backward_segments(const core::Sequence& sequence, int64_t chunk_size, Solver solver,
                           bool segment_states) {
  const int64_t chunks = (sequence.length() + chunk_size - 1) / chunk_size;
  const auto root = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(chunks))));
  const int64_t most = segment_states ? std::min(kSegmentTokens / chunk_size, chunks) : root;
  return cut(sequence, chunk_size, whole_windows(most, solver));
}

template <class S>
void scan_segment_states(const GkaKernels<S>& table, const core::GkaProblem& problem,
                         const Unit& unit, const Segments& segments, int64_t chunk_size, S* states,
                         bool h, bool u, S* scratch) {
  const int64_t K = problem.K, V = problem.V;
  const int64_t floats = state_floats(K, V);
  const int64_t n = unit.sequence->index;
  const size_t h_bytes = static_cast<size_t>(padded(K) * padded(K)) * sizeof(S);
  const size_t u_bytes = static_cast<size_t>(padded(K) * padded(V)) * sizeof(S);
  StateBuffers<S> at = state_at(states, K);
  if (h) load_state(problem.inputs.h0, n, unit.head, K, K, at.h);
  if (u) load_state(problem.inputs.u0, n, unit.head, K, V, at.u);
  for (int64_t i = 0; i + 1 < segments.count; ++i) {
    const StateBuffers<S> next = state_at(states + (i + 1) * floats, K);
    if (h) std::memcpy(next.h, at.h, h_bytes);
    if (u) std::memcpy(next.u, at.u, u_bytes);
    GkaScanJob<S> job;
    job.in = head_inputs(problem, *unit.sequence, unit.head);
    job.begin = segments.begin_of(i);
    job.end = segments.end_of(i);
    job.chunk_size = chunk_size;
    job.state = {h ? next.h : nullptr, u ? next.u : nullptr};
    job.scratch = scratch;
    table.gka_scan_states(job);
    at = next;
  }
}

template void scan_segment_states(const GkaKernels<float>&, const core::GkaProblem&, const Unit&,
                                  const Segments&, int64_t, float*, bool, bool, float*);
template void scan_segment_states(const GkaKernels<double>&, const core::GkaProblem&, const Unit&,
                                  const Segments&, int64_t, double*, bool, bool, double*);

void merge_counts(const std::vector<SolverCount>& counts, GkaReport& report) {
  for (const SolverCount& count : counts) {
    if (count.chunks == 0) continue;
    report.min_iterations =
        report.solves == 0 ? count.min : std::min(report.min_iterations, count.min);
    report.max_iterations = std::max(report.max_iterations, count.max);
    report.solves += count.chunks;
    report.direct_solves += count.direct_chunks;
    report.factorizations += count.factorizations;
    report.bfloat16_solves += count.bf16_chunks;
  }
  report.bfloat16_instructions = report.bfloat16_solves > 0 && bf16_kernels().instructions;
}

}  // namespace kalmanet::cpu
