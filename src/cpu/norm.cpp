// The norms on the CPU: cuts the rows into tasks and hands the kernels rows of adjacent
// elements. What a task computes depends on the shapes only, never on the threads.
#include "cpu/norm.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/half.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/strided.hpp"

namespace kalmanet::cpu {
namespace {

// Elements a task has at least (about 10 microseconds of work).
constexpr int64_t kTaskElements = 16384;
// Rows whose weight gradients are summed in float32; their sums are added in float64.
constexpr int64_t kTileRows = 64;

template <class Void, class V>
Plane<Void> rows_of(const V& view) {
  if (!view.defined()) return {};
  return {view.data, view.dtype, view.stride[0], view.size[1] == 1 ? 1 : view.stride[1]};
}

struct Plan {
  int64_t rows, dim;
  int64_t task_rows;  // a multiple of tile_rows
  int64_t tile_rows;
  int64_t tasks;
};

Plan make_plan(int64_t rows, int64_t dim) {
  Plan plan{rows, dim, 0, 0, 0};
  plan.tile_rows = std::clamp<int64_t>(kTaskElements / std::max<int64_t>(dim, 1), 1, kTileRows);
  // 256 tasks are enough to share out; more of them would only cost more partial weight gradients.
  const int64_t wanted = std::max(kTaskElements / std::max<int64_t>(dim, 1), rows / 256);
  plan.task_rows =
      std::max<int64_t>((wanted + plan.tile_rows - 1) / plan.tile_rows, 1) * plan.tile_rows;
  plan.tasks = (rows + plan.task_rows - 1) / plan.task_rows;
  return plan;
}

// Rows [r, r + count) as the kernels take them: in place, or copied into a buffer of the task's
// own.
template <class S>
class Reader {
 public:
  Reader(const Plane<const void>& plane, const Plan& plan)
      : plane_(plane), dense_(plane.dense<S>()), dim_(plan.dim) {
    if (plane.defined() && !dense_) buffer_.resize(plan.tile_rows * dim_);
  }
  const S* read(int64_t r, int64_t count) {
    if (!plane_.defined()) return nullptr;
    if (dense_) return plane_.row<S>(r);
    plane_.read_rows(r, count, dim_, buffer_.data());
    return buffer_.data();
  }
  int64_t stride() const { return dense_ ? plane_.row_stride : dim_; }

 private:
  Plane<const void> plane_;
  bool dense_;
  int64_t dim_;
  std::vector<S> buffer_;
};

template <class S>
class Writer {
 public:
  Writer(const Plane<void>& plane, const Plan& plan)
      : plane_(plane), dense_(plane.dense<S>()), dim_(plan.dim) {
    if (plane.defined() && !dense_) buffer_.resize(plan.tile_rows * dim_);
  }
  // Where the kernel writes rows [r, ...); flush() brings them to their place.
  S* at(int64_t r) {
    if (!plane_.defined()) return nullptr;
    return dense_ ? plane_.row<S>(r) : buffer_.data();
  }
  void flush(int64_t r, int64_t count) {
    if (!plane_.defined() || dense_) return;
    plane_.write_rows(buffer_.data(), count, dim_, r);
  }
  int64_t stride() const { return dense_ ? plane_.row_stride : dim_; }

