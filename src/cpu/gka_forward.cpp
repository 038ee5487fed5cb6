// The forward and the decode step: tasks of one head of one sequence, or of one segment of it.
#include <algorithm>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/gka_ops.hpp"
#include "cpu/gka_split.hpp"
#include "cpu/gka_step_states.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {
namespace {

template <class S>
GkaForwardJob<S> forward_job(const core::GkaProblem& problem, const GkaOutputs& outputs,
                             const Unit& unit, int64_t chunk_size) {
  const int64_t row = unit.sequence->row;
  GkaForwardJob<S> job;
  job.in = head_inputs(problem, *unit.sequence, unit.head);
  job.chunk_size = chunk_size;
  job.o = out_rows_of(outputs.o, row, unit.head);
  job.x = out_rows_of(outputs.x, row, unit.head);
  job.residual = out_column_of(outputs.residual, row, unit.head);
  job.segment_states = segment_states_of<S>(outputs.segment_states, row, unit.head);
  job.sequence_begin = unit.sequence->begin;
  return job;
}

template <class S>
void store_final_states(const core::GkaProblem& problem, const GkaOutputs& outputs,
                        const Unit& unit, const StateBuffers<S>& state) {
  const int64_t n = unit.sequence->index;
  store_state(state.h, outputs.h_final, n, unit.head, problem.K, problem.K);
  store_state(state.u, outputs.u_final, n, unit.head, problem.K, problem.V);
}

// An empty sequence leaves its states as they were.
template <class S>
void pass_states_through(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  if (!outputs.h_final.defined() && !outputs.u_final.defined()) return;
  const int64_t K = problem.K, V = problem.V;
  for (const core::Sequence& sequence : problem.sequences) {
    if (sequence.length() != 0) continue;
    ScratchLease<S> scratch(state_floats(K, V));
    const StateBuffers<S> state = state_at(scratch.data(), K);
    for (int64_t head = 0; head < problem.H; ++head) {
      load_state(problem.inputs.h0, sequence.index, head, K, K, state.h);
      load_state(problem.inputs.u0, sequence.index, head, K, V, state.u);
      store_final_states<S>(problem, outputs, {&sequence, head}, state);
    }
  }
}

// One task a head: states stay in the thread's cache from first token to last.
template <class S>
void forward_by_units(const GkaKernels<S>& table, const core::GkaProblem& problem,
                      const GkaOutputs& outputs, const std::vector<Unit>& units, int64_t chunk_size,
                      std::vector<SolverCount>& counts) {
  const int64_t K = problem.K, V = problem.V;
  counts.resize(units.size());
  problem.executor->run(static_cast<int64_t>(units.size()), [&](int64_t i) {
    const Unit& unit = units[static_cast<size_t>(i)];
    ScratchLease<S> scratch(
        forward_scratch_floats(K, V, problem.options.solver, problem.options.arithmetic) +
        state_floats(K, V));
    GkaForwardJob<S> job = forward_job<S>(problem, outputs, unit, chunk_size);
    job.begin = unit.sequence->begin;
    job.end = unit.sequence->end;
    job.state = state_at(scratch.data(), K);
    job.h_is_zero = !problem.inputs.h0.defined();
    job.starts_sequence = true;
    job.scratch = scratch.data() + state_floats(K, V);
    job.count = &counts[static_cast<size_t>(i)];
    load_state(problem.inputs.h0, unit.sequence->index, unit.head, K, K, job.state.h);
    load_state(problem.inputs.u0, unit.sequence->index, unit.head, K, V, job.state.u);
    table.gka_forward(job);
    store_final_states(problem, outputs, unit, job.state);
  });
}

// Few heads: first the states before each segment (H and U apart: a twentieth of the work), then
// all segments at once.
template <class S>
void forward_by_segments(const GkaKernels<S>& table, const core::GkaProblem& problem,
                         const GkaOutputs& outputs, const std::vector<Unit>& units,
                         int64_t chunk_size, std::vector<SolverCount>& counts) {
  const int64_t K = problem.K, V = problem.V;
  const int64_t floats = state_floats(K, V);
  const int64_t num_units = static_cast<int64_t>(units.size());
  const int64_t wanted = (4 * problem.executor->concurrency() + num_units - 1) / num_units;

  struct Piece {
    int64_t unit;
    int64_t segment;
  };
  std::vector<Segments> segments(units.size());
  std::vector<int64_t> first_state(units.size());
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < num_units; ++i) {
    const core::Sequence& sequence = *units[static_cast<size_t>(i)].sequence;
    const int64_t chunks = (sequence.length() + chunk_size - 1) / chunk_size;
    Segments& s = segments[static_cast<size_t>(i)];
    s = cut(sequence, chunk_size,
            whole_windows((chunks + wanted - 1) / wanted, problem.options.solver));
    first_state[static_cast<size_t>(i)] = static_cast<int64_t>(pieces.size()) * floats;
    for (int64_t j = 0; j < s.count; ++j) pieces.push_back({i, j});
  }
  ScratchLease<S> states(static_cast<int64_t>(pieces.size()) * floats);
  S* const base = states.data();
  problem.executor->run(2 * num_units, [&](int64_t task) {
    const size_t i = static_cast<size_t>(task / 2);
    const bool h = task % 2 == 0;
    ScratchLease<S> scratch(scan_scratch_floats(problem.K, problem.V));
    scan_segment_states(table, problem, units[i], segments[i], chunk_size, base + first_state[i], h,
                        !h, scratch.data());
  });
  counts.resize(pieces.size());
  problem.executor->run(static_cast<int64_t>(pieces.size()), [&](int64_t p) {
    const Piece& piece = pieces[static_cast<size_t>(p)];
    const size_t i = static_cast<size_t>(piece.unit);
    const Segments& s = segments[i];
    ScratchLease<S> scratch(
        forward_scratch_floats(K, V, problem.options.solver, problem.options.arithmetic));
    GkaForwardJob<S> job = forward_job<S>(problem, outputs, units[i], chunk_size);
    job.begin = s.begin_of(piece.segment);
    job.end = s.end_of(piece.segment);
    job.state = state_at(base + p * floats, K);
    job.h_is_zero = piece.segment == 0 && !problem.inputs.h0.defined();
    job.starts_sequence = piece.segment == 0;
    job.scratch = scratch.data();
    job.count = &counts[static_cast<size_t>(p)];
    table.gka_forward(job);
    if (piece.segment + 1 == s.count) store_final_states(problem, outputs, units[i], job.state);
  });
}

