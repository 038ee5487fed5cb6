// A validated problem: what backends compute. Made by validate_* from what a caller handed in; from
// here on no backend checks an argument again.
#pragma once

#include <cstdint>
#include <vector>

#include "kalmanet/gka.hpp"
#include "kalmanet/workspace.hpp"

namespace kalmanet::core {

// One sequence of the batch: tokens [begin, end) of batch row `row`; its states are state row
// `index`. Unpacked: row = index, [0, T). Packed: row = 0. With slots, on backends that can read
// them: index is the slot, and a sequence that has none is left out.
struct Sequence {
  int64_t index;
  int64_t row;
  int64_t begin;
  int64_t end;
  int64_t accepted = 0;  // tokens of the last draft that come first (gka_step, not on a GPU)
  int64_t length() const noexcept { return end - begin; }
};

inline constexpr int64_t kMaxChunkSize = 256;

// What validation has made sure of: every tensor has the shape and dtype that gka.hpp says, memory
// wherever it has elements, and strides inside the address space; what is written has no two
// elements in one place; K and V are 1..256; head counts divide H >= 1; every ridge ratio, also
// inside a tensor, is > 0 and finite; a gradient is asked for only where its input is present
// (d_ridge_ratio always may be). B, T, N and single sequences may be empty. Values inside q, k, v,
// the gates and the states are not looked at.
struct GkaProblem {
  int64_t B = 0, T = 0, H = 0, K = 0, V = 0;
  int64_t N = 0;                                  // sequences, those without a slot left out
  int64_t num_states = 0;                         // rows of the states: N, or the pool's slots
  int64_t q_group = 1, k_group = 1, v_group = 1;  // head h reads q head h / q_group, ...
  double scale = 1.0;                             // resolved
  DType dtype = DType::float32;                   // of q, k, v, gates, o
  std::vector<Sequence> sequences;                // N of them, empty ones included
  GkaInputs inputs;
  GkaOptions options;
  Executor* executor = nullptr;  // resolved, never null
};

// What kDtypeTolerance stands for. (validate.cpp)
double dtype_tolerance(DType dtype);

// Of every state and state gradient.
inline DType state_dtype(const GkaProblem& problem) {
  return problem.dtype == DType::float64 ? DType::float64 : DType::float32;
}

// Throw Error naming the argument, what came and what is allowed. (validate.cpp)
void validate_options(const GkaOptions& options);
// What its options cannot know: arithmetic beside the problem's dtype.
void check_arithmetic(const GkaProblem& problem);
// Sizes, sequences and options as from a call; no tensors (validate_shape.cpp).
GkaProblem validate_shape(const GkaShape& shape, const GkaOptions& options);
GkaProblem validate_forward(const GkaInputs& inputs, const GkaOutputs& outputs,
                            const GkaOptions& options);
// What only gka_step takes of its inputs (slots and drafts: validate_decode.cpp): the problem of a
// validated forward with them. refuse_decode: for the others.
GkaProblem validate_step(const GkaInputs& inputs, const GkaOutputs& outputs,
                         const GkaOptions& options);
void refuse_decode(const GkaInputs& inputs, const char* operation);
GkaProblem validate_backward(const GkaInputs& inputs, const GkaSaved& saved,
                             const GkaOutputGrads& output_grads, const GkaInputGrads& grads,
                             const GkaOptions& options);

}  // namespace kalmanet::core
