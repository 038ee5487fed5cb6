// From validated arguments to the jobs of the layer's kernels.
#pragma once

#include <initializer_list>
#include <vector>

#include "core/problem.hpp"
#include "cuda/layer_job.hpp"
#include "cuda/plan.hpp"
#include "kalmanet/conv.hpp"
#include "kalmanet/norm.hpp"

namespace kalmanet::cuda {

// The spans of `tokens` of each sequence; an empty one has one empty span.
std::vector<ConvSpan> spans_of(const std::vector<core::Sequence>& sequences, int64_t tokens);

// All but the workspace. Where the sequences are packed, job.spans is for the caller to set to
// `spans` in the GPU's memory; else it is empty.
ConvJob conv_job(const ConvInputs& inputs, const std::vector<core::Sequence>& sequences,
                 int64_t tokens, bool silu, std::vector<ConvSpan>& spans);
// Whether conv_vectors.hpp computes it, from and to such tensors (absent ones fit).
bool fits_conv_vectors(const ConvInputs& inputs, std::initializer_list<ConstView> tensors);
// Tokens of a span there, `channels` of them a thread (kConvChannels). What a thread reads beside
// its own (weights, three tokens) counts less in longer spans, which fill fewer threads: the
// longest that give the chip as many blocks as it holds. One H200, bfloat16, B1 T8192, 4096
// channels: forward 49 us by spans of 16, 42 by 64; backward 109 by 16, 79 by 128.
int64_t conv_vector_tokens(const ConvInputs& inputs, int64_t channels);
// Whether the last dimension is four dense numbers, aligned for one load.
bool in_fours(const ConstView& taps);

NormJob norm_job(const NormInputs& inputs);
NormJob norm_job(const UnitNormInputs& inputs);
// Sets job.lanes where norm_vectors.hpp computes it: `rows` are all its [R,V], absent ones or not.
void choose_norm_vectors(NormJob& job, std::initializer_list<ConstView> rows,
                         const ConstView& weight);

}  // namespace kalmanet::cuda
