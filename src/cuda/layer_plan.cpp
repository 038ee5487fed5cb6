// From validated arguments to the jobs of the layer's kernels: strides, spans.
#include "cuda/layer_plan.hpp"

#include <algorithm>

namespace kalmanet::cuda {
namespace {

// Rows of a last dimension that can be read and written 16 bytes at a time.
bool in_sixteens(const ConstView& view) {
  if (!view.defined()) return true;
  const int last = view.rank - 1;
  const int64_t count = 16 / size_of(view.dtype);
  for (int d = 0; d < last; ++d) {
    if (view.stride[d] % count != 0) return false;
  }
  return view.stride[last] == 1 && view.size[last] % count == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

}  // namespace

bool in_fours(const ConstView& taps) {
  const int last = taps.rank - 1;
  if (!taps.defined() || taps.size[last] != 4 || taps.stride[last] != 1) return false;
  for (int d = 0; d < last; ++d) {
    if (taps.stride[d] % 4 != 0) return false;
  }
  const uintptr_t bytes = size_of(taps.dtype) == 2 ? 8 : 16;  // (float64: two loads)
  return reinterpret_cast<uintptr_t>(taps.data) % bytes == 0;
}

bool fits_conv_vectors(const ConvInputs& inputs, std::initializer_list<ConstView> tensors) {
  if (inputs.x.dtype == DType::float64 || inputs.weight.size[1] != 4) return false;
  return in_sixteens(inputs.x) && std::all_of(tensors.begin(), tensors.end(), in_sixteens);
}

int64_t conv_vector_tokens(const ConvInputs& inputs, int64_t channels) {
  constexpr int64_t kLongest = 128, kShortest = 16;
  constexpr int64_t kBlocks = 512;  // whatever the chip: the weight's gradient is summed by spans
  const int64_t across = (inputs.x.size[2] + 32 * channels - 1) / (32 * channels);
  const int64_t all = inputs.x.size[0] * inputs.x.size[1];
  int64_t tokens = kLongest;
  while (tokens > kShortest && all / (tokens * kConvSpans) * across < kBlocks) tokens /= 2;
  return tokens;
}

void choose_norm_vectors(NormJob& job, std::initializer_list<ConstView> rows,
                         const ConstView& weight) {
  if (job.o.dtype == DType::float64 || job.V == 0) return;
  if (!std::all_of(rows.begin(), rows.end(), in_sixteens) || !in_sixteens(weight)) return;
  const int64_t count = 16 / size_of(job.o.dtype), vectors = job.V / count;
  const int loads = vectors > 32 ? 2 : 1;
  if (loads == 2 && (job.o.dtype != DType::float32 || vectors != 64)) return;
  const int64_t lanes = vectors / loads;
  if ((lanes & (lanes - 1)) != 0) return;
  job.loads = loads;
  job.lanes = static_cast<int>(lanes);
  for (job.lane_bits = 0; 1 << job.lane_bits < job.lanes;) ++job.lane_bits;
}

std::vector<ConvSpan> spans_of(const std::vector<core::Sequence>& sequences, int64_t tokens) {
  std::vector<ConvSpan> spans;
  for (const core::Sequence& s : sequences) {
    int64_t begin = s.begin;
    do {
      const int64_t end = std::min(begin + tokens, s.end);
      spans.push_back({s.row, begin, end, s.begin, s.end, s.index});
      begin = end;
    } while (begin < s.end);
  }
  return spans;
}

ConvJob conv_job(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                 int64_t tokens, bool silu, std::vector<ConvSpan>& spans) {
  ConvJob job;
  job.T = inputs.x.size[1];
  job.D = inputs.x.size[2];
  job.W = inputs.weight.size[1];
  job.x = array_of(inputs.x);
  job.weight = array_of(inputs.weight);
  job.state = array_of(inputs.state);
  job.silu = silu;
  job.tokens = tokens;
  job.weight_fours = in_fours(inputs.weight);
  job.spans_a_row = std::max<int64_t>((job.T + tokens - 1) / tokens, 1);
  if (inputs.cu_seqlens.empty()) {
    job.num_spans = static_cast<int64_t>(sequences.size()) * job.spans_a_row;
  } else {
    spans = spans_of(sequences, tokens);
    job.num_spans = static_cast<int64_t>(spans.size());
  }
  return job;
}

NormJob norm_job(const NormInputs& inputs) {
  NormJob job;
  job.R = inputs.o.size[0];
  job.V = inputs.o.size[1];
  job.o = array_of(inputs.o);
  job.gate = array_of(inputs.gate);
  job.weight = array_of(inputs.weight);
  job.eps = inputs.eps;
  return job;
}

NormJob norm_job(const UnitNormInputs& inputs) {
  NormJob job;
  job.R = inputs.x.size[0];
  job.V = inputs.x.size[1];
  job.o = array_of(inputs.x);
  job.eps = inputs.eps;
  job.unit = inputs.kind == QkNorm::fla ? UnitNorm::fla : UnitNorm::official;
  return job;
}

}  // namespace kalmanet::cuda
