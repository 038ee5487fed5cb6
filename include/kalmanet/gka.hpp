// Gated KalmaNet: forward, backward and decode of whole or packed sequences, or of a few tokens.
//
// Per batch element and head (docs/math.md derives every formula):
//
//   H_t = e^{gk_t} H_{t-1} + k_t k_t^T        f_t = |H_t|_F        lambda_t = a_t f_t
//   U_t = e^{g_t}  U_{t-1} + k_t v_t^T        x_t = (H_t + lambda_t I)^{-1} q_t
//   o_t = scale * U_t^T (q_t + alpha_t (x_t - q_t))
//
// with k_t and v_t already multiplied by beta_t where beta is given. Where f_t <= 2^-60, x_t = 0.
//
// Letters: B batch, T tokens, H heads, K key head dim, V value head dim, N sequences (B, or the
// number of packed ones). q, k and v may have fewer heads than H: head h reads head
// h / (H / their heads), and nothing is expanded in memory.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "kalmanet/backend.hpp"
#include "kalmanet/executor.hpp"
#include "kalmanet/export.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet {

inline constexpr int64_t kMaxHeadDim = 256;  // K and V are 1..256
inline constexpr int kAutoNumIter = 0;       // num_iter = "auto"
inline constexpr double kDtypeTolerance = 0.0;
inline constexpr double kVanishedNorm = 0x1p-60;  // f_t at or below this counts as zero: x_t = 0

enum class Solver {
  chebyshev,  // num_iter steps of the Chebyshev iteration: the published solver
  direct,     // exact, to `tolerance` (on `reference`: a Cholesky factorisation a token)
  cg,         // num_iter steps of conjugate gradients, for comparison
  automatic,  // "auto": the cheapest of chebyshev and direct that meets `tolerance`, chunk by chunk
              // (gka_step: token by token), by a written cost model: docs/performance.md
};
KALMANET_API const char* name(Solver solver) noexcept;

// What the products inside Chebyshev's iteration are computed in; everything else never changes.
// Chosen by name only, never by the library.
enum class Arithmetic {
  standard,  // float32 (float64 for float64 inputs), a sequence's first tokens in float64
  // The factors of H_t x are rounded to bfloat16 (8 bits), their products summed in float32: with
  // the processor's bfloat16 instructions where it has them, twice as fast a product, elsewhere by
  // float32 ones of the same bits at float32's speed. A sequence's first tokens stay float64, and
  // so does whatever standard arithmetic computes in float64. gka_forward and gka_backward;
  // gka_step, which reads H faster than it could round it, stays standard. Errors of o at ridge
  // ratio 0.02: 1e-2, below that more (docs/numerics.md, section 10). With Solver::chebyshev and a
  // num_iter on the cpu backend only, and not for float64.
  bfloat16,
};
KALMANET_API const char* name(Arithmetic arithmetic) noexcept;

// The tokens of the last gka_step that left the states alone (GkaInputs::is_draft), for the next
// one to bring the states past those of them that were accepted: docs/decode.md.
struct GkaDraft {
  ConstView k, v;         // [B,T',Hk,K] and [B,T',Hv,V], of the heads and dtype of that call's
  ConstView g, gk, beta;  // [B,T',H] where the call has the same one
};

struct GkaInputs {
  ConstView q;  // [B,T,Hq,K]
  ConstView k;  // [B,T,Hk,K]
  ConstView v;  // [B,T,Hv,V]
  // [B,T,H], each optional.
  ConstView g;            // log decay of U, <= 0; absent: 0
  ConstView gk;           // log decay of H, <= 0; absent: 0
  ConstView alpha;        // absent: 1
  ConstView beta;         // multiplies k and v; absent: 1
  ConstView ridge_ratio;  // a_t > 0; absent: GkaOptions::ridge_ratio
  // The states before the first token, [N,H,K,K] and [N,H,K,V], float32 or float64; absent: zero.
  ConstView h0;
  ConstView u0;
  // Packed sequences: N+1 offsets into T, from 0 to T, not decreasing (empty sequences are
  // allowed); needs B = 1. Empty: the batch is N = B sequences of T tokens. Host memory.
  std::span<const int64_t> cu_seqlens;

