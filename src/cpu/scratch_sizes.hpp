// Scratch that each kernel takes, for one head with key width K and value width V, in elements of
// its storage type. What a float kernel keeps in float64 counts twice; the float64 kernels have no
// such buffers and leave their room unused.
#pragma once

#include "cpu/kernel_table.hpp"

namespace kalmanet::cpu {

// A chunk's keys (rows and lanes), queries (lanes) and values (rows): chunk.hpp.
constexpr int64_t chunk_floats(int64_t K, int64_t V) {
  return 3 * padded(K) * kLanes + padded(V) * kLanes;
}
// Two buffers of the solver and the mix, in float32 and in float64; the output.
constexpr int64_t forward_scratch_floats(int64_t K, int64_t V) {
  return chunk_floats(K, V) + (9 * padded(K) + padded(V)) * kLanes;
}
// The decayed keys.
constexpr int64_t scan_scratch_floats(int64_t K, int64_t V) {
  return chunk_floats(K, V) + padded(K) * kLanes;
}
// 12 blocks of keys' width and 4 of values', and the solver's in float64: BackwardChunk.
constexpr int64_t backward_scratch_floats(int64_t K, int64_t V) {
  return chunk_floats(K, V) + (20 * padded(K) + 4 * padded(V)) * kLanes;
}
// q and k, the solver's three vectors in float32 and in float64; v, o: one token.
constexpr int64_t step_scratch_floats(int64_t K, int64_t V) {
  return (2 + 3 + 2 * 3) * padded(K) + 2 * padded(V);
}

}  // namespace kalmanet::cpu
