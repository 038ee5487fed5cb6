// The layer's decode step: a task is one head of one sequence, from the projections' numbers to the
// normed output, in a thread's own scratch, by the kernels of the separate operations.
#include "cpu/layer_step.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/conv_data.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/gka_split.hpp"
#include "cpu/gka_step_states.hpp"
#include "cpu/rows.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {
namespace {

using conv::TapPlane;
using conv::TapRows;

template <class S>
const ConvKernels<S>& conv_kernels_of(const KernelTable& table) {
  if constexpr (std::is_same_v<S, double>) {
    return table.conv_float64;
  } else {
    return table.conv;
  }
}
template <class S>
const NormKernels<S>& norm_kernels_of(const KernelTable& table) {
  if constexpr (std::is_same_v<S, double>) {
    return table.norm_float64;
  } else {
    return table.norm;
  }
}

// A task's memory. Rows are `width` apart, whatever they hold.
template <class S>
struct Work {
  int64_t width;
  S *past, *weight, *taps;      // a convolution: W + T rows; W rows; W rows
  S *q, *k, *v, *o, *gate;      // T rows each
  S *beta, *alpha, *g, *ridge;  // T numbers each
  S* norm_weight;               // one row
  S *states, *step;

  Work(int64_t K, int64_t V, int64_t T) : width(padded(std::max(K, V))), T_(T) {}
  // Elements taken from base; null: only counted.
  int64_t carve(S* base, int64_t K, int64_t V, int64_t taps_count, Solver solver) {
    int64_t taken = 0;
    const auto take = [&taken, base](int64_t n) {
      S* const p = base == nullptr ? nullptr : base + taken;
      taken += padded(n);
      return p;
    };
    past = take((taps_count + T_) * width);
    weight = take(taps_count * width);
    taps = take(taps_count * width);
    for (S** rows : {&q, &k, &v, &o, &gate}) *rows = take(T_ * width);
    for (S** numbers : {&beta, &alpha, &g, &ridge}) *numbers = take(T_);
    norm_weight = take(width);
    states = take(state_floats(K, V));
    step = take(step_scratch_floats(K, V, solver));
    return taken;
  }

 private:
  int64_t T_;
};

// Head `head` of sequence n of a [N,T,heads,width] tensor, token by token.
template <class Void, class V>
Plane<Void> head_rows(const V& view, int64_t n, int64_t head) {
  if (!view.defined()) return {};
  const int64_t at = n * view.stride[0] + head * view.stride[2];
  return {shifted(view.data, view.dtype, at), view.dtype, view.stride[1],
          view.size[3] == 1 ? 1 : view.stride[3]};
}

// Head `head`'s channels of a convolution: rows in, and its state in the same pass.
struct HeadConv {
  ConstView x, weight;
  View state;
  int64_t channels;

  int64_t taps() const { return weight.size[1]; }
  TapPlane<void> state_of(int64_t n, int64_t head) const {
    const int64_t at = n * state.stride[0] + head * channels * state.stride[1];
    return {shifted(state.data, state.dtype, at), state.dtype, state.stride[1], state.stride[2]};
  }