  // gka_step alone. Where the states lie in a pool, h0 and u0 (and h_final and u_final, the same
  // memory) are [num_slots,H,K,K] and [num_slots,H,K,V], and sequence n's are row slots[n] of them.
  // A negative slot says that the sequence has none: its outputs are zeros (a batch filled up).
  // N numbers, in the backend's memory, no two alike; empty: sequence n has row n.
  std::span<const int32_t> slots = {};
  // First, states and all, sequence n's first accepted[n] tokens of last_draft; N numbers, 0..T',
  // in the backend's memory.
  GkaDraft last_draft = {};
  std::span<const int32_t> accepted = {};
  // This call's tokens are a draft: they have outputs, but h_final and u_final are the states
  // before them (after accepted ones of the last draft).
  bool is_draft = false;
};

struct GkaOutputs {
  View o;  // [B,T,H,V], required: its third size is what says H
  // The states after the last token, [N,H,K,K] and [N,H,K,V]; optional. May be the very memory of
  // h0 and u0 (an update in place).
  View h_final;
  View u_final;
  // [B,T,H,K] optional: x_t, which spares the backward one solve. Beside 16-bit q, ask for it in
  // float32: x_t rounded to 16 bits has lost what the gradients of small ridge ratios need.
  View x;
  View residual;  // [B,T,H] optional: |(H_t + lambda_t I) x_t - q_t| / |q_t|, 0 where f_t or q_t is
  // [B,H,T/kSegmentTokens,gka_segment_state_size(K,V)] optional, of the states' dtype: the states
  // after every kSegmentTokens tokens of a sequence, which spare the backward a pass over all keys
  // and values. How they lie inside is the backward's affair. Of gka_forward on Backend::cpu, with
  // a chunk_size that is 0 or a power of two.
  View segment_states = {};
};

// The backward keeps the states before every chunk between two saved ones: 4 MiB a thread at K = V
// = 128, beside 256 bytes a token and head for what is saved, half of what x takes.
inline constexpr int64_t kSegmentTokens = 512;

struct GkaOptions {
  std::optional<double> scale;  // absent: K^-1/2
  double ridge_ratio = 0.02;    // where GkaInputs::ridge_ratio is absent; > 0
  Solver solver = Solver::chebyshev;
  int num_iter = 30;  // >= 1, or kAutoNumIter: from the smallest a_t of each chunk and head
  // Relative error of x_t that direct, automatic and kAutoNumIter aim at; >= 0. kDtypeTolerance:
  // what the inputs' dtype can carry (1e-5 for float32, 1e-4 for 16 bits, 1e-10 for float64).
  double tolerance = 1e-5;
  Arithmetic arithmetic = Arithmetic::standard;
  bool bp_lambda = true;   // false: f_t is a constant to the gradient (da_t stays)
  int64_t chunk_size = 0;  // 0: the backend's choice; else 1..256. Never changes the meaning
  Backend backend = Backend::automatic;
  Executor* executor = nullptr;  // null: default_executor()
  // Backend::cuda: a cudaStream_t of the device that holds the tensors (null: the default stream).
  // The work is put on it and the call returns; the caller synchronises.
  void* stream = nullptr;
};

// Gradients of the loss with respect to the outputs. d_o is required.
struct GkaOutputGrads {
  ConstView d_o;        // [B,T,H,V]
  ConstView d_h_final;  // [N,H,K,K] optional
  ConstView d_u_final;  // [N,H,K,V] optional
};

