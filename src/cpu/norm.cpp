// The gated RMS norm on the CPU: cuts the rows into tasks and hands the kernels rows of adjacent
// elements. What a task computes depends on the shapes only, never on the threads.
#include "cpu/norm.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/dispatch.hpp"

namespace kalmanet::cpu {
namespace {

// Elements a task has at least (about 10 microseconds of work).
constexpr int64_t kTaskElements = 16384;
// Rows whose weight gradients are summed in float32; their sums are added in float64.
constexpr int64_t kTileRows = 64;

// Rows of a view: element (r, c) is data[r * row_stride + c * stride].
template <class T>
struct Plane {
  T* data = nullptr;
  int64_t row_stride = 0;
  int64_t stride = 0;

  bool defined() const { return data != nullptr; }
  bool dense() const { return stride == 1; }
  T* row(int64_t r) const { return data + r * row_stride; }
};

template <class T, class V>
Plane<T> rows_of(const V& view) {
  if (!view.defined()) return {};
  return {static_cast<T*>(view.data), view.stride[0], view.size[1] == 1 ? 1 : view.stride[1]};
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
class Reader {
 public:
  Reader(const Plane<const float>& plane, const Plan& plan) : plane_(plane), dim_(plan.dim) {
    if (plane.defined() && !plane.dense()) buffer_.resize(plan.tile_rows * dim_);
  }
  const float* read(int64_t r, int64_t count) {
    if (!plane_.defined() || plane_.dense()) return plane_.defined() ? plane_.row(r) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const float* p = plane_.row(r + i);
      for (int64_t c = 0; c < dim_; ++c) buffer_[i * dim_ + c] = p[c * plane_.stride];
    }
    return buffer_.data();
  }
  int64_t stride() const { return plane_.dense() ? plane_.row_stride : dim_; }

 private:
  Plane<const float> plane_;
  int64_t dim_;
  std::vector<float> buffer_;
};

class Writer {
 public:
  Writer(const Plane<float>& plane, const Plan& plan) : plane_(plane), dim_(plan.dim) {
    if (plane.defined() && !plane.dense()) buffer_.resize(plan.tile_rows * dim_);
  }
  // Where the kernel writes rows [r, ...); flush() brings them to their place.
  float* at(int64_t r) {
    if (!plane_.defined()) return nullptr;
    return plane_.dense() ? plane_.row(r) : buffer_.data();
  }
  void flush(int64_t r, int64_t count) {
    if (!plane_.defined() || plane_.dense()) return;
    for (int64_t i = 0; i < count; ++i) {
      float* p = plane_.row(r + i);
      for (int64_t c = 0; c < dim_; ++c) p[c * plane_.stride] = buffer_[i * dim_ + c];
    }
  }
  int64_t stride() const { return plane_.dense() ? plane_.row_stride : dim_; }

 private:
  Plane<float> plane_;
  int64_t dim_;
  std::vector<float> buffer_;
};

// The weight as adjacent elements: the caller's, or a copy in `buffer`.
const float* dense_weight(const ConstView& weight, std::vector<float>& buffer) {
  const float* data = static_cast<const float*>(weight.data);
  if (weight.stride[0] == 1) return data;
  for (int64_t c = 0; c < weight.size[0]; ++c) buffer.push_back(data[c * weight.stride[0]]);
  return buffer.data();
}

// task(index of the task, its first row, one past its last).
template <class F>
void spread(const Plan& plan, Executor& executor, const F& task) {
  executor.run(plan.tasks, [&](int64_t i) {
    task(i, i * plan.task_rows, std::min((i + 1) * plan.task_rows, plan.rows));
  });
}

NormRows rows_job(const NormInputs& inputs, const Plan& plan, const float* weight) {
  NormRows job;
  job.weight = weight;
  job.dim = plan.dim;
  job.eps = inputs.eps;
  return job;
}

}  // namespace

void gated_rms_norm_forward(const NormInputs& inputs, const View& y, Executor& executor) {
  const KernelTable& table = kernels();
  const Plan plan = make_plan(inputs.o.size[0], inputs.o.size[1]);
  if (plan.dim == 0) return;
  std::vector<float> weight_copy;
  const float* weight = dense_weight(inputs.weight, weight_copy);
  spread(plan, executor, [&](int64_t, int64_t begin, int64_t end) {
    Reader o(rows_of<const float>(inputs.o), plan), gate(rows_of<const float>(inputs.gate), plan);
    Writer out(rows_of<float>(y), plan);
    NormForwardJob job;
    job.in = rows_job(inputs, plan, weight);
    job.in.o_stride = o.stride();
    job.in.gate_stride = gate.stride();
    job.y_stride = out.stride();
    for (int64_t r = begin; r < end; r += plan.tile_rows) {
      job.in.rows = std::min(plan.tile_rows, end - r);
      job.in.o = o.read(r, job.in.rows);
      job.in.gate = gate.read(r, job.in.rows);
      job.y = out.at(r);
      table.norm.forward(job);
      out.flush(r, job.in.rows);
    }
  });
}

void gated_rms_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                             const View& d_gate, const View& d_weight, Executor& executor) {
  const KernelTable& table = kernels();
  const Plan plan = make_plan(inputs.o.size[0], inputs.o.size[1]);
  if (plan.dim == 0) return;
  std::vector<float> weight_copy;
  const float* weight = dense_weight(inputs.weight, weight_copy);
  // Each task's part of the weight gradient, [tasks, V]; their sum is taken in the tasks' order.
  std::vector<double> parts;
  if (d_weight.defined()) parts.resize(plan.tasks * plan.dim);
  spread(plan, executor, [&](int64_t task, int64_t begin, int64_t end) {
    Reader o(rows_of<const float>(inputs.o), plan), gate(rows_of<const float>(inputs.gate), plan);
    Reader upstream(rows_of<const float>(dy), plan);
    Writer to_o(rows_of<float>(d_o), plan), to_gate(rows_of<float>(d_gate), plan);
    std::vector<float> tile_sum(d_weight.defined() ? plan.dim : 0);
    NormBackwardJob job;
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
      table.norm.backward(job);
      to_o.flush(r, job.in.rows);
      to_gate.flush(r, job.in.rows);
      if (!d_weight.defined()) continue;
      double* part = parts.data() + task * plan.dim;
      for (int64_t c = 0; c < plan.dim; ++c) part[c] += tile_sum[c];
      std::fill(tile_sum.begin(), tile_sum.end(), 0.0f);
    }
  });
  if (!d_weight.defined()) return;
  std::vector<double> sum(plan.dim);
  for (int64_t task = 0; task < plan.tasks; ++task) {
    for (int64_t c = 0; c < plan.dim; ++c) sum[c] += parts[task * plan.dim + c];
  }
  for (int64_t c = 0; c < plan.dim; ++c) {
    static_cast<float*>(d_weight.data)[c * d_weight.stride[0]] = static_cast<float>(sum[c]);
  }
}

}  // namespace kalmanet::cpu
