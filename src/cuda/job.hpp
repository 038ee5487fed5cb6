// What the kernels are told: plain structs, passed by value. Made by launch plans on the host
// (plan.cpp) from a validated problem; all pointers are the GPU's.
#pragma once

#include <cstdint>

#include "cuda/group.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cuda {

// A view of up to four dimensions; per-token numbers have three. Strides count elements.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  int32_t width = 0;  // elements of the last of four dimensions
  int64_t stride[4] = {};
};

// A stretch of a sequence that one block works through, once a head: its tokens [begin, end) in
// batch row `row`. A sequence is cut at multiples of kSegmentTokens from its own start, whatever
// else is in the batch: so no answer depends on a neighbour.
struct Piece {
  int64_t row, begin, end;
  int32_t sequence;
  int32_t first, last;  // of its sequence
  int32_t slot;         // its states' place in the workspace: those before its first token
  int32_t always = 1;   // the token kernel does it whether it was left over or not
};

// What short_plan.hpp found of a piece and head: whether every token's H and U are sums of its last
// keys, at most so many, and how the gradients' kernels must cut it then.
struct ShortPlan {
  static constexpr int kTokens = 64;  // that share a window
  static constexpr int kBlocks = static_cast<int>(kSegmentTokens) / kTokens;
  static constexpr int kMostChunks = 32;
  int32_t is_short;
  int32_t window[kBlocks];  // keys, a multiple of 16, at most 64
  // Where 64 tokens forget more than float32 holds: chunks that do not, [begin[i], begin[i + 1])
  // from the piece's first token on. 0: all have 64 tokens.
  int32_t chunks;
  int32_t begin[kMostChunks + 1];
};

struct GkaJob {
  int64_t H = 0, K = 0, V = 0;
  int64_t q_group = 1, k_group = 1, v_group = 1;
  Array q, k, v, g, gk, alpha, beta, ridge, h0, u0;
  Array o, x, residual, h_final, u_final;
  double scale = 1, ridge_ratio = 0.02, tolerance = 1e-5;
  int num_iter = 30;    // 0: from a_t and the tolerance
  bool direct = false;  // a Cholesky factorisation a token
  // gka_step's (gka.hpp): the row of the states of each sequence; the tokens of the last call's
  // draft, how many of them there are, and how many of each sequence's were accepted; whether this
  // call's own tokens leave the states alone.
  const int32_t* slots = nullptr;
  int64_t num_slots = 0;
  Array draft_k, draft_v, draft_g, draft_gk, draft_beta;
  const int32_t* accepted = nullptr;
  int64_t num_drafted = 0;
  bool is_draft = false;
  // For the step kernels: a token's own numbers, in the order of StepScalar, and the same of the
  // last draft (step_kernel.hpp).
  Array scalars[2][5];
  // Pieces, one a block (in x; heads are y). Null: piece i is the whole of batch row i.
  const Piece* pieces = nullptr;
  int64_t num_pieces = 0, T = 0;
  // States before each piece but a sequence's first, [slot][H][K (K + V)], H's then U's; and each
  // piece's own decays [slot][H][2], of H and U. In the states' dtype; decays in float64.
  void* states = nullptr;
  double* decays = nullptr;
  // Whether what registers have no room for of H is in shared memory, which is as large as the chip
  // makes it; and scratch for what is not (token_body.hpp), bytes a block.
  bool spill_is_shared = false;
  // The matrix-unit kernel (chunk_body.hpp): its states, of each block; and whether a piece was
  // left over to the token kernel, [piece][H]. Null in a token kernel that does every piece.
  void* chunk_scratch = nullptr;
  int32_t* left_over = nullptr;
  // [piece][H]: heads of short memory, which kernels of their own do (short_body.hpp). Null: there
  // are none.
  ShortPlan* short_plans = nullptr;
  bool split = true;  // bfloat16 products split in three, as long as it shows in the result
  void* scratch = nullptr;
  int64_t scratch_bytes = 0;
};

KALMANET_KERNEL Piece piece_of(const GkaJob& job, int64_t i) {
  if (job.pieces != nullptr) return job.pieces[i];
  return {i, 0, job.T, static_cast<int32_t>(i), 1, 1, 0};
}

// The row of a sequence's states. Negative: it has none, and is left alone.
KALMANET_KERNEL int64_t state_row(const GkaJob& job, int64_t sequence) {
  return job.slots == nullptr ? sequence : job.slots[sequence];
}
KALMANET_KERNEL bool has_states(const GkaJob& job, int64_t row) {
  return job.slots == nullptr || (row >= 0 && row < job.num_slots);
}