// Gradients to compute; an absent view is not computed, and one whose input is absent is an Error.
// Shapes are those of the inputs; every per-token scalar is [B,T,H].
struct GkaInputGrads {
  View dq, dk, dv;
  View dg, dgk, dalpha, dbeta;
  View d_ridge_ratio;  // per token, also where the ridge ratio is one scalar (then: their sum)
  View d_h0, d_u0;
};

// What ran.
struct GkaReport {
  Backend backend = Backend::cpu;
  InstructionSet instruction_set = InstructionSet::baseline;
  int64_t chunk_size = 0;
  // Over chunks and heads (tokens and heads in gka_step):
  int min_iterations = 0;  // steps of the iteration (direct: after the first, exact application)
  int max_iterations = 0;
  int64_t solves = 0;           // chunks solved
  int64_t direct_solves = 0;    // of them, those that the direct solver solved: it hands a chunk to
                                // Chebyshev's iteration where that is cheaper at the same tolerance
  int64_t factorizations = 0;   // K x K matrices factored or inverted for them
  int64_t bfloat16_solves = 0;  // of `solves`, those with products in bfloat16
  bool bfloat16_instructions = false;  // they were the processor's; false: float32 ones, or none
};

// Whole sequences, chunk by chunk (docs/math.md). Linear time, constant memory a sequence.
//
// dtypes: q, k, v, o and the gradients of q, k, v and o share one of float32, float64, bfloat16 and
// float16. So do the per-token tensors (g, gk, alpha, beta, ridge_ratio, their gradients, residual)
// and x; beside 16-bit q each of these may be float32 instead. States and their gradients are
// float64 where q is, else float32. 16-bit numbers are computed with in float32, as exactly as
// float32 problems are, and rounded once where they are written (docs/numerics.md, section 8);
// float64 problems in float64.
//
// Throws Error (see error.hpp) on anything that does not fit; nothing is written then.
KALMANET_API GkaReport gka_forward(const GkaInputs& inputs, const GkaOutputs& outputs,
                                   const GkaOptions& options = {});

// What the backward may be given of the forward, so as not to compute it again.
struct GkaSaved {
  ConstView x;               // GkaOutputs::x, of its dtype or float32
  ConstView segment_states;  // GkaOutputs::segment_states of a forward with the same chunk_size

  GkaSaved() = default;
  // x alone may be passed as it is.
  GkaSaved(const View& x_) : x(x_) {}  // NOLINT(google-explicit-constructor)
  GkaSaved(const ConstView& x_)        // NOLINT(google-explicit-constructor)
      : x(x_) {}
  GkaSaved(const ConstView& x_, const ConstView& segment_states_)
      : x(x_), segment_states(segment_states_) {}
};

// Gradients by implicit differentiation: x_t is treated as the exact solution.
KALMANET_API GkaReport gka_backward(const GkaInputs& inputs, const GkaSaved& saved,
                                    const GkaOutputGrads& output_grads, const GkaInputGrads& grads,
                                    const GkaOptions& options = {});

// Decode: the same answer as gka_forward, token by token, for one or a few new tokens a sequence.
// The update in place (h_final = h0, u_final = u0) touches each state once a token (on a GPU:
// once).
KALMANET_API GkaReport gka_step(const GkaInputs& inputs, const GkaOutputs& outputs,
                                const GkaOptions& options = {});

// Steps that Chebyshev needs for a relative error `tolerance` at ridge ratio `ridge_ratio`:
// the smallest r with 2 R^r <= tolerance, R = (sqrt(kappa)-1)/(sqrt(kappa)+1), kappa = (1+a)/a.
KALMANET_API int chebyshev_num_iter(double ridge_ratio, double tolerance);

// Numbers of one of GkaOutputs::segment_states: H and U, their rows padded to multiples of 16.
KALMANET_API int64_t gka_segment_state_size(int64_t key_dim, int64_t value_dim);

// Bytes of the two float32 states of one sequence, H heads together.
KALMANET_API int64_t gka_state_bytes(int64_t num_heads, int64_t key_dim, int64_t value_dim);

}  // namespace kalmanet