template <class S>
GkaReport forward_stored(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  GkaReport report{Backend::cpu, instruction_set(), chosen_chunk_size(problem), 0, 0};
  const GkaKernels<S>& table = kernels_of<S>(kernels());
  const std::vector<Unit> units = units_of(problem);
  std::vector<SolverCount> counts;
  pass_states_through<S>(problem, outputs);
  if (enough_units(static_cast<int64_t>(units.size()), problem.executor->concurrency())) {
    forward_by_units(table, problem, outputs, units, report.chunk_size, counts);
  } else {
    forward_by_segments(table, problem, outputs, units, report.chunk_size, counts);
  }
  merge_counts(counts, report);
  return report;
}

// A step whose states are not simply what they were, updated where they lie: the copy that it works
// on, past the accepted tokens of the last draft. Those belong to the states whatever follows.
template <class S>
void begin_apart(const GkaKernels<S>& table, const core::GkaProblem& problem,
                 const GkaOutputs& outputs, const Unit& unit, const StateBuffers<S>& buffers,
                 GkaStepJob<S>& job) {
  const int64_t K = problem.K, V = problem.V;
  const core::Sequence& sequence = *unit.sequence;
  const GkaDraft& draft = problem.inputs.last_draft;
  load_state(problem.inputs.h0, sequence.index, unit.head, K, K, buffers.h);
  load_state(problem.inputs.u0, sequence.index, unit.head, K, V, buffers.u);
  if (sequence.accepted > 0) {
    ScratchLease<S> scratch(scan_scratch_floats(K, V));
    GkaScanJob<S> scan;
    scan.in = job.in;
    scan.in.k = rows_of(draft.k, sequence.row, unit.head / problem.k_group);
    scan.in.v = rows_of(draft.v, sequence.row, unit.head / problem.v_group);
    scan.in.g = column_of(draft.g, sequence.row, unit.head);
    scan.in.gk = column_of(draft.gk, sequence.row, unit.head);
    scan.in.beta = column_of(draft.beta, sequence.row, unit.head);
    scan.end = sequence.accepted;
    scan.chunk_size = kLanes;
    scan.state = buffers;
    scan.scratch = scratch.data();
    table.gka_scan_states(scan);
  }
  if (problem.inputs.is_draft) store_final_states(problem, outputs, unit, buffers);
  job.state = buffers;
  job.h_stride = padded(K);
  job.u_stride = padded(V);
}

template <class S>
GkaReport step_stored(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  GkaReport report{Backend::cpu, instruction_set(), 1, 0, 0};
  const GkaKernels<S>& table = kernels_of<S>(kernels());
  const std::vector<Unit> units = units_of(problem);
  std::vector<SolverCount> counts(units.size());
  const int64_t K = problem.K, V = problem.V;
  pass_states_through<S>(problem, outputs);
  problem.executor->run(static_cast<int64_t>(units.size()), [&](int64_t i) {
    const Unit& unit = units[static_cast<size_t>(i)];
    const int64_t row = unit.sequence->row, n = unit.sequence->index;
    ScratchLease<S> scratch(step_scratch_floats(K, V, problem.options.solver) + state_floats(K, V));
    const StateBuffers<S> buffers = state_at(scratch.data(), K);
    GkaStepJob<S> job;
    job.in = head_inputs(problem, *unit.sequence, unit.head);
    job.begin = unit.sequence->begin;
    job.end = unit.sequence->end;
    const bool apart = problem.inputs.is_draft || unit.sequence->accepted > 0;
    if (apart) {
      begin_apart(table, problem, outputs, unit, buffers, job);
    } else {
      begin_step(problem, outputs, n, unit.head, buffers, job);
    }
    job.o = out_rows_of(outputs.o, row, unit.head);
    job.x = out_rows_of(outputs.x, row, unit.head);
    job.residual = out_column_of(outputs.residual, row, unit.head);
    job.scratch = scratch.data() + state_floats(K, V);
    job.count = &counts[static_cast<size_t>(i)];
    table.gka_step(job);
    if (!apart) {
      end_step(problem, outputs, n, unit.head, buffers, job);
    } else if (!problem.inputs.is_draft) {
      store_final_states(problem, outputs, unit, buffers);
    }
  });
  merge_counts(counts, report);
  return report;
}

}  // namespace

GkaReport forward(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  return problem.dtype == DType::float64 ? forward_stored<double>(problem, outputs)
                                         : forward_stored<float>(problem, outputs);
}

GkaReport step(const core::GkaProblem& problem, const GkaOutputs& outputs) {
  return problem.dtype == DType::float64 ? step_stored<double>(problem, outputs)
                                         : step_stored<float>(problem, outputs);
}

}  // namespace kalmanet::cpu
