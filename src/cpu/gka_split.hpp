// How a GKA problem is cut into tasks. No cut changes a bit of the result: chunks start at the same
// tokens whatever the cut, and the states at a cut come from the forward's own arithmetic.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.hpp"
#include "cpu/gka_jobs.hpp"
#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

// One head of one (non-empty) sequence.
struct Unit {
  const core::Sequence* sequence;
  int64_t head;
};
std::vector<Unit> units_of(const core::GkaProblem& problem);

// Whether units alone keep `threads` busy: else sequences are cut into segments too.
bool enough_units(int64_t units, int threads);

// A sequence in segments of whole chunks.
struct Segments {
  int64_t begin = 0, end = 0;
  int64_t tokens = 0;  // of each segment but the last
  int64_t count = 0;
  int64_t begin_of(int64_t i) const { return begin + i * tokens; }
  int64_t end_of(int64_t i) const { return i + 1 == count ? end : begin + (i + 1) * tokens; }
};
// `chunks` (at least one), rounded up to whole windows where the solver works by windows.
int64_t whole_windows(int64_t chunks, Solver solver);
Segments cut(const core::Sequence& sequence, int64_t chunk_size, int64_t chunks_per_segment);

// The backward's: as the saved states lie; without them about sqrt(chunks) chunks a segment, since
// the states before each segment and before each chunk of one segment are what is kept: 2
// sqrt(chunks) of them instead of one a chunk.
Segments backward_segments(const core::Sequence& sequence, int64_t chunk_size, Solver solver,
                           bool segment_states);

// states[i] (state_floats each, i < segments.count) <- the states before segment i, H and/or U.
// `scratch`: scan_scratch_floats(K, V).
template <class S>
void scan_segment_states(const GkaKernels<S>& table, const core::GkaProblem& problem,
                         const Unit& unit, const Segments& segments, int64_t chunk_size, S* states,
                         bool h, bool u, S* scratch);

// All tasks' counts into the report.
void merge_counts(const std::vector<SolverCount>& counts, GkaReport& report);

}  // namespace kalmanet::cpu
