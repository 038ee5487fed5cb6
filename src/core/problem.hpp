// A validated problem: what backends compute. Made by validate_* from what a caller handed in; from
// here on no backend checks an argument again.
#pragma once

#include <cstdint>
#include <vector>

#include "kalmanet/gka.hpp"

namespace kalmanet::core {

// One sequence of the batch: tokens [begin, end) of batch row `row`; its states are state row
// `index`. Unpacked: row = index, [0, T). Packed: row = 0.
struct Sequence {
  int64_t index;
  int64_t row;
  int64_t begin;
  int64_t end;
  int64_t length() const noexcept { return end - begin; }
};

struct GkaProblem {
  int64_t B = 0, T = 0, H = 0, K = 0, V = 0;
  int64_t N = 0;                       // sequences
  int64_t q_group = 1, k_group = 1, v_group = 1;  // head h reads q head h / q_group, ...
  double scale = 1.0;                  // resolved
  DType dtype = DType::float32;        // of q, k, v, gates, o
  std::vector<Sequence> sequences;     // N of them, empty ones included
  GkaInputs inputs;
  GkaOptions options;
  Executor* executor = nullptr;        // resolved, never null
};

// Throw Error naming the argument, what came and what is allowed. (validate.cpp)
GkaProblem validate_forward(const GkaInputs& inputs, const GkaOutputs& outputs,
                            const GkaOptions& options);
GkaProblem validate_backward(const GkaInputs& inputs, const ConstView& saved_x,
                             const GkaOutputGrads& output_grads, const GkaInputGrads& grads,
                             const GkaOptions& options);

}  // namespace kalmanet::core
