// The backward: tasks of the heads that share keys, values or queries (their gradients are sums),
// and, where those are too few to keep all threads busy, the solves of all segments at once first.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/gka_ops.hpp"
#include "cpu/gka_shared_gradients.hpp"
#include "cpu/gka_split.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {
namespace {

template <class S>
struct Backward {
  const GkaKernels<S>& table;
  const core::GkaProblem& problem;
  const ConstView& saved_x;
  const ConstView& segment_states;
  const GkaOutputGrads& output_grads;
  const GkaInputGrads& grads;
  int64_t chunk_size;

  int64_t K() const { return problem.K; }
  int64_t V() const { return problem.V; }
  int64_t floats() const { return state_floats(problem.K, problem.V); }

  Segments segments_of(const core::Sequence& sequence) const {
    return backward_segments(sequence, chunk_size, problem.options.solver,
                             segment_states.defined());
  }
  int64_t chunk_state_floats(const Segments& s) const { return (s.tokens / chunk_size) * floats(); }

  GkaBackwardJob<S> job_of(const Unit& unit, const Segments& s, int64_t segment, S* start) const {
    const int64_t row = unit.sequence->row, head = unit.head;
    GkaBackwardJob<S> job;
    job.in = head_inputs(problem, *unit.sequence, head);
    job.bp_lambda = problem.options.bp_lambda;
    job.begin = s.begin_of(segment);
    job.end = s.end_of(segment);
    job.chunk_size = chunk_size;
    job.h_is_zero = segment == 0 && !problem.inputs.h0.defined();
    job.start = state_at(start, K());
    job.saved_x = rows_of(saved_x, row, head);
    job.d_o = rows_of(output_grads.d_o, row, head);
    job.dq = out_rows_of(grads.dq, row, head / problem.q_group);
    job.dk = out_rows_of(grads.dk, row, head / problem.k_group);
    job.dv = out_rows_of(grads.dv, row, head / problem.v_group);
    // Heads of a task run in order, so the first of those that share a gradient writes it.
    job.dq.accumulate = head % problem.q_group != 0;
    job.dk.accumulate = head % problem.k_group != 0;
    job.dv.accumulate = head % problem.v_group != 0;
    job.dg = out_column_of(grads.dg, row, head);
    job.dgk = out_column_of(grads.dgk, row, head);
    job.dalpha = out_column_of(grads.dalpha, row, head);
    job.dbeta = out_column_of(grads.dbeta, row, head);
    job.d_ridge = out_column_of(grads.d_ridge_ratio, row, head);
    return job;
  }

  // The states before segment i; `starts`: those of all segments or, where they were saved, of the
  // first.
  S* start_of(const Unit& unit, const Segments& s, int64_t i, S* starts) const {
    if (i == 0 || !segment_states.defined()) return starts + i * floats();
    return segment_states_of<S>(segment_states, unit.sequence->row, unit.head).at(s.begin_of(i));
  }
  // Fills `starts`; h, u: which of the two.
  int64_t start_floats(const Segments& s) const {
    return (segment_states.defined() ? 1 : s.count) * floats();
  }
  void scan_starts(const Unit& unit, Segments s, S* starts, bool h, bool u, S* scratch) const {
    if (segment_states.defined()) s.count = 1;
    scan_segment_states(table, problem, unit, s, chunk_size, starts, h, u, scratch);
  }