 private:
  Plane<void> plane_;
  bool dense_;
  int64_t dim_;
  std::vector<S> buffer_;
};

// The weight as adjacent elements: the caller's, or a copy in `buffer`.
template <class S>
const S* dense_weight(const ConstView& weight, std::vector<S>& buffer) {
  if (weight.stride[0] == 1 && weight.dtype == DTypeOf<S>::value) {
    return static_cast<const S*>(weight.data);
  }
  buffer.resize(weight.size[0]);
  read_strided(weight.dtype, weight.data, 0, weight.stride[0], weight.size[0], buffer.data());
  return buffer.data();
}

template <class S>
const NormKernels<S>& table_of() {
  if constexpr (std::is_same_v<S, double>) {
    return kernels().norm_float64;
  } else {
    return kernels().norm;
  }
}

// task(index of the task, its first row, one past its last).
template <class F>
void spread(const Plan& plan, Executor& executor, const F& task) {
  executor.run(plan.tasks, [&](int64_t i) {
    task(i, i * plan.task_rows, std::min((i + 1) * plan.task_rows, plan.rows));
  });
}

template <class S>
NormRows<S> rows_job(const NormInputs& inputs, const Plan& plan, const S* weight) {
  NormRows<S> job;
  job.weight = weight;
  job.dim = plan.dim;
  job.eps = inputs.eps;
  return job;
}

template <class S>
void forward_stored(const NormInputs& inputs, const View& y, Executor& executor) {
  const NormKernels<S>& table = table_of<S>();
  const Plan plan = make_plan(inputs.o.size[0], inputs.o.size[1]);
  if (plan.dim == 0) return;
  std::vector<S> weight_copy;
  const S* weight = dense_weight(inputs.weight, weight_copy);
  spread(plan, executor, [&](int64_t, int64_t begin, int64_t end) {
    Reader<S> o(rows_of<const void>(inputs.o), plan);
    Reader<S> gate(rows_of<const void>(inputs.gate), plan);
    Writer<S> out(rows_of<void>(y), plan);
    NormForwardJob<S> job;
    job.in = rows_job(inputs, plan, weight);
    job.in.o_stride = o.stride();
    job.in.gate_stride = gate.stride();
    job.y_stride = out.stride();
    for (int64_t r = begin; r < end; r += plan.tile_rows) {
      job.in.rows = std::min(plan.tile_rows, end - r);
      job.in.o = o.read(r, job.in.rows);
      job.in.gate = gate.read(r, job.in.rows);
      job.y = out.at(r);
      table.forward(job);
      out.flush(r, job.in.rows);
    }
  });
}

template <class S>
void backward_stored(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                     const View& d_gate, const View& d_weight, Executor& executor) {
  const NormKernels<S>& table = table_of<S>();
  const Plan plan = make_plan(inputs.o.size[0], inputs.o.size[1]);
  if (plan.dim == 0) return;
  std::vector<S> weight_copy;
  const S* weight = dense_weight(inputs.weight, weight_copy);
  // Each task's part of the weight gradient, [tasks, V]; their sum is taken in the tasks' order.
  std::vector<double> parts;
  if (d_weight.defined()) parts.resize(plan.tasks * plan.dim);
  spread(plan, executor, [&](int64_t task, int64_t begin, int64_t end) {
    Reader<S> o(rows_of<const void>(inputs.o), plan);
    Reader<S> gate(rows_of<const void>(inputs.gate), plan);
    Reader<S> upstream(rows_of<const void>(dy), plan);
    Writer<S> to_o(rows_of<void>(d_o), plan), to_gate(rows_of<void>(d_gate), plan);
    std::vector<S> tile_sum(d_weight.defined() ? plan.dim : 0);
    NormBackwardJob<S> job;
    job.in = rows_job(inputs, plan, weight);
    job.in.o_stride = o.stride();
    job.in.gate_stride = gate.stride();
    job.dy_stride = upstream.stride();
    job.d_o_stride = to_o.stride();
    job.d_gate_stride = to_gate.stride();
    job.d_weight = d_weight.defined() ? tile_sum.data() : nullptr;
    for (int64_t r = begin; r < end; r += plan.tile_rows) {
      job.in.rows = std::min(plan.tile_rows, end - r);
      job.in.o = o.read(r, job.in.rows);
      job.in.gate = gate.read(r, job.in.rows);
      job.dy = upstream.read(r, job.in.rows);
      job.d_o = to_o.at(r);
      job.d_gate = to_gate.at(r);
      table.backward(job);
      to_o.flush(r, job.in.rows);
      to_gate.flush(r, job.in.rows);
      if (!d_weight.defined()) continue;
      double* part = parts.data() + task * plan.dim;
      for (int64_t c = 0; c < plan.dim; ++c) part[c] += tile_sum[c];
      std::fill(tile_sum.begin(), tile_sum.end(), S{0});
    }
  });
  if (!d_weight.defined()) return;
  std::vector<double> sum(plan.dim);
  for (int64_t task = 0; task < plan.tasks; ++task) {
    for (int64_t c = 0; c < plan.dim; ++c) sum[c] += parts[task * plan.dim + c];
  }
  for (int64_t c = 0; c < plan.dim; ++c) {
    core::store_element(d_weight.dtype, d_weight.data, c * d_weight.stride[0], sum[c]);
  }
}

// y, or with a dy dx, into `to`.
template <class S>
void unit_norm_stored(const UnitNormInputs& inputs, const ConstView& dy, const View& to,
                      Executor& executor) {
  const NormKernels<S>& table = table_of<S>();
  const Plan plan = make_plan(inputs.x.size[0], inputs.x.size[1]);
  if (plan.dim == 0) return;
  spread(plan, executor, [&](int64_t, int64_t begin, int64_t end) {
    Reader<S> x(rows_of<const void>(inputs.x), plan), upstream(rows_of<const void>(dy), plan);
    Writer<S> out(rows_of<void>(to), plan);
    UnitNormJob<S> job;
    job.dim = plan.dim;
    job.eps = inputs.eps;
    job.fla = inputs.kind == QkNorm::fla;
    job.x_stride = x.stride();
    job.dy_stride = upstream.stride();
    job.to_stride = out.stride();
    for (int64_t r = begin; r < end; r += plan.tile_rows) {
      job.rows = std::min(plan.tile_rows, end - r);
      job.x = x.read(r, job.rows);
      job.dy = upstream.read(r, job.rows);
      job.to = out.at(r);
      table.unit_norm(job);
      out.flush(r, job.rows);
    }
  });
}

void unit_norm(const UnitNormInputs& inputs, const ConstView& dy, const View& to,
               Executor& executor) {
  const auto run =
      inputs.x.dtype == DType::float64 ? &unit_norm_stored<double> : &unit_norm_stored<float>;
  run(inputs, dy, to, executor);
}

}  // namespace

void gated_rms_norm_forward(const NormInputs& inputs, const View& y, Executor& executor) {
  const auto run =
      inputs.o.dtype == DType::float64 ? &forward_stored<double> : &forward_stored<float>;
  run(inputs, y, executor);
}

void gated_rms_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                             const View& d_gate, const View& d_weight, Executor& executor) {
  const auto run =
      inputs.o.dtype == DType::float64 ? &backward_stored<double> : &backward_stored<float>;
  run(inputs, dy, d_o, d_gate, d_weight, executor);
}

void unit_norm_forward(const UnitNormInputs& inputs, const View& y, Executor& executor) {
  unit_norm(inputs, {}, y, executor);
}

void unit_norm_backward(const UnitNormInputs& inputs, const ConstView& dy, const View& dx,
                        Executor& executor) {
  unit_norm(inputs, dy, dx, executor);
}

}  // namespace kalmanet::cpu
