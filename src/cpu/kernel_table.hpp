// What the instruction-set-specific kernels offer to the rest of the CPU room: plain job structs
// and one function pointer an operation. No vector type appears here.
#pragma once

#include <cstdint>

#include "cpu/conv_kernels.hpp"
#include "cpu/convert.hpp"
#include "cpu/norm_kernels.hpp"
#include "kalmanet/gka.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet::cpu {

// The kernels come in two storage types, S: float, and double for float64 problems. S is what the
// states, the scratch and every buffer between two steps of the work are made of; what a caller's
// tensors hold is said by the dtype beside their pointers.

// Tokens of one head: element (t, c) is number t * token_stride + c * stride from data. t counts
// from the start of the batch row. Null data: absent.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t token_stride = 0;
  int64_t stride = 0;
};
struct OutRows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t token_stride = 0;
  int64_t stride = 0;
  bool accumulate = false;  // add to what is there (heads that share one output head)
};
// One number a token: element t is number t * stride from data. Null data: absent.
struct Column {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
};
struct OutColumn {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
};

// Whether chunks are solved by blocks (direct.hpp), or may be.
constexpr bool by_blocks(Solver solver) {
  return solver == Solver::direct || solver == Solver::automatic;
}

template <class S>
struct Chunk;  // chunk.hpp

// Chebyshev's iteration with products in bfloat16 (bf16_chebyshev.hpp), in two steps: prepare once
// a chunk, solve for each right-hand side. `words`: bf16_floats(K).
struct Bf16Kernels {
  void (*prepare)(const Chunk<float>& c, const float* h, bool h_is_zero, float* words);
  float* (*solve)(const Chunk<float>& c, bool h_is_zero, float* words, const float* b, int num_iter,
                  float* x, float* other);
  bool instructions;  // the processor's bfloat16 ones
};

// The inputs of one head of one batch row.
struct HeadInputs {
  int64_t K = 0, V = 0;
  Rows q, k, v;
  Column g, gk, alpha, beta, ridge;
  double scale = 1;
  double ridge_ratio = 0;  // where `ridge` is absent
  Solver solver = Solver::chebyshev;
  int num_iter = 0;  // 0: from the chunk's smallest ridge ratio and the tolerance
  double tolerance = 0;
  const Bf16Kernels* bf16 = nullptr;  // null: standard arithmetic
};

// A head's pair of states in the kernels' layout: row-major, rows padded with zeros to a multiple
// of kLanes: h [Kp, Kp], u [Kp, Vp].
template <class S>
struct StateBuffers {
  S* h = nullptr;
  S* u = nullptr;
};

// What the solver did, over the chunks of a job (tokens, where it goes token by token).
struct SolverCount {
  int min = 0, max = 0;  // steps of the iteration
  int64_t chunks = 0;
  int64_t direct_chunks = 0;   // of them, those solved directly
  int64_t factorizations = 0;  // matrices factored for them
  int64_t bf16_chunks = 0;     // with products in bfloat16
};

// GkaOutputs::segment_states of one head: the state after token p - 1 of the batch row (H, then U),
// p a multiple of kSegmentTokens from the sequence's first token, lies in slot p / kSegmentTokens
// - 1. Two such p are always that far apart, so each has a slot of its own in packed rows too.
template <class S>
struct SegmentStates {
  S* data = nullptr;   // null: none
  int64_t stride = 0;  // from slot to slot
  S* at(int64_t p) const { return data + (p / kSegmentTokens - 1) * stride; }
};

// Tokens [begin, end) of one head, chunk by chunk; `state` goes from before `begin` to after `end`.
template <class S>
struct GkaForwardJob {
  HeadInputs in;
  int64_t begin = 0, end = 0;
  int64_t chunk_size = 0;        // 1..kLanes
  bool h_is_zero = false;        // state.h is all zeros at `begin`
  bool starts_sequence = false;  // `begin` is the call's first token of the sequence
  StateBuffers<S> state;
  OutRows o, x;                     // x optional
  SegmentStates<S> segment_states;  // optional
  int64_t sequence_begin = 0;
  OutColumn residual;    // optional
  S* scratch = nullptr;  // forward_scratch_floats(K, V)
  SolverCount* count = nullptr;
};

