// From a validated decode step of a layer to the jobs of its three parts.
#include "cuda/layer_step_plan.hpp"

#include <cmath>
#include <initializer_list>

#include "core/half.hpp"
#include "cuda/layer_plan.hpp"
#include "cuda/plan.hpp"
#include "cuda/step_kernel.hpp"

namespace kalmanet::cuda {
namespace {

// The parts' memory in one piece: each tensor at a boundary that any load likes.
class Memory {
 public:
  explicit Memory(void* base) : base_(static_cast<char*>(base)) {}
  View take(DType dtype, std::initializer_list<int64_t> sizes) {
    View view =
        dense(static_cast<void*>(base_ == nullptr ? nullptr : base_ + taken_), dtype, sizes);
    int64_t bytes = size_of(dtype);
    for (int64_t size : sizes) bytes *= size;
    taken_ += (bytes + 255) / 256 * 256;
    return view;
  }
  int64_t taken() const { return taken_; }

 private:
  char* base_;
  int64_t taken_ = 0;
};

struct Tensors {
  View q, k, v, o, gate[kLayerGates];
};

bool has_gate(int which, const LayerStepInputs& in, double fixed_alpha) {
  switch (which) {
    case kLayerBeta:
      return in.b.defined();
    case kLayerAlpha:
      return in.alpha.defined() || fixed_alpha != 1.0;
    case kLayerDecay:
      return in.a.defined();
    default:
      return in.ridge.defined();
  }
}

Tensors take_all(const core::GkaProblem& p, const LayerStepInputs& in, Memory& memory) {
  const DType fine = core::state_dtype(p);
  const bool by_few = core::is_half(p.dtype) && p.T >= kFewestTokensAtOnce &&
                      p.K == StepLayout::kDim && p.V == StepLayout::kDim;
  const DType between = by_few ? p.dtype : fine;
  Tensors t;
  t.q = memory.take(between, {p.B, p.T, in.q.size[2], p.K});
  t.k = memory.take(between, {p.B, p.T, in.k.size[2], p.K});
  t.v = memory.take(between, {p.B, p.T, in.v.size[2], p.V});
  t.o = memory.take(p.dtype, {p.B, p.T, p.H, p.V});
  for (View& gate : t.gate) gate = memory.take(fine, {p.B, p.T, p.H});
  return t;
}

LayerConv conv_of(const ConstView& x, const ConstView& weight, const View& state, const View& y,
                  bool unit) {
  LayerConv conv;
  conv.x = array_of(x);
  conv.y = array_of(y);
  conv.heads = x.size[2];
  conv.width = x.size[3];
  conv.unit = unit;
  if (!weight.defined()) {
    if (x.dtype == y.dtype) conv.heads = 0;  // it is taken as it is
    return conv;
  }
  conv.weight = array_of(weight);
  conv.state = array_of(state);
  conv.weight_fours = in_fours(weight);
  conv.state_fours = in_fours(state);
  return conv;
}

// [N,T,H,V] as [N*T*H,V]; absent where no strides say so.
ConstView as_rows(const ConstView& view) {
  ConstView rows;
  for (int d = 0; d < 2; ++d) {
    if (view.size[d] > 1 && view.stride[d] != view.size[d + 1] * view.stride[d + 1]) return rows;
  }
  rows = view;
  rows.rank = 2;
  rows.size = {view.size[0] * view.size[1] * view.size[2], view.size[3]};
  rows.stride = {view.stride[2], view.stride[3]};
  return rows;
}

// The gated norm of rows, if they are such as are read 16 bytes at a time.
NormJob rows_norm_job(const View& o, const ConstView& gate, const ConstView& weight, const View& y,
                      double eps) {
  NormInputs in;
  in.o = as_rows(o);
  if (gate.defined()) in.gate = as_rows(gate);
  in.weight = weight;
  in.eps = eps;
  const ConstView to = as_rows(y);
  if (!to.defined() || gate.defined() != in.gate.defined()) return {};
  NormJob job = norm_job(in);
  job.y = array_of(to);
  choose_norm_vectors(job, {in.o, in.gate, to}, weight);
  return job;
}

}  // namespace

int64_t layer_step_bytes(const core::GkaProblem& problem, const LayerStepInputs& inputs) {
  Memory memory(nullptr);
  take_all(problem, inputs, memory);
  return memory.taken();
}

LayerStepPlan plan_layer_step(const core::GkaProblem& problem, const LayerStepInputs& inputs,
                              const LayerStepStates& states, const View& o, const View& residual,
                              const LayerStepOptions& options, void* memory) {
  Memory all(memory);
  const Tensors t = take_all(problem, inputs, all);
  LayerStepPlan plan;
  LayerBeforeJob& before = plan.before;
  before.N = problem.B;
  before.T = problem.T;
  before.H = problem.H;
  before.W = inputs.conv_q_weight.size[1];
  before.conv[0] = conv_of(inputs.q, inputs.conv_q_weight, states.conv_q, t.q, true);
  before.conv[1] = conv_of(inputs.k, inputs.conv_k_weight, states.conv_k, t.k, true);
  before.conv[2] = conv_of(inputs.v, inputs.conv_v_weight, states.conv_v, t.v, false);
  before.fla_norm = options.qk_norm == QkNorm::fla;
  const ConstView logits[kLayerGates] = {inputs.b, inputs.alpha, inputs.a, inputs.ridge};
  for (int which = 0; which < kLayerGates; ++which) {
    before.logit[which] = array_of(logits[which]);
    before.gate[which] = array_of(t.gate[which]);
    if (has_gate(which, inputs, options.fixed_alpha)) before.gates[before.num_gates++] = which;
  }
  before.A_log = array_of(inputs.A_log);
  before.dt_bias = array_of(inputs.dt_bias);
  before.fixed_alpha = options.fixed_alpha;
  before.min_log_ridge = std::log(options.min_ridge);
  before.max_log_ridge = std::log(options.max_ridge);

  plan.problem = problem;
  GkaInputs& core_in = plan.problem.inputs;
  const auto gate = [&](int which) {
    return has_gate(which, inputs, options.fixed_alpha) ? ConstView(t.gate[which]) : ConstView();
  };
  core_in.q = t.q;
  core_in.k = t.k;
  core_in.v = before.conv[2].heads == 0 ? inputs.v : ConstView(t.v);
  core_in.g = gate(kLayerDecay);
  if (options.decay_h) core_in.gk = core_in.g;
  core_in.alpha = gate(kLayerAlpha);
  core_in.beta = gate(kLayerBeta);
  core_in.ridge_ratio = gate(kLayerRidge);
  core_in.h0 = states.h;
  core_in.u0 = states.u;
  plan.outputs.o = t.o;
  plan.outputs.residual = residual;
  plan.outputs.h_final = states.h;
  plan.outputs.u_final = states.u;

  LayerAfterJob& after = plan.after;
  after.N = problem.B;
  after.T = problem.T;
  after.H = problem.H;
  after.V = problem.V;
  after.o = array_of(t.o);
  after.gate = array_of(inputs.gate);
  after.y = array_of(o);
  after.weight = array_of(inputs.o_norm);
  after.eps = options.norm_eps;
  plan.norm = rows_norm_job(t.o, inputs.gate, inputs.o_norm, o, options.norm_eps);
  return plan;
}

}  // namespace kalmanet::cuda
