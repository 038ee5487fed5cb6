// The CUDA backend: what it refuses, and the order of its kernels.
#include "cuda/backend.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "core/half.hpp"
#include "core/text.hpp"
#include "cuda/backward_plan.hpp"
#include "cuda/choose_solver.hpp"
#include "cuda/direct_kernel.hpp"
#include "cuda/launch.hpp"
#include "cuda/plan.hpp"
#include "cuda/workspace.hpp"
#include "kalmanet/error.hpp"

namespace kalmanet::cuda {
namespace {

GkaReport report_of(const core::GkaProblem& problem) {
  GkaReport report;
  report.backend = Backend::cuda;
  report.chunk_size = 1;
  report.solves = problem.B * problem.T * problem.H;
  if (problem.options.solver == Solver::direct) {
    report.direct_solves = report.factorizations = report.solves;
  } else {  // with kAutoNumIter the GPU counts, and is not asked
    report.min_iterations = report.max_iterations = problem.options.num_iter;
  }
  return report;
}

// What a run holds of the GPU's memory beside its tensors.
struct Memory {
  Workspace pieces, states, decays, chunk_scratch, left_over, scratch, short_plans;
};

// On matrix units, piece by piece at once; then token by token what those cannot carry.
GkaReport run_by_chunks(const core::GkaProblem& problem, const GkaOutputs& outputs,
                        const DeviceInfo& device) {
  const Stream stream = problem.options.stream;
  const std::vector<Piece> pieces = chunk_pieces_of(problem);
  GkaJob job = job_of(problem, outputs);
  job.split = problem.options.arithmetic == Arithmetic::standard;
  const int64_t all = static_cast<int64_t>(pieces.size()), own = num_chunk_pieces(pieces);
  job.num_pieces = own;
  const Memory memory = {
      Workspace(all * static_cast<int64_t>(sizeof(Piece)), stream),
      Workspace(states_bytes(problem, own), stream),
      Workspace(decays_bytes(problem, own), stream),
      Workspace(own * problem.H * chunk_scratch_bytes(), stream),
      Workspace(own * problem.H * static_cast<int64_t>(sizeof(int32_t)), stream),
      Workspace(plan_tokens(job, false, false, device.max_shared), stream),
      Workspace(may_be_short(problem) ? short_plan_bytes(own, problem.H) : 0, stream),
  };
  copy_to_device(memory.pieces.data(), pieces.data(), all * static_cast<int64_t>(sizeof(Piece)),
                 stream);
  job.pieces = static_cast<const Piece*>(memory.pieces.data());
  job.states = memory.states.data();
  job.decays = static_cast<double*>(memory.decays.data());
  job.chunk_scratch = memory.chunk_scratch.data();
  job.left_over = static_cast<int32_t*>(memory.left_over.data());
  job.scratch = memory.scratch.data();
  job.short_plans = static_cast<ShortPlan*>(memory.short_plans.data());
  job.num_pieces = own;
  launch_chunks(job, own > problem.N, stream);
  launch_tokens(job, false, stream);
  launch_first_tokens(job, all, stream);
  GkaReport report = report_of(problem);
  report.chunk_size = job.direct ? DirectLayout::kTokens : ChunkLayout::kTokens;
  report.bfloat16_instructions = true;
  if (!job.split) report.bfloat16_solves = report.solves;
  return report;
}

// `whole`: every sequence in one piece (decode).
GkaReport run(const core::GkaProblem& problem, const GkaOutputs& outputs, bool whole) {
  const DeviceInfo& device = device_info();
  if (device.count == 0) throw Error(ErrorCode::unsupported, "backend", "cuda: " + device.problem);
  if (!whole && problem.T > 0 && problem.N > 0 && fits_chunks(problem, outputs) &&
      std::max(chunk_shared_bytes(), direct_shared_bytes()) <= device.max_shared) {
    return run_by_chunks(problem, outputs, device);
  }
  if (!whole && problem.options.arithmetic != Arithmetic::standard) {
    throw Error(ErrorCode::unsupported, "backend",
                "arithmetic bfloat16 on the cuda backend is for bfloat16 q, k, v and o, K and V "
                "multiples of 8 up to 128, dense in their last dimension and aligned to 16 bytes, "
                "without x and residual; pass arithmetic standard");
  }
  const Stream stream = problem.options.stream;
  if (whole && problem.B > 0 && fits_step(problem, outputs) &&
      step_shared_bytes() <= device.max_shared) {
    const GkaJob job = step_job_of(problem, outputs);
    launch_step(job, fits_few(problem, outputs), stream);
    GkaReport report = report_of(problem);
    report.direct_solves = report.factorizations = 0;  // direct is Chebyshev's iteration here, too
    report.min_iterations = report.max_iterations = job.num_iter;
    return report;
  }
  const bool float64 = problem.dtype == DType::float64;
  const std::vector<Piece> pieces = pieces_of(problem, whole);
  GkaJob job = job_of(problem, outputs);
  job.num_pieces = static_cast<int64_t>(pieces.size());
  if (job.num_pieces == 0) return report_of(problem);
  const bool segmented = pieces.size() > problem.sequences.size();
  const bool listed = !are_rows(problem, pieces);
  const int64_t piece_bytes = listed ? job.num_pieces * static_cast<int64_t>(sizeof(Piece)) : 0;
  const Workspace list(piece_bytes, stream);
  if (listed) {
    copy_to_device(list.data(), pieces.data(), piece_bytes, stream);
    job.pieces = static_cast<const Piece*>(list.data());
  }
  const Workspace states(segmented ? states_bytes(problem, job.num_pieces) : 0, stream);
  const Workspace decays(segmented ? decays_bytes(problem, job.num_pieces) : 0, stream);
  job.states = states.data();
  job.decays = static_cast<double*>(decays.data());
  const Workspace scratch(plan_tokens(job, float64, !segmented, device.max_shared), stream);
  job.scratch = scratch.data();
  if (segmented) launch_segments(job, float64, stream);
  launch_tokens(job, float64, stream);
  return report_of(problem);
}

class CudaBackend final : public core::GkaBackend {
 public:
  Backend id() const noexcept override { return Backend::cuda; }

