// Gradients that several heads add to, where their numbers are too short to be added up in.
#pragma once

#include <cstdint>

#include "core/half.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/gka_jobs.hpp"
#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

// A gradient of 16-bit numbers that several heads add to (fewer key, value or query heads than H)
// is added up in float32 and rounded once, when the last of them is done. Heads of a task run in
// order, so one sequence's rows of one shared head at a time are all that is kept: 4 bytes an
// element.
class SharedGradient {
 public:
  SharedGradient(const View& gradient, const core::Sequence& sequence, int64_t group)
      : gradient_(gradient),
        sequence_(sequence),
        group_(group),
        summed_(gradient.defined() && core::is_half(gradient.dtype) && group > 1),
        sums_(summed_ ? sequence.length() * gradient.size[3] : 0) {}

  // Where a head's kernel writes: the gradient itself, or the sums.
  void redirect(OutRows& rows) const {
    if (!summed_) return;
    const int64_t width = gradient_.size[3];
    // Kernels count tokens from the start of the batch row.
    const auto before = static_cast<uintptr_t>(sequence_.begin * width) * sizeof(float);
    rows.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(sums_.data()) - before);
    rows.dtype = DType::float32;
    rows.token_stride = width;
    rows.stride = 1;
  }

  // After head `head` has added its part.
  void finish(int64_t head, const ConvertKernels& convert) const {
    if (!summed_ || (head + 1) % group_ != 0) return;
    const OutRows to = out_rows_of(gradient_, sequence_.row, head / group_);
    const int64_t width = gradient_.size[3];
    for (int64_t t = 0; t < sequence_.length(); ++t) {
      auto* row = static_cast<uint16_t*>(to.data) + (sequence_.begin + t) * to.token_stride;
      convert.store(to.dtype, sums_.data() + t * width, width, row, to.stride);
    }
  }

 private:
  const View& gradient_;
  const core::Sequence& sequence_;
  int64_t group_;
  bool summed_;
  ScratchLease<float> sums_;
};

// Those of one task: the heads of one sequence that share any.
struct SharedGradients {
  SharedGradients(const core::GkaProblem& p, const GkaInputGrads& grads,
                  const core::Sequence& sequence)
      : dq(grads.dq, sequence, p.q_group),
        dk(grads.dk, sequence, p.k_group),
        dv(grads.dv, sequence, p.v_group) {}

  template <class S>
  void redirect(GkaBackwardJob<S>& job) const {
    dq.redirect(job.dq);
    dk.redirect(job.dk);
    dv.redirect(job.dv);
  }
  void finish(int64_t head) const {
    const ConvertKernels& convert = kernels().convert;
    dq.finish(head, convert);
    dk.finish(head, convert);
    dv.finish(head, convert);
  }

  SharedGradient dq, dk, dv;
};

}  // namespace kalmanet::cpu
