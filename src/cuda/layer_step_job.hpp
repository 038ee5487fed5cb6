// What the two kernels around the recurrence of a layer's decode step are told.
#pragma once

#include <cstdint>

#include "cuda/job.hpp"

namespace kalmanet::cuda {

// One of q, k and v: heads of `width` channels, each with its window of W taps.
struct LayerConv {
  Array x, y;           // [N,T,heads,width]; y is memory of the call's own
  Array weight, state;  // [heads*width,W], [N,heads*width,W]; no weight: y is x
  int64_t heads = 0;    // 0: nothing to do
  int64_t width = 0;
  bool unit = false;                               // to length 1, a head
  bool weight_fours = false, state_fours = false;  // a channel's taps are four dense numbers
};

enum LayerGate { kLayerBeta, kLayerAlpha, kLayerDecay, kLayerRidge, kLayerGates };

struct LayerBeforeJob {
  int64_t N = 0, T = 0, H = 0, W = 0;
  LayerConv conv[3];  // q, k, v
  bool fla_norm = false;
  // Of each gate what the projection gave, and what the recurrence takes: [N,T,H].
  Array logit[kLayerGates], gate[kLayerGates];
  int gates[kLayerGates] = {};  // those that there are
  int num_gates = 0;
  Array A_log, dt_bias;  // [H]
  double fixed_alpha = 1, min_log_ridge = 0, max_log_ridge = 0;
};

// Threads of a block: one a channel of the widest head, in whole warps.
inline int layer_threads(const LayerBeforeJob& job) {
  int64_t width = 32;
  for (const LayerConv& conv : job.conv) width = conv.width > width ? conv.width : width;
  return static_cast<int>((width + 31) / 32 * 32);
}

// o_norm * o / rms(o) * silu(gate), a head.
struct LayerAfterJob {
  int64_t N = 0, T = 0, H = 0, V = 0;
  Array o, gate, y;  // [N,T,H,V]
  Array weight;      // [V]
  double eps = 1e-6;
};

}  // namespace kalmanet::cuda
