// What a Gated KalmaNet layer does between its projections for the next few tokens, in one call:
// short convolutions, normalisation, gates, states, solve, read-out and gated norm.
//
// With the outputs of the layer's projections for T new tokens a sequence:
//
//   q, k, v = silu(conv(q)), silu(conv(k)), silu(conv(v))     conv.hpp, by conv_{q,k,v}_weight
//   q, k    = q / (|q| + 1e-6), k / (|k| + 1e-6)              a head
//             (QkNorm::fla: q / sqrt(|q|^2 + 1e-6), k likewise)
//   beta    = sigmoid(b) + 1e-6
//   alpha   = sigmoid(alpha)
//   g       = -exp(A_log) softplus(a + dt_bias)
//   ridge   = exp(clamp(ridge, ln min_ridge, ln max_ridge))
//   o       = gka_step(q, k, v, g, gk = g, alpha, beta, ridge) gka.hpp, over h and u
//   o       = o_norm * o / sqrt(mean(o^2) + norm_eps) * silu(gate)   norm.hpp, a head
//
// It is what causal_conv_step, gka_step and gated_rms_norm_forward give one after the other, but
// no tensor is made between them, and a head's numbers stay with the thread that computes them. On
// a GPU it is three launches: what comes before the recurrence, gka_step's kernel, the gated norm.
#pragma once

#include <optional>

#include "kalmanet/export.hpp"
#include "kalmanet/gka.hpp"
#include "kalmanet/norm.hpp"

namespace kalmanet {

// Letters as in gka.hpp, B = N sequences; W taps of the convolutions. Every tensor of the first
// group has the dtype of q: float32, float64, bfloat16 or float16; those of the second have it
// too, or are float32 beside 16-bit q.
struct LayerStepInputs {
  ConstView q;      // [B,T,Hq,K], what the projections give, their biases included
  ConstView k;      // [B,T,Hk,K]
  ConstView v;      // [B,T,Hv,V]
  ConstView gate;   // [B,T,H,V] optional; absent: no output gate
  ConstView b;      // [B,T,H] optional; absent: beta 1
  ConstView alpha;  // [B,T,H] optional; absent: LayerStepOptions::fixed_alpha
  ConstView a;      // [B,T,H] optional; absent: no decay
  ConstView ridge;  // [B,T,H] optional; absent: options.gka.ridge_ratio. NaN is an
                    // error (on a GPU its token answers NaN), an infinite one is
                    // clamped as any other

  ConstView conv_q_weight;  // [Hq*K,W], W in 1..kMaxConvWidth
  ConstView conv_k_weight;  // [Hk*K,W]
  ConstView conv_v_weight;  // [Hv*V,W] optional; absent: v as it is, without SiLU
  ConstView A_log;          // [H], with a
  ConstView dt_bias;        // [H], with a
  ConstView o_norm;         // [V]
};

// Read and updated in place; float64 where q is, else float32.
struct LayerStepStates {
  View h;       // [B,H,K,K]
  View u;       // [B,H,K,V]
  View conv_q;  // [B,Hq*K,W]: the last W inputs, oldest first (conv.hpp)
  View conv_k;  // [B,Hk*K,W]
  View conv_v;  // [B,Hv*V,W], with conv_v_weight
};

struct LayerStepOptions {
  GkaOptions gka;       // scale, ridge_ratio, solver, num_iter, tolerance, executor; backend cpu or
                        // cuda, stream
  bool decay_h = true;  // H decays as U does; false: not at all
  double fixed_alpha = 1.0;  // 0..1, where `alpha` is absent
  QkNorm qk_norm = QkNorm::official;
  double min_ridge = 1.2e-4, max_ridge = 0.135;  // of `ridge`; 0 < min_ridge <= max_ridge
  double norm_eps = 1e-6;
};

// o [B,T,H,V], of q's dtype: the rows that the output projection takes. `residual` [B,T,H]
// (optional, of q's dtype or float32) as in gka.hpp.
//
// Meant for one or a few tokens a sequence: scratch grows with T. Throws Error before anything is
// written; Error(unsupported) for Backend::reference.
KALMANET_API GkaReport layer_step(const LayerStepInputs& inputs, const LayerStepStates& states,
                                  View o, View residual = {}, const LayerStepOptions& options = {});

}  // namespace kalmanet
