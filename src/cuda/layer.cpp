// The layer's small operations on the GPU: their kernels in order, and the sums of what many
// threads leave.
#include "cuda/layer.hpp"

#include <utility>

#include "cuda/layer_launch.hpp"
#include "cuda/layer_plan.hpp"
#include "cuda/workspace.hpp"
#include "kalmanet/error.hpp"

namespace kalmanet::cuda {
namespace {

constexpr int64_t kDouble = static_cast<int64_t>(sizeof(double));

void require_gpu() {
  const DeviceInfo& device = device_info();
  if (device.count == 0) throw Error(ErrorCode::unsupported, "backend", "cuda: " + device.problem);
}

int64_t groups_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// `result` (`columns` wide) receives the sum of `count` rows of parts, added in float64 in an order
// that depends on `count` alone.
void sum_into(const View& result, int64_t columns, const double* parts, int64_t count,
              int64_t width, Stream stream) {
  if (width == 0) return;
  const int64_t first = groups_of(count, kPartsAThread);
  const Workspace a(first * width * kDouble, stream);
  const Workspace b(groups_of(first, kPartsAThread) * width * kDouble, stream);
  double *to = static_cast<double*>(a.data()), *other = static_cast<double*>(b.data());
  while (count > kPartsAThread) {
    launch_sum({parts, to, count, width, {}, columns}, stream);
    count = groups_of(count, kPartsAThread);
    parts = to;
    std::swap(to, other);
  }
  // (With no parts at all, zeros: one group of none.)
  SumJob last{parts, nullptr, count, width, array_of(result), columns};
  if (result.rank == 1) last.result.stride[1] = result.stride[0], last.columns = width;
  launch_sum(last, stream);
}

}  // namespace

void causal_conv_forward(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                         const View& y, const View& final_state, bool silu, void* stream) {
  require_gpu();
  std::vector<ConvSpan> spans;
  const bool vectors = fits_conv_vectors(inputs, {y});
  const int64_t channels = vectors ? conv_channels(inputs.x.dtype, false) : 1;
  ConvJob job =
      conv_job(inputs, sequences,
               vectors ? conv_vector_tokens(inputs, channels) : kConvForwardTokens, silu, spans);
  job.vectors = vectors;
  job.y = array_of(y);
  job.final_state = array_of(final_state);
  const int64_t bytes = static_cast<int64_t>(spans.size() * sizeof(ConvSpan));
  const Workspace list(bytes, stream);
  if (bytes > 0) {
    copy_to_device(list.data(), spans.data(), bytes, stream);
    job.spans = static_cast<const ConvSpan*>(list.data());
  }
  launch_conv(job, false, inputs.x.dtype == DType::float64, stream);
}

void causal_conv_backward(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                          const ConstView& dy, const ConstView& d_final_state, const View& dx,
                          const View& dweight, const View& dstate, bool silu, void* stream) {
  require_gpu();
  std::vector<ConvSpan> spans;
  const bool vectors = fits_conv_vectors(inputs, {dy, dx});
  const int64_t channels = vectors ? conv_channels(inputs.x.dtype, true) : 1;
  ConvJob job =
      conv_job(inputs, sequences,
               vectors ? conv_vector_tokens(inputs, channels) : kConvBackwardTokens, silu, spans);
  job.vectors = vectors;
  job.dy = array_of(dy);
  job.d_final = array_of(d_final_state);
  job.dx = array_of(dx);
  job.dstate = array_of(dstate);
  const int64_t bytes = static_cast<int64_t>(spans.size() * sizeof(ConvSpan));
  const Workspace list(bytes, stream);
  if (bytes > 0) {
    copy_to_device(list.data(), spans.data(), bytes, stream);
    job.spans = static_cast<const ConvSpan*>(list.data());
  }
  const int64_t width = job.D * job.W;
  const int64_t count = vectors ? groups_of(job.num_spans, kConvSpans) : job.num_spans;
  const Workspace parts(dweight.defined() ? count * width * kDouble : 0, stream);
  job.parts = static_cast<double*>(parts.data());
  launch_conv(job, true, inputs.x.dtype == DType::float64, stream);
  if (dweight.defined()) sum_into(dweight, job.W, job.parts, count, width, stream);
}

void causal_conv_step(const ConstView& x, const ConstView& weight, const View& state, const View& y,
                      bool silu, void* stream) {
  // [N,D] as N sequences of one token.
  const auto one_token = [](auto view) {
    view.rank = 3;
    view.size = {view.size[0], 1, view.size[1]};
    view.stride = {view.stride[0], 0, view.stride[1]};
    return view;
  };
  ConvInputs inputs{one_token(x), weight, state, {}};
  std::vector<core::Sequence> sequences;
  sequences.reserve(static_cast<size_t>(x.size[0]));
  for (int64_t n = 0; n < x.size[0]; ++n) sequences.push_back({n, n, 0, 1});
  causal_conv_forward(inputs, sequences, one_token(y), state, silu, stream);
}

void gated_rms_norm_forward(const NormInputs& inputs, const View& y, void* stream) {
  require_gpu();
  NormJob job = norm_job(inputs);
  job.y = array_of(y);
  choose_norm_vectors(job, {inputs.o, inputs.gate, y}, inputs.weight);
  launch_norm(job, false, inputs.o.dtype == DType::float64, stream);
}

void gated_rms_norm_backward(const NormInputs& inputs, const ConstView& dy, const View& d_o,
                             const View& d_gate, const View& d_weight, void* stream) {
  require_gpu();
  const bool float64 = inputs.o.dtype == DType::float64;
  NormJob job = norm_job(inputs);
  job.dy = array_of(dy);
  job.d_o = array_of(d_o);
  job.d_gate = array_of(d_gate);
  choose_norm_vectors(job, {inputs.o, inputs.gate, dy, d_o, d_gate}, inputs.weight);
  const bool plain = job.lanes == 0;
  const int64_t rows = plain ? kNormRowsAPart : kNormVectorRows;
  const int64_t count = d_weight.defined() ? groups_of(job.R, rows) : 0;
  const Workspace inverse(d_weight.defined() && plain ? job.R * kDouble : 0, stream);
  const Workspace parts(count * job.V * kDouble, stream);
  job.inverse = static_cast<double*>(inverse.data());
  job.parts = static_cast<double*>(parts.data());
  launch_norm(job, true, float64, stream);
  if (!d_weight.defined()) return;
  if (plain) launch_norm_weight(job, float64, stream);
  sum_into(d_weight, 1, job.parts, count, job.V, stream);
}

void unit_norm_forward(const UnitNormInputs& inputs, const View& y, void* stream) {
  require_gpu();
  NormJob job = norm_job(inputs);
  job.y = array_of(y);
  choose_norm_vectors(job, {inputs.x, y}, {});
  launch_norm(job, false, inputs.x.dtype == DType::float64, stream);
}

void unit_norm_backward(const UnitNormInputs& inputs, const ConstView& dy, const View& dx,
                        void* stream) {
  require_gpu();
  NormJob job = norm_job(inputs);
  job.dy = array_of(dy);
  job.d_o = array_of(dx);
  choose_norm_vectors(job, {inputs.x, dy, dx}, {});
  launch_norm(job, true, inputs.x.dtype == DType::float64, stream);
}

}  // namespace kalmanet::cuda