  // The kernels carry D as D' + omega H: omega is 0 at first, and H the state before the sequence
  // at last.
  void load_carry(const Unit& unit, const StateBuffers<S>& carry) const {
    const int64_t n = unit.sequence->index;
    load_state(output_grads.d_h_final, n, unit.head, K(), K(), carry.h);
    load_state(output_grads.d_u_final, n, unit.head, K(), V(), carry.u);
  }
  void store_carry(const Unit& unit, const StateBuffers<S>& carry, double omega, const S* h) const {
    const int64_t n = unit.sequence->index, floats = padded(K()) * padded(K());
    for (int64_t i = 0; grads.d_h0.defined() && i < floats; ++i) {
      carry.h[i] = static_cast<S>(carry.h[i] + omega * h[i]);
    }
    store_state(carry.h, grads.d_h0, n, unit.head, K(), K());
    store_state(carry.u, grads.d_u0, n, unit.head, K(), V());
  }
};

// The states of a segment's chunks, the carried gradients and the kernel's scratch, in one lease.
template <class S>
int64_t lease_floats(const Backward<S>& b, const Segments& s) {
  return b.floats() + b.chunk_state_floats(s) +
         backward_scratch_floats(b.K(), b.V(), b.problem.options.solver,
                                 b.problem.options.arithmetic);
}

template <class S>
void assign_lease(const Backward<S>& b, const Segments& s, S* lease, double* omega,
                  GkaBackwardJob<S>& job) {
  job.carry = state_at(lease, b.K());
  job.carry_weight = omega;
  job.chunk_states = lease + b.floats();
  job.scratch = lease + b.floats() + b.chunk_state_floats(s);
}

// Everything of one head, last segment first.
template <class S>
void backward_head(const Backward<S>& b, const Unit& unit, const SharedGradients& shared,
                   SolverCount& count) {
  const Segments s = b.segments_of(*unit.sequence);
  // One lease for all, so that a call in steady state allocates nothing.
  const int64_t start_floats = b.start_floats(s);
  ScratchLease<S> whole(start_floats + lease_floats(b, s));
  S* const starts = whole.data();
  S* const lease = starts + start_floats;
  b.scan_starts(unit, s, starts, true, true, lease);
  double omega = 0;
  b.load_carry(unit, state_at(lease, b.K()));
  for (int64_t i = s.count - 1; i >= 0; --i) {
    GkaBackwardJob<S> job = b.job_of(unit, s, i, b.start_of(unit, s, i, starts));
    assign_lease(b, s, lease, &omega, job);
    shared.redirect(job);
    job.count = &count;
    b.table.gka_backward(job);
  }
  shared.finish(unit.head);
  b.store_carry(unit, state_at(lease, b.K()), omega, starts);
}

// Three passes: states before all segments, all segments' solves, then the gradients in order.
template <class S>
void backward_by_segments(const Backward<S>& b, const std::vector<Unit>& units, int64_t group,
                          std::vector<SolverCount>& counts) {
  const core::GkaProblem& problem = b.problem;
  struct Piece {
    size_t unit;
    int64_t segment;
  };
  std::vector<Segments> segments(units.size());
  std::vector<int64_t> first_piece(units.size()), first_state(units.size());
  int64_t state_floats = 0;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < units.size(); ++i) {
    segments[i] = b.segments_of(*units[i].sequence);
    first_piece[i] = static_cast<int64_t>(pieces.size());
    first_state[i] = state_floats;
    state_floats += b.start_floats(segments[i]);
    for (int64_t j = 0; j < segments[i].count; ++j) pieces.push_back({i, j});
  }
  ScratchLease<S> states(state_floats);
  S* const starts = states.data();
  const int64_t row_floats = problem.H * problem.K;
  const int64_t solution_floats = problem.B * problem.T * row_floats;
  ScratchLease<S> z(solution_floats), x(b.saved_x.defined() ? 0 : solution_floats);
  const auto solution_rows = [&](const ScratchLease<S>& buffer, const Unit& unit) {
    S* at = buffer.data() + unit.sequence->row * problem.T * row_floats + unit.head * problem.K;
    return OutRows{at, DTypeOf<S>::value, row_floats, 1, false};
  };

