// What the kernels of the convolution and the gated norm are told (as job.hpp does for GKA's).
#pragma once

#include <cstdint>

#include "cuda/job.hpp"

namespace kalmanet::cuda {

// Tokens that one thread takes of a channel. At least the widest window's past (kMaxConvWidth - 1),
// so that only a sequence's first span reads the state before it.
inline constexpr int64_t kConvForwardTokens = 16;
// More of them backward, where each span also recomputes the window that follows it and leaves a
// part of the weight gradient.
inline constexpr int64_t kConvBackwardTokens = 32;
// Of conv_vectors.hpp: a block is 32 threads side by side and kConvSpans spans.
inline constexpr int kConvThreads = 128, kConvSpans = kConvThreads / 32;
// Channels a thread.
constexpr int conv_channels(DType type, bool backward) {
  return type == DType::float32 || backward ? 4 : 8;
}
template <DType kType, bool kBackward>
inline constexpr int kConvChannels = conv_channels(kType, kBackward);

// Tokens [begin, end) of the sequence [first, last) in batch row `row`, counted in the row.
struct ConvSpan {
  int64_t row, begin, end, first, last, sequence;
};

struct ConvJob {
  int64_t T = 0, D = 0, W = 0;
  Array x, weight, state;           // [B,T,D], [D,W], [N,D,W]
  Array y, final_state;             // forward
  Array dy, d_final, dx, dstate;    // backward
  double* parts = nullptr;          // backward: of the weight gradient, [span][D][W] (vectors: a
                                    // block's spans are one); or null
  const ConvSpan* spans = nullptr;  // null: each row is one sequence, cut at `tokens`
  int64_t num_spans = 0, tokens = 0, spans_a_row = 1;
  bool silu = true;
  bool vectors = false;       // by conv_vectors.hpp
  bool weight_fours = false;  // a channel's taps are four dense numbers, aligned
};

// Of unit_norm: o is its x, d_o its dx; there is neither gate nor weight.
enum class UnitNorm : int { none, official, fla };

struct NormJob {
  int64_t R = 0, V = 0;
  Array o, gate, weight;      // [R,V], [R,V], [V]
  Array y;                    // forward
  Array dy, d_o, d_gate;      // backward
  double* inverse = nullptr;  // backward: 1 / sqrt(mean(o^2) + eps) of each row; or null
  double* parts = nullptr;    // backward: of the weight gradient, [group of rows][V]; or null
  double eps = 1e-6;
  UnitNorm unit = UnitNorm::none;
  int lanes = 0, lane_bits = 0;  // a row, 2^lane_bits (norm_vectors.hpp); 0: by norm_body.hpp
  int loads = 1;                 // of 16 bytes, a lane
};

// Parts of a sum that are added into one by one thread, in their order.
inline constexpr int64_t kPartsAThread = 32;
inline constexpr int64_t kNormRowsAPart = 64;
// Of norm_vectors.hpp: rows that a block takes backward, so many at once as it has threads for.
inline constexpr int64_t kNormVectorRows = 256;

// out[i] = sum of kPartsAThread rows of `parts` [count][width] from row i * kPartsAThread on; or,
// where `result` is there, its element.
struct SumJob {
  const double* parts = nullptr;
  double* out = nullptr;
  int64_t count = 0, width = 0;
  Array result;  // [rows][columns], row-major order of `width`
  int64_t columns = 1;
};

}  // namespace kalmanet::cuda