  // The state's W rows, then the T tokens, into work.past.
  template <class S>
  TapRows<S> load(int64_t n, int64_t head, const Work<S>& work) const {
    const TapPlane<void> s = state_of(n, head);
    TapRows<S> rows{};
    for (int64_t w = 0; w < taps(); ++w) rows[w] = work.past + w * work.width;
    conv::transpose(TapPlane<const void>{s.data, s.dtype, s.stride, s.tap_stride}, channels, taps(),
                    rows, work.taps);
    const Plane<const void> tokens = head_rows<const void>(x, n, head);
    for (int64_t t = 0; t < x.size[1]; ++t) {
      tokens.read(t, channels, work.past + (taps() + t) * work.width);
    }
    return rows;
  }
  // The last W of the rows that load() left, as the new state.
  template <class S>
  void store(int64_t n, int64_t head, const Work<S>& work) const {
    TapRows<S> rows{};
    for (int64_t w = 0; w < taps(); ++w) rows[w] = work.past + (x.size[1] + w) * work.width;
    conv::transpose(rows, channels, taps(), state_of(n, head), work.taps);
  }
  // to_t = silu(sum_j weight_j x_{t-W+1+j}).
  template <class S>
  void run(const ConvKernels<S>& table, int64_t n, int64_t head, bool keep, const Work<S>& work,
           S* to) const {
    load(n, head, work);
    TapRows<S> rows{};
    for (int64_t w = 0; w < taps(); ++w) rows[w] = work.weight + w * work.width;
    const int64_t at = head * channels * weight.stride[0];
    conv::transpose(TapPlane<const void>{shifted(weight.data, weight.dtype, at), weight.dtype,
                                         weight.stride[0], weight.stride[1]},
                    channels, taps(), rows, work.taps);
    ConvForwardJob<S> job;
    job.in.past = work.past + work.width;  // the oldest of the W inputs is never used
    job.in.past_stride = work.width;
    job.in.x = work.past + taps() * work.width;
    job.in.x_stride = work.width;
    job.in.rows = x.size[1];
    job.in.channels = channels;
    job.in.width = taps();
    job.in.weight = work.weight;
    job.in.weight_stride = work.width;
    job.y = to;
    job.y_stride = work.width;
    job.silu = true;
    table.forward(job);
    if (keep) store(n, head, work);
  }
};

// Rows of n elements to norm 1, the sums of squares in float64.
template <class S>
void normalise(S* rows, int64_t count, int64_t stride, int64_t n, QkNorm norm) {
  for (int64_t t = 0; t < count; ++t) {
    S* row = rows + t * stride;
    double sums[4] = {};
    int64_t c = 0;
    for (; c + 4 <= n; c += 4) {
      for (int64_t i = 0; i < 4; ++i) sums[i] += static_cast<double>(row[c + i]) * row[c + i];
    }
    for (; c < n; ++c) sums[0] += static_cast<double>(row[c]) * row[c];
    const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const auto gain = static_cast<S>(norm == QkNorm::official ? 1.0 / (std::sqrt(sum) + 1e-6)
                                                              : 1.0 / std::sqrt(sum + 1e-6));
    for (c = 0; c < n; ++c) row[c] *= gain;
  }
}

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}
double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <class S>
S element(const ConstView& vector, int64_t i) {
  return value_at<S>({vector.data, vector.dtype, vector.stride[0]}, i, S{0});
}

template <class S>
class Step {
 public:
  Step(const core::GkaProblem& problem, const LayerStepInputs& in, const LayerStepStates& states,
       const View& o, const View& residual, const LayerStepOptions& options)
      : p_(problem),
        in_(in),
        options_(options),
        o_(o),
        q_{in.q, in.conv_q_weight, states.conv_q, problem.K},
        k_{in.k, in.conv_k_weight, states.conv_k, problem.K},
        v_{in.v, in.conv_v_weight, states.conv_v, problem.V} {
    core_out_.h_final = states.h;
    core_out_.u_final = states.u;
    core_out_.residual = residual;
  }

  GkaReport run() {
    GkaReport report{Backend::cpu, instruction_set(), 1, 0, 0};
    std::vector<SolverCount> counts(static_cast<size_t>(p_.B * p_.H));
    p_.executor->run(p_.B * p_.H,
                     [&](int64_t i) { head(i / p_.H, i % p_.H, counts[static_cast<size_t>(i)]); });
    // What several heads have read is updated when all are done.
    keep_shared(q_, p_.q_group);
    keep_shared(k_, p_.k_group);
    if (in_.conv_v_weight.defined()) keep_shared(v_, p_.v_group);
    merge_counts(counts, report);
    return report;
  }

 private:
  int64_t taps() const { return q_.taps(); }
  Work<S> work() const { return Work<S>(p_.K, p_.V, p_.T); }

  void head(int64_t n, int64_t h, SolverCount& count) {
    const int64_t K = p_.K, V = p_.V, T = p_.T;
    Work<S> w = work();
    ScratchLease<S> lease(w.carve(nullptr, K, V, taps(), p_.options.solver));
    w.carve(lease.data(), K, V, taps(), p_.options.solver);
    const ConvKernels<S>& table = conv_kernels_of<S>(kernels());
    q_.run(table, n, h / p_.q_group, p_.q_group == 1, w, w.q);
    k_.run(table, n, h / p_.k_group, p_.k_group == 1, w, w.k);
    if (in_.conv_v_weight.defined()) {
      v_.run(table, n, h / p_.v_group, p_.v_group == 1, w, w.v);
    } else {
      const Plane<const void> rows = head_rows<const void>(in_.v, n, h / p_.v_group);
      for (int64_t t = 0; t < T; ++t) rows.read(t, V, w.v + t * w.width);
    }
    normalise(w.q, T, w.width, K, options_.qk_norm);
    normalise(w.k, T, w.width, K, options_.qk_norm);
    gates(n, h, w);

    GkaStepJob<S> job;
    job.in = core_inputs(w);
    job.end = T;
    job.o = {w.o, DTypeOf<S>::value, w.width, 1};
    job.residual = out_column_of(core_out_.residual, n, h);
    job.scratch = w.step;
    job.count = &count;
    const StateBuffers<S> buffers = state_at(w.states, K);
    begin_step(p_, core_out_, n, h, buffers, job);
    kernels_of<S>(kernels()).gka_step(job);
    end_step(p_, core_out_, n, h, buffers, job);
    write_normed(n, h, w);
  }