  problem.executor->run(2 * static_cast<int64_t>(units.size()), [&](int64_t task) {
    const auto i = static_cast<size_t>(task / 2);
    const bool h = task % 2 == 0;
    ScratchLease<S> scratch(scan_scratch_floats(b.K(), b.V()));
    b.scan_starts(units[i], segments[i], starts + first_state[i], h, !h, scratch.data());
  });
  counts.resize(pieces.size());
  const auto run_piece = [&](size_t p, typename GkaBackwardJob<S>::Phase phase, S* lease,
                             double* omega, const SharedGradients* shared) {
    const Piece& piece = pieces[p];
    const Unit& unit = units[piece.unit];
    const Segments& s = segments[piece.unit];
    S* const start = b.start_of(unit, s, piece.segment, starts + first_state[piece.unit]);
    GkaBackwardJob<S> job = b.job_of(unit, s, piece.segment, start);
    assign_lease(b, s, lease, omega, job);
    job.phase = phase;
    job.z_rows = solution_rows(z, unit);
    if (!b.saved_x.defined()) job.x_rows = solution_rows(x, unit);
    if (shared != nullptr) shared->redirect(job);
    if (phase == GkaBackwardJob<S>::solve_only) job.count = &counts[p];
    b.table.gka_backward(job);
  };
  problem.executor->run(static_cast<int64_t>(pieces.size()), [&](int64_t p) {
    const auto at = static_cast<size_t>(p);
    ScratchLease<S> lease(lease_floats(b, segments[pieces[at].unit]));
    run_piece(at, GkaBackwardJob<S>::solve_only, lease.data(), nullptr, nullptr);
  });
  const int64_t tasks = static_cast<int64_t>(units.size()) / group;
  problem.executor->run(tasks, [&](int64_t task) {
    const auto& sequence = *units[static_cast<size_t>(task * group)].sequence;
    // First what the solves leased too: so it is the same memory. All heads of a task are one
    // sequence's.
    ScratchLease<S> lease(lease_floats(b, segments[static_cast<size_t>(task * group)]));
    const SharedGradients shared(problem, b.grads, sequence);
    for (int64_t u = task * group; u < (task + 1) * group; ++u) {
      const auto i = static_cast<size_t>(u);
      const Segments& s = segments[i];
      const StateBuffers<S> carry = state_at(lease.data(), b.K());
      double omega = 0;
      b.load_carry(units[i], carry);
      const auto first = static_cast<size_t>(first_piece[i]);
      for (int64_t j = s.count - 1; j >= 0; --j) {
        run_piece(first + static_cast<size_t>(j), GkaBackwardJob<S>::gradients_only, lease.data(),
                  &omega, &shared);
      }
      shared.finish(units[i].head);
      b.store_carry(units[i], carry, omega, starts + first_state[i]);
    }
  });
}

// The gradient of an empty sequence's states passes through.
template <class S>
void pass_carry_through(const Backward<S>& b) {
  for (const core::Sequence& sequence : b.problem.sequences) {
    if (sequence.length() != 0) continue;
    ScratchLease<S> lease(b.floats());
    const StateBuffers<S> carry = state_at(lease.data(), b.K());
    for (int64_t head = 0; head < b.problem.H; ++head) {
      b.load_carry({&sequence, head}, carry);
      b.store_carry({&sequence, head}, carry, 0.0, carry.h);
    }
  }
}

template <class S>
GkaReport backward_stored(const core::GkaProblem& problem, const GkaSaved& saved,
                          const GkaOutputGrads& output_grads, const GkaInputGrads& grads) {
  GkaReport report{Backend::cpu, instruction_set(), chosen_chunk_size(problem), 0, 0};
  const Backward<S> b{kernels_of<S>(kernels()), problem,      saved.x,
                      saved.segment_states,     output_grads, grads,
                      report.chunk_size};
  const std::vector<Unit> units = units_of(problem);
  const int64_t group = std::lcm(std::lcm(problem.q_group, problem.k_group), problem.v_group);
  const int64_t tasks = static_cast<int64_t>(units.size()) / group;
  std::vector<SolverCount> counts;
  pass_carry_through(b);
  if (enough_units(tasks, problem.executor->concurrency())) {
    counts.resize(units.size());
    problem.executor->run(tasks, [&](int64_t task) {
      const auto& sequence = *units[static_cast<size_t>(task * group)].sequence;
      const SharedGradients shared(problem, grads, sequence);
      for (int64_t u = task * group; u < (task + 1) * group; ++u) {
        const auto i = static_cast<size_t>(u);
        backward_head(b, units[i], shared, counts[i]);
      }
    });
  } else {
    backward_by_segments(b, units, group, counts);
  }
  merge_counts(counts, report);
  return report;
}

}  // namespace

GkaReport backward(const core::GkaProblem& problem, const GkaSaved& saved,
                   const GkaOutputGrads& output_grads, const GkaInputGrads& grads) {
  return problem.dtype == DType::float64
             ? backward_stored<double>(problem, saved, output_grads, grads)
             : backward_stored<float>(problem, saved, output_grads, grads);
}

}  // namespace kalmanet::cpu
