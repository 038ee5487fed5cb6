// Scratch that each kernel takes, for one head with key width K and value width V, in elements of
// its storage type. What a float kernel keeps in float64 counts twice; the float64 kernels have no
// such buffers and leave their room unused.
#pragma once

#include "cpu/kernel_table.hpp"
#include "cpu/packed_symmetric.hpp"

namespace kalmanet::cpu {

// Chunks are grouped by windows of this many, counted from the sequence's start, and no block of
// the direct solver reaches across a window: so blocks do not depend on where threads cut a
// sequence. At 4 chunks (64 tokens) the K^3 operations of a sweep are K / 64 products of K x K a
// token, already less than one inner step; longer blocks would pay more for their own keys than
// they save.
inline constexpr int64_t kBlockChunks = 4;

// A chunk's keys (rows and lanes), queries (lanes) and values (rows): chunk.hpp.
constexpr int64_t chunk_floats(int64_t K, int64_t V) {
  return 3 * padded(K) * kLanes + padded(V) * kLanes;
}
// Elements of a factor of `rows` rows, by rows and, half of that, by columns (BlockCholesky).
constexpr int64_t block_cholesky_elems(int64_t rows) {
  return rows * rows + rows * (rows + kLanes) / 2;
}
// Elements of a direct block of `chunks` chunks: L, R, W twice, one of [token or row][t], four of
// lanes (DirectBlock).
constexpr int64_t direct_elems(int64_t K, int64_t chunks) {
  const int64_t tokens = chunks * kLanes;
  const int64_t rows = padded(K) > tokens ? padded(K) : tokens;
  return block_cholesky_elems(padded(K)) + block_cholesky_elems(tokens) + 2 * tokens * padded(K) +
         rows * kLanes + 4 * padded(K) * kLanes;
}
// A chunk's operator in bfloat16 pairs: H_0, the keys twice, a vector twice (Bf16Operator).
constexpr int64_t bf16_floats(int64_t K) {
  return padded(K) * (padded(K) + 4 * kLanes);
}
// What a solver keeps beside its two buffers: the float32 one over a block, the float64 one over a
// chunk (ChunkSolver).
constexpr int64_t solver_floats(int64_t K, Solver solver, Arithmetic arithmetic) {
  switch (solver) {
    case Solver::chebyshev:
      return arithmetic == Arithmetic::bfloat16 ? bf16_floats(K) : 0;
    case Solver::direct:
    case Solver::automatic:
      return direct_elems(K, kBlockChunks) + 2 * direct_elems(K, 1);
    case Solver::cg:
      return 3 * 2 * padded(K) * kLanes;
  }
  return 0;
}
// Two buffers of the solver and the mix, in float32 and in float64; the output.
constexpr int64_t forward_scratch_floats(int64_t K, int64_t V, Solver solver,
                                         Arithmetic arithmetic) {
  return chunk_floats(K, V) + (9 * padded(K) + padded(V)) * kLanes +
         solver_floats(K, solver, arithmetic);
}
// The decayed keys.
constexpr int64_t scan_scratch_floats(int64_t K, int64_t V) {
  return chunk_floats(K, V) + padded(K) * kLanes;
}
// A chunk's 7 blocks of keys' width and 2 of values' (BackwardChunk; direct: of a window's chunks),
// 6 and 2 that they share, and four of keys' width in float64 (BackwardWork).
constexpr int64_t backward_scratch_floats(int64_t K, int64_t V, Solver solver,
                                          Arithmetic arithmetic) {
  const int64_t chunks = by_blocks(solver) ? kBlockChunks : 1;
  return chunks * (chunk_floats(K, V) + (7 * padded(K) + 2 * padded(V)) * kLanes) +
         (14 * padded(K) + 2 * padded(V)) * kLanes + solver_floats(K, solver, arithmetic);
}
// q and k, the solver's three vectors in float32 and in float64; v, o: one token. Beside them:
// direct, the matrix and an elimination's panels; cg, two vectors; either in float32 and float64.
// H packed (or not) with its product's vector; what nothing is iterated with needs none.
constexpr int64_t step_scratch_floats(int64_t K, int64_t V, Solver solver) {
  const int64_t beside = by_blocks(solver)      ? padded(K) * padded(K) + 2 * kLanes * padded(K)
                         : solver == Solver::cg ? 2 * padded(K)
                                                : 0;
  const int64_t packed = solver == Solver::direct ? 0 : packed_elems(padded(K)) + padded(K);
  return (2 + 3 + 2 * 3) * padded(K) + 2 * padded(V) + 3 * beside + packed;
}

}  // namespace kalmanet::cpu