  void gates(int64_t n, int64_t h, const Work<S>& w) const {
    const Column b = column_of(in_.b, n, h), alpha = column_of(in_.alpha, n, h);
    const Column a = column_of(in_.a, n, h), ridge = column_of(in_.ridge, n, h);
    const double rate = a.data == nullptr ? 0.0 : -std::exp(double{element<S>(in_.A_log, h)});
    const double bias = a.data == nullptr ? 0.0 : double{element<S>(in_.dt_bias, h)};
    const double low = std::log(options_.min_ridge), high = std::log(options_.max_ridge);
    for (int64_t t = 0; t < p_.T; ++t) {
      const auto at = [t](const Column& c) { return double{value_at<S>(c, t, S{0})}; };
      w.beta[t] = static_cast<S>(sigmoid(at(b)) + 1e-6);
      w.alpha[t] =
          static_cast<S>(alpha.data != nullptr ? sigmoid(at(alpha)) : options_.fixed_alpha);
      w.g[t] = static_cast<S>(rate * softplus(at(a) + bias));
      w.ridge[t] = static_cast<S>(std::exp(std::clamp(at(ridge), low, high)));
    }
  }

  HeadInputs core_inputs(const Work<S>& w) const {
    constexpr DType dtype = DTypeOf<S>::value;
    HeadInputs in;
    in.K = p_.K;
    in.V = p_.V;
    in.q = {w.q, dtype, w.width, 1};
    in.k = {w.k, dtype, w.width, 1};
    in.v = {w.v, dtype, w.width, 1};
    if (in_.b.defined()) in.beta = {w.beta, dtype, 1};
    in.alpha = {w.alpha, dtype, 1};
    if (in_.a.defined()) in.g = {w.g, dtype, 1};
    if (in_.a.defined() && options_.decay_h) in.gk = in.g;
    if (in_.ridge.defined()) in.ridge = {w.ridge, dtype, 1};
    in.scale = p_.scale;
    in.ridge_ratio = p_.options.ridge_ratio;
    in.solver = p_.options.solver;
    in.num_iter = p_.options.num_iter;
    in.tolerance = p_.options.tolerance;
    return in;
  }

  // o_norm * o / rms(o) * silu(gate), in the scratch, then rounded once to where the caller wants
  // it.
  void write_normed(int64_t n, int64_t h, const Work<S>& w) const {
    const int64_t V = p_.V, T = p_.T;
    read_strided(in_.o_norm.dtype, in_.o_norm.data, 0, in_.o_norm.stride[0], V, w.norm_weight);
    const Plane<const void> gate = head_rows<const void>(in_.gate, n, h);
    for (int64_t t = 0; t < T && gate.defined(); ++t) gate.read(t, V, w.gate + t * w.width);
    NormForwardJob<S> job;
    job.in.o = w.o;
    job.in.o_stride = w.width;
    job.in.gate = gate.defined() ? w.gate : nullptr;
    job.in.gate_stride = w.width;
    job.in.weight = w.norm_weight;
    job.in.rows = T;
    job.in.dim = V;
    job.in.eps = options_.norm_eps;
    job.y = w.o;
    job.y_stride = w.width;
    norm_kernels_of<S>(kernels()).forward(job);
    const Plane<void> to = head_rows<void>(o_, n, h);
    for (int64_t t = 0; t < T; ++t) to.write(w.o + t * w.width, V, t);
  }

  // A task is a sequence: one head's taps alone would not pay for a task.
  void keep_shared(const HeadConv& conv, int64_t group) const {
    if (group == 1) return;
    p_.executor->run(p_.B, [&](int64_t n) {
      Work<S> w = work();
      ScratchLease<S> lease(w.carve(nullptr, p_.K, p_.V, taps(), p_.options.solver));
      w.carve(lease.data(), p_.K, p_.V, taps(), p_.options.solver);
      for (int64_t h = 0; h < p_.H / group; ++h) {
        conv.load(n, h, w);
        conv.store(n, h, w);
      }
    });
  }

  const core::GkaProblem& p_;
  const LayerStepInputs& in_;
  const LayerStepOptions& options_;
  View o_;
  GkaOutputs core_out_;
  HeadConv q_, k_, v_;
};

}  // namespace

GkaReport layer_step(const core::GkaProblem& problem, const LayerStepInputs& inputs,
                     const LayerStepStates& states, const View& o, const View& residual,
                     const LayerStepOptions& options) {
  if (problem.dtype == DType::float64) {
    return Step<double>(problem, inputs, states, o, residual, options).run();
  }
  return Step<float>(problem, inputs, states, o, residual, options).run();
}

}  // namespace kalmanet::cpu
