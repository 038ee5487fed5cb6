// The backward: sizes of its workspace, and the order of its kernels.
#include "cuda/backward_plan.hpp"

#include <algorithm>
#include <numeric>

#include "cuda/backward_launch.hpp"
#include "cuda/chunk_kernel.hpp"
#include "cuda/plan.hpp"
#include "cuda/workspace.hpp"

namespace kalmanet::cuda {

BackwardJob backward_job_of(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                            const GkaInputGrads& grads) {
  BackwardJob job;
  job.in = job_of(problem, {});
  job.d_o = array_of(output_grads.d_o);
  job.d_h_final = array_of(output_grads.d_h_final);
  job.d_u_final = array_of(output_grads.d_u_final);
  job.dq = array_of(grads.dq);
  job.dk = array_of(grads.dk);
  job.dv = array_of(grads.dv);
  job.dg = array_of(grads.dg);
  job.dgk = array_of(grads.dgk);
  job.dalpha = array_of(grads.dalpha);
  job.dbeta = array_of(grads.dbeta);
  job.d_ridge = array_of(grads.d_ridge_ratio);
  job.d_h0 = array_of(grads.d_h0);
  job.d_u0 = array_of(grads.d_u0);
  job.bp_lambda = problem.options.bp_lambda;
  return job;
}

int64_t BackwardBytes::total() const {
  return pieces + states + decays + adjoints + 2 * solutions + weights + since + dq_parts +
         left_over + short_plans + std::max(solve + chunk_scratch, gradients + dk_parts + dv_parts);
}

// As far as K, V and the dtype say: float16 by the direct solver alone.
namespace {
bool have_chunks(const core::GkaProblem& problem) {
  return have_chunk_dims(problem) &&
         (problem.dtype == DType::bfloat16 ||
          (problem.dtype == DType::float16 && problem.options.solver == Solver::direct));
}
}  // namespace

bool fits_backward_chunks(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                          const GkaInputGrads& grads, const DeviceInfo& device) {
  const GkaInputs& in = problem.inputs;
  return have_chunks(problem) && in_vectors(in.q) && in_vectors(in.k) && in_vectors(in.v) &&
         in_vectors(output_grads.d_o) && (!grads.dq.defined() || in_pairs(grads.dq)) &&
         (!grads.dk.defined() || in_pairs(grads.dk)) &&
         (!grads.dv.defined() || in_pairs(grads.dv)) &&
         backward_chunk_shared_bytes() <= device.max_shared;
}

std::vector<Piece> backward_pieces_of(const core::GkaProblem& problem, bool chunks) {
  std::vector<Piece> pieces = pieces_of(problem, false, chunks ? kBackwardTokens : kSegmentTokens);
  for (Piece& piece : pieces) piece.always = chunks ? 0 : 1;
  return pieces;
}

int64_t heads_at_a_time(const core::GkaProblem& problem, int64_t pieces, const DeviceInfo& device) {
  const int64_t group =
      std::lcm(problem.q_group, std::lcm(problem.k_group, problem.v_group));  // share a gradient
  const int64_t blocks = int64_t{2} * device.multiprocessors;  // of the direct solver's at a time
  const auto rounds = [&](int64_t heads) { return (pieces * heads + blocks - 1) / blocks; };
  const int64_t H = problem.H;
  for (int64_t heads = group; heads < H; heads += group) {
    const int64_t rest = H % heads;
    if (H / heads * rounds(heads) + (rest != 0 ? rounds(rest) : 0) <= rounds(H)) return heads;
  }
  return H;
}

BackwardBytes backward_bytes(const core::GkaProblem& problem, BackwardJob& job, int64_t pieces,
                             bool chunks, const DeviceInfo& device, bool all) {
  const bool float64 = problem.dtype == DType::float64;
  const int64_t item = size_of(core::state_dtype(problem));
  const int64_t heads = job.in.H, places = problem.B * problem.T * heads;
  const int64_t doubles = static_cast<int64_t>(sizeof(double));
  BackwardBytes bytes = {};
  bytes.pieces = pieces * static_cast<int64_t>(sizeof(Piece));
  bytes.adjoints = states_bytes(problem, pieces) / problem.H * heads;
  if (pieces > problem.N) {
    bytes.states = bytes.adjoints;
    bytes.decays = decays_bytes(problem, pieces) / problem.H * heads;
  }
  job.in.num_pieces = pieces;
  bytes.solve = plan_tokens(job.in, float64, false, device.max_shared);
  bytes.solutions = places * problem.K * item;
  bytes.weights = places * doubles;
  bytes.since = 2 * places * doubles;
  const auto parts = [&](const Array& gradient, int64_t group, int64_t width) {
    return group > 1 && (all || gradient.data != nullptr) ? places * width * item : 0;
  };
  bytes.dq_parts = parts(job.dq, problem.q_group, problem.K);
  bytes.dk_parts = parts(job.dk, problem.k_group, problem.K);
  bytes.dv_parts = parts(job.dv, problem.v_group, problem.V);
  if (chunks) {
    bytes.chunk_scratch = pieces * heads * chunk_scratch_bytes();
    bytes.left_over = pieces * heads * static_cast<int64_t>(sizeof(int32_t));
    bytes.short_plans = all || may_be_short(problem) ? short_plan_bytes(pieces, heads) : 0;
  }
  // Two blocks a multiprocessor hide each other's waits (one on matrix units, whose shared memory
  // has room for no more); any number gives the same bits.
  bytes.blocks = std::min(pieces * heads, int64_t{chunks ? 1 : 2} * device.multiprocessors);
  job.block_bytes = gradient_block_bytes(float64, problem.K, problem.V);
  bytes.gradients = bytes.blocks * (chunks ? gradient_chunk_block_bytes() : job.block_bytes);
  bytes.gradients = std::max(bytes.gradients, job.block_bytes);  // for what is left over
  return bytes;
}

int64_t most_backward_bytes(const core::GkaProblem& problem, const DeviceInfo& device) {
  BackwardJob job = backward_job_of(problem, {}, {});
  const bool chunks = have_chunks(problem);
  const int64_t count = static_cast<int64_t>(backward_pieces_of(problem, chunks).size());
  if (chunks && count > 0) job.in.H = heads_at_a_time(problem, count, device);
  return backward_bytes(problem, job, count, chunks, device, true).total();
}

namespace {

// The job's arrays from a head on.
void skip_heads(BackwardJob& job, int64_t head) {
  const auto skip = [](Array& a, int64_t heads, int dimension) {
    if (a.data == nullptr) return;
    a.data = static_cast<char*>(a.data) + heads * a.stride[dimension] * size_of(a.dtype);
  };
  GkaJob& in = job.in;
  for (Array* a : {&in.q, &job.dq}) skip(*a, head / in.q_group, 2);
  for (Array* a : {&in.k, &job.dk}) skip(*a, head / in.k_group, 2);
  for (Array* a : {&in.v, &job.dv}) skip(*a, head / in.v_group, 2);
  for (Array* a : {&job.d_o, &in.g, &in.gk, &in.alpha, &in.beta, &in.ridge, &job.dg, &job.dgk,
                   &job.dalpha, &job.dbeta, &job.d_ridge}) {
    skip(*a, head, 2);
  }
  for (Array* a : {&in.h0, &in.u0, &job.d_h_final, &job.d_u_final, &job.d_h0, &job.d_u0}) {
    skip(*a, head, 1);
  }
}

// The backward of job.in.H heads.
void run_heads(const core::GkaProblem& problem, BackwardJob job, const BackwardBytes& bytes,
               bool chunks) {
  const Stream stream = problem.options.stream;
  const bool float64 = problem.dtype == DType::float64;
  const Workspace states(bytes.states, stream), decays(bytes.decays, stream);
  const Workspace adjoints(bytes.adjoints, stream);
  const Workspace x(bytes.solutions, stream), z(bytes.solutions, stream);
  const Workspace w(bytes.weights, stream), since(bytes.since, stream);
  const Workspace dq_parts(bytes.dq_parts, stream), left_over(bytes.left_over, stream);
  const Workspace short_plans(bytes.short_plans, stream);
  job.in.states = states.data();
  job.in.decays = static_cast<double*>(decays.data());
  job.adjoints = adjoints.data();
  job.x = x.data();
  job.z = z.data();
  job.w = static_cast<double*>(w.data());
  job.since = static_cast<double*>(since.data());
  job.dq_parts = dq_parts.data();
  {
    const Workspace scratch(bytes.solve, stream), chunk_scratch(bytes.chunk_scratch, stream);
    job.in.scratch = scratch.data();
    job.in.chunk_scratch = chunk_scratch.data();
    job.in.left_over = static_cast<int32_t*>(left_over.data());
    job.in.short_plans = static_cast<ShortPlan*>(short_plans.data());
    if (bytes.states != 0 && chunks) launch_chunk_states(job.in, stream);
    if (bytes.states != 0 && !chunks) launch_segments(job.in, float64, stream);
    if (bytes.short_plans != 0) launch_backward_short(job, stream);
    if (chunks && job.in.direct) launch_backward_direct(job, stream);
    if (chunks && (!job.in.direct || bytes.short_plans != 0)) launch_backward_chunks(job, stream);
    launch_backward_solve(job, float64, stream);
    if (!float64 && !problem.inputs.h0.defined()) launch_backward_first(job, stream);
  }
  if (chunks) launch_adjoint_chunks(job, stream);
  launch_adjoints(job, float64, stream);
  const Workspace dk_parts(bytes.dk_parts, stream), dv_parts(bytes.dv_parts, stream);
  const Workspace scratch(bytes.gradients, stream);
  job.dk_parts = dk_parts.data();
  job.dv_parts = dv_parts.data();
  job.block_scratch = scratch.data();
  if (chunks) launch_gradient_chunks(job, bytes.blocks, stream);
  launch_gradients(job, float64, bytes.gradients / job.block_bytes, stream);
  launch_head_sums(job, problem.B, float64, stream);
}

}  // namespace

bool run_backward(const core::GkaProblem& problem, const GkaOutputGrads& output_grads,
                  const GkaInputGrads& grads, const DeviceInfo& device) {
  const bool chunks = fits_backward_chunks(problem, output_grads, grads, device);
  const std::vector<Piece> pieces = backward_pieces_of(problem, chunks);
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (count == 0 || problem.H == 0) return chunks;
  const Workspace list(count * static_cast<int64_t>(sizeof(Piece)), problem.options.stream);
  copy_to_device(list.data(), pieces.data(), count * static_cast<int64_t>(sizeof(Piece)),
                 problem.options.stream);
  const int64_t heads = chunks ? heads_at_a_time(problem, count, device) : problem.H;
  for (int64_t head = 0; head < problem.H; head += heads) {
    BackwardJob job = backward_job_of(problem, output_grads, grads);
    job.in.H = std::min(heads, problem.H - head);
    job.in.split = problem.options.arithmetic == Arithmetic::standard;
    job.in.pieces = static_cast<const Piece*>(list.data());
    skip_heads(job, head);
    const BackwardBytes bytes = backward_bytes(problem, job, count, chunks, device, false);
    run_heads(problem, job, bytes, chunks);
  }
  return chunks;
}

}  // namespace kalmanet::cuda