// Advances the states over tokens [begin, end) with the forward's arithmetic and nothing else; a
// null state.h or state.u is left out.
template <class S>
struct GkaScanJob {
  HeadInputs in;
  int64_t begin = 0, end = 0;
  int64_t chunk_size = 0;
  StateBuffers<S> state;
  S* scratch = nullptr;
};

// Gradients of tokens [begin, end) of one head, last chunk first. What `phase` leaves out must have
// been done before: solve_only writes z (and x where it was not saved), gradients_only reads them.
template <class S>
struct GkaBackwardJob {
  enum Phase { solve_only, gradients_only, both };
  Phase phase = both;
  HeadInputs in;
  bool bp_lambda = true;
  int64_t begin = 0, end = 0;
  int64_t chunk_size = 0;
  bool h_is_zero = false;     // start.h is all zeros
  StateBuffers<S> start;      // states before `begin` (read only)
  S* chunk_states = nullptr;  // room for the states before each chunk of the segment
  // D' and E, and omega (gka_backward.hpp): gradients of the states after `end`, in; before
  // `begin`, out.
  StateBuffers<S> carry;
  double* carry_weight = nullptr;
  Rows saved_x;            // x of the forward; absent: solved for again
  OutRows z_rows, x_rows;  // between the phases: z, and x where saved_x is absent
  Rows d_o;
  OutRows dq, dk, dv;  // all optional
  OutColumn dg, dgk, dalpha, dbeta, d_ridge;
  S* scratch = nullptr;  // backward_scratch_floats(K, V)
  SolverCount* count = nullptr;
};

// How the step's solver reads H: by the rule of packed_symmetric.hpp, or one way whatever it says
// (the tests compare the two).
// What a step's solver may fetch meanwhile (step_ahead.hpp); no lines: nothing.
inline constexpr int64_t kCacheLine = 64;
struct StepAhead {
  const char* at[2] = {};
  int64_t lines[2] = {};
};

enum class StepMatrix { by_rule, whole, packed };

// Tokens [begin, end) of one head one by one; state as above, but its rows may have any stride.
template <class S>
struct GkaStepJob {
  HeadInputs in;
  int64_t begin = 0, end = 0;
  StateBuffers<S> state;
  int64_t h_stride = 0, u_stride = 0;  // elements from row to row; rows are padded to kLanes
  OutRows o, x;
  OutColumn residual;
  StepMatrix matrix = StepMatrix::by_rule;
  StepAhead ahead;       // by the first token's solver
  S* scratch = nullptr;  // step_scratch_floats(K, V)
  SolverCount* count = nullptr;
};

template <class S>
struct GkaKernels {
  void (*gka_forward)(const GkaForwardJob<S>&);
  void (*gka_scan_states)(const GkaScanJob<S>&);
  void (*gka_backward)(const GkaBackwardJob<S>&);
  void (*gka_step)(const GkaStepJob<S>&);
};

struct KernelTable {
  GkaKernels<float> gka;
  GkaKernels<double> gka_float64;
  Bf16Kernels bf16;
  ConvertKernels convert;
  ConvKernels<float> conv;
  ConvKernels<double> conv_float64;
  NormKernels<float> norm;
  NormKernels<double> norm_float64;
};

// Tokens that the chunked kernels solve together: one a vector lane. 16 is one AVX-512 register of
// float32, two of AVX2, four of SSE. Longer chunks would spend more operations a token, not fewer
// (a Chebyshev iteration costs 2 K^2 + 4 C K a token), and the work around the solver that a chunk
// shares is already below a fifth of it at 16.
inline constexpr int64_t kLanes = 16;

constexpr int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Numbers in one head's two states in the kernels' layout.
constexpr int64_t state_floats(int64_t K, int64_t V) {
  return padded(K) * (padded(K) + padded(V));
}

}  // namespace kalmanet::cpu