// How many tokens of the last call's draft belong to the states now.
KALMANET_KERNEL int64_t accepted_of(const GkaJob& job, int64_t sequence) {
  if (job.accepted == nullptr) return 0;
  const int64_t n = job.accepted[sequence];
  return n < 0 ? 0 : n < job.num_drafted ? n : job.num_drafted;
}

// What left_over says of a piece that needs more than the matrix-unit kernels: all of it, or
// (backward) all but x, z and what follows from them alone.
inline constexpr int32_t kLeftOver = 1, kSolved = 2;

// Whether the matrix-unit kernels have done the piece.
KALMANET_KERNEL bool is_done(const GkaJob& job, int64_t piece_index, int64_t head) {
  return job.left_over != nullptr && piece_of(job, piece_index).always == 0 &&
         job.left_over[piece_index * job.H + head] == 0;
}

// Whether they have solved for the piece's x and z at least.
KALMANET_KERNEL bool is_solved(const GkaJob& job, int64_t piece_index, int64_t head) {
  return job.left_over != nullptr && piece_of(job, piece_index).always == 0 &&
         job.left_over[piece_index * job.H + head] != kLeftOver;
}

// Whether the kernels of short memory do the piece.
KALMANET_KERNEL bool is_short(const GkaJob& job, int64_t piece_index, int64_t head) {
  return job.short_plans != nullptr && job.short_plans[piece_index * job.H + head].is_short != 0;
}

KALMANET_KERNEL float half_to_float(DType dtype, const void* data, int64_t at) {
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
#ifdef __CUDACC__
  return dtype == DType::bfloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                  : __half2float(__ushort_as_half(bits));
#else
  return dtype == DType::bfloat16 ? core::from_bfloat16(bits) : core::from_float16(bits);
#endif
}

// Element `at`: float64 where S is, else of one of the other dtypes.
template <class S>
KALMANET_KERNEL S load_element(const Array& a, int64_t at) {
  if constexpr (sizeof(S) == 8) {
    return static_cast<const double*>(a.data)[at];
  } else {
    if (a.dtype == DType::float32) return static_cast<const float*>(a.data)[at];
    return half_to_float(a.dtype, a.data, at);
  }
}

// The same (not float64) in two steps: the bits, on their way while other loads are begun, and the
// number once it is needed.
KALMANET_KERNEL uint32_t load_bits(const Array& a, int64_t at) {
  if (a.dtype == DType::float32) return static_cast<const uint32_t*>(a.data)[at];
  return static_cast<const uint16_t*>(a.data)[at];
}
KALMANET_KERNEL float from_bits(DType dtype, uint32_t bits) {
#ifdef __CUDACC__
  if (dtype == DType::float32) return __uint_as_float(bits);
  return dtype == DType::bfloat16 ? __uint_as_float(bits << 16)
                                  : __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
#else
  if (dtype != DType::float32) {
    const uint16_t half = static_cast<uint16_t>(bits);
    return dtype == DType::bfloat16 ? core::from_bfloat16(half) : core::from_float16(half);
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// Rounded to the nearest, ties to even.
template <class S>
KALMANET_KERNEL void store_element(const Array& a, int64_t at, S value) {
  if constexpr (sizeof(S) == 8) {
    static_cast<double*>(a.data)[at] = value;
  } else if (a.dtype == DType::float32) {
    static_cast<float*>(a.data)[at] = value;
  } else {
    uint16_t* to = static_cast<uint16_t*>(a.data) + at;
#ifdef __CUDACC__
    *to = a.dtype == DType::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                     : __half_as_ushort(__float2half_rn(value));
#else
    *to = a.dtype == DType::bfloat16 ? core::to_bfloat16(value) : core::to_float16(value);
#endif
  }
}

// Where element [row, token, head, 0] of [B,T,heads,width] or [row, token, head] of [B,T,H] lies.
KALMANET_KERNEL int64_t offset_of(const Array& a, int64_t row, int64_t token, int64_t head) {
  return row * a.stride[0] + token * a.stride[1] + head * a.stride[2];
}

// A per-token number, or `absent`.
template <class S>
KALMANET_KERNEL S scalar_at(const Array& a, int64_t row, int64_t t, int64_t head, double absent) {
  if (a.data == nullptr) return static_cast<S>(absent);
  return load_element<S>(a, offset_of(a, row, t, head));
}

}  // namespace kalmanet::cuda
