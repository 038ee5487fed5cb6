// From validated arguments to the jobs of the layer's kernels: strides, spans.
#include "cuda/layer_plan.hpp"

#include <algorithm>

namespace kalmanet::cuda {

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
  if (inputs.cu_seqlens.empty()) {
    const int64_t a_row = std::max<int64_t>((job.T + tokens - 1) / tokens, 1);
    job.num_spans = static_cast<int64_t>(sequences.size()) * a_row;
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