  std::string describe() const override {
    const DeviceInfo& device = device_info();
    if (device.count == 0) throw Error(ErrorCode::unsupported, "backend", device.problem);
    return core::text("forward, backward and step; chebyshev, direct, auto; ", device.count,
                      device.count == 1 ? " GPU: " : " GPUs; current: ", device.current);
  }

  std::string refuses(const core::GkaProblem& problem) const override {
    const GkaOptions& options = problem.options;
    if (options.solver == Solver::cg) {
      return "solver cg is not available on the cuda backend; pass solver chebyshev, direct or "
             "auto";
    }
    // A grid's second dimension counts heads.
    if (problem.H > 65535) {
      return core::text(problem.H, " heads are more than the cuda backend's 65535");
    }
    return {};
  }

  GkaReport forward(const core::GkaProblem& problem, const GkaOutputs& outputs) const override {
    core::GkaProblem direct = problem, chebyshev = problem;
    direct.options.solver = Solver::direct;
    chebyshev.options.solver = Solver::chebyshev;
    // (Where direct alone is on matrix units, no step of chebyshev's is cheaper.)
    const int most_steps = !fits_chunks(direct, outputs)     ? kStepsOfADirectSolve
                           : fits_chunks(chebyshev, outputs) ? kStepsOfADirectChunk
                                                             : 0;
    return with_solver(problem, most_steps, [&](const auto& p) { return run(p, outputs, false); });
  }
  GkaReport step(const core::GkaProblem& problem, const GkaOutputs& outputs) const override {
    return with_solver(problem, kStepsOfADirectSolve,
                       [&](const auto& p) { return run(p, outputs, true); });
  }
  // x is solved for again, saved or not: what it was rounded to would show in the gradients.
  GkaReport backward(const core::GkaProblem& problem, const GkaSaved&,
                     const GkaOutputGrads& output_grads,
                     const GkaInputGrads& grads) const override {
    const DeviceInfo& device = device_info();
    if (device.count == 0) {
      throw Error(ErrorCode::unsupported, "backend", "cuda: " + device.problem);
    }
    if (problem.options.arithmetic != Arithmetic::standard &&
        !fits_backward_chunks(problem, output_grads, grads, device)) {
      throw Error(
          ErrorCode::unsupported, "backend",
          "arithmetic bfloat16 on the cuda backend is for bfloat16 q, k, v, d_o and gradients, K "
          "and V multiples of 8 up to 128, dense in their last dimension and aligned to 16 bytes; "
          "pass arithmetic standard");
    }
    // (As in the forward.)
    const auto fits = [&](Solver solver) {
      core::GkaProblem with = problem;
      with.options.solver = solver;
      return fits_backward_chunks(with, output_grads, grads, device);
    };
    const bool alone = fits(Solver::direct) && !fits(Solver::chebyshev);
    return with_solver(problem, alone ? 0 : kStepsOfADirectSolve, [&](const auto& p) {
      GkaReport report = report_of(p);
      if (run_backward(p, output_grads, grads, device)) {
        report.chunk_size = ChunkLayout::kTokens;
        report.bfloat16_instructions = true;
        if (p.options.arithmetic != Arithmetic::standard) report.bfloat16_solves = report.solves;
      }
      return report;
    });
  }
  int64_t workspace_bytes(GkaOperation operation, const core::GkaProblem& asked,
                          const GkaShape&) const override {
    // A shape does not say whether each token has its own ridge ratio: direct, which takes more.
    core::GkaProblem problem = asked;
    if (problem.options.solver == Solver::automatic) problem.options.solver = Solver::direct;
    const DeviceInfo& device = device_info();
    if (operation == GkaOperation::backward) return most_backward_bytes(problem, device);
    const std::vector<Piece> pieces = pieces_of(problem, operation == GkaOperation::step);
    const int64_t n = static_cast<int64_t>(pieces.size());
    // (As if the matrix-unit kernels computed it, which take more.)
    GkaJob job = job_of(problem, {});
    job.num_pieces = n;
    int64_t bytes = plan_tokens(job, problem.dtype == DType::float64, false, device.max_shared) +
                    n * static_cast<int64_t>(sizeof(Piece));
    if (operation == GkaOperation::forward && have_chunk_dims(problem) &&
        core::is_half(problem.dtype)) {
      bytes += n * problem.H * (chunk_scratch_bytes() + static_cast<int64_t>(sizeof(int32_t))) +
               short_plan_bytes(n, problem.H);
    }
    if (operation == GkaOperation::forward) {
      bytes += states_bytes(problem, n) + decays_bytes(problem, n);
    }
    return bytes;
  }
};

}  // namespace

const core::GkaBackend& gka_backend() {
  static const CudaBackend backend;
  return backend;
}

}  // namespace kalmanet::cuda
