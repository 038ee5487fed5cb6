// One head of one stretch of a sequence, token by token: the decode step, and the forward's plain
// twin. A block keeps H in its registers (what has no room there, in memory of its own), so that a
// Chebyshev step is K^2 multiply-adds from registers and one barrier; U is read and written once a
// token. The formulas are those of docs/math.md, section 1, symbol for symbol.
//
// Everything is computed in the storage type S (float32; float64 for float64 tensors). Where a
// token's amplification (docs/numerics.md, section 6) says that float32 was not enough, x is solved
// for again in float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/group.hpp"
#include "cuda/job.hpp"

namespace kalmanet::cuda {

// Who holds what, for K padded to KP: a thread has 2 rows of H, of each KP / 4 columns, in pieces
// of 4 that the 4 threads of a row take in turn (so that their reads of x, 16 bytes each, meet no
// bank twice). Element e = (piece * 2 + row) * 4 + column.
template <class S, int KP>
struct TokenLayout {
  static constexpr int kThreads = 2 * KP;
  static constexpr int kPieces = KP / 16;
  static constexpr int kElements = KP / 2;
  // 64 registers of H leave room for two blocks a multiprocessor at KP = 128.
  static constexpr int kMostHeld = 64 * 4 / static_cast<int>(sizeof(S));
  static constexpr int kHeld = kElements < kMostHeld ? kElements : kMostHeld;
  static constexpr int64_t kSpilled = static_cast<int64_t>(kElements - kHeld) * kThreads;
  // Of float64: the factor and two right-hand sides.
  static constexpr int64_t kFactor = static_cast<int64_t>(KP) * (KP + 1) / 2 + 2 * KP;
  // Where what the registers hold of H is put aside for float64 work, which needs them.
  static constexpr int64_t kParked = sizeof(S) == 4 ? static_cast<int64_t>(kHeld) * kThreads : 0;
  static constexpr bool kParkedIsShared = KP <= 128;
  // 67 KB at KP = 128: beside the shared arrays twice a multiprocessor. Else it is in scratch.
  static constexpr bool kFactorIsShared = KP <= 128;

  KALMANET_KERNEL static int row(int thread, int r) { return thread / 4 * 2 + r; }
  KALMANET_KERNEL static int column(int thread, int piece) { return (piece * 4 + thread % 4) * 4; }
};

template <class S, int KP>
struct TokenRegisters {
  S h[TokenLayout<S, KP>::kHeld];
  S x[2], previous[2], product[2];
  double x64[2], previous64[2], product64[2];
  double sum, sum2;
  S k, q, v[2], scalar;  // of the next token, on their way
};

// A token's own numbers, in the order in which threads load them.
enum TokenScalar { kGateOfH, kGateOfU, kAlpha, kBeta, kRidge, kTokenScalars };

inline constexpr int kMostValues = 256;

template <class S, int KP>
struct TokenShared {
  alignas(32) S k[KP];
  alignas(32) S q[KP];
  alignas(32) S m[KP];
  alignas(32) S x[2][KP];  // what the next product is taken of, in turn
  alignas(32) double x64[2][KP];
  S v[kMostValues];
  S o[kMostValues];
  double partial[2 * KP][4];  // of the read-out: four columns of a thread
  S scalar[kTokenScalars];
  double warp[2][KP / 16];
};

// H, and the operations on it that need all its elements.
template <class Group, class S, int KP>
struct TokenState {
  using Layout = TokenLayout<S, KP>;
  using Registers = TokenRegisters<S, KP>;
  Group& group;
  TokenShared<S, KP>& shared;
  S* spilled;      // [element - kHeld][thread]
  S* parked;       // [element][thread]
  double* factor;  // packed lower triangle by rows, and right-hand sides

  KALMANET_KERNEL S get(const Registers& r, int thread, int e) const {
    if (e < Layout::kHeld) return r.h[e];
    return spilled[static_cast<int64_t>(e - Layout::kHeld) * Layout::kThreads + thread];
  }
  KALMANET_KERNEL void set(Registers& r, int thread, int e, S value) {
    if (e < Layout::kHeld) {
      r.h[e] = value;
    } else {
      spilled[static_cast<int64_t>(e - Layout::kHeld) * Layout::kThreads + thread] = value;
    }
  }

  // The thread's two rows of a vector, which it shares with three others, into to[KP]. (A loop over
  // the two would make the compiler keep the registers in memory, to index them by thread.)
  template <class A, class To>
  KALMANET_KERNEL static void put_rows(int thread, A a, A b, To* to) {
    if (thread % 4 < 2) to[thread / 4 * 2 + thread % 4] = static_cast<To>(thread % 4 == 0 ? a : b);
  }

  // float64 work beside 64 registers of H would spill most of them: they wait in memory.
  KALMANET_KERNEL void park() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < Layout::kHeld; ++e) parked[e * Layout::kThreads + thread] = r.h[e];
    });
  }
  KALMANET_KERNEL void unpark() {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int e = 0; e < Layout::kHeld; ++e) r.h[e] = parked[e * Layout::kThreads + thread];
    });
  }

  // f(registers, thread, element, row, column) for every element of H.
  template <class F>
  KALMANET_KERNEL void for_each(F&& f) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int p = 0; p < Layout::kPieces; ++p) {
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) {
          f(r, thread, p * 8 + i, Layout::row(thread, i / 4), Layout::column(thread, p) + i % 4);
        }
      }
    });
  }

  // registers.product(64) <- H y for the thread's rows, y in shared memory. In A's precision; where
  // that is not S, H is parked.
  template <class A, class Product>
  KALMANET_KERNEL void multiply(const A* y, Product&& product) {
    group.each([&](int thread, Registers& r) {
      A sum[2][2] = {};
      KALMANET_UNROLL
      for (int p = 0; p < Layout::kPieces; ++p) {
        A y4[4];
        load4(y + Layout::column(thread, p), y4);
        KALMANET_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int e = p * 8 + i;
          const bool aside = sizeof(A) != sizeof(S) && e < Layout::kHeld;
          const S h = aside ? parked[e * Layout::kThreads + thread] : get(r, thread, e);
          sum[i / 4][i % 2] += static_cast<A>(h) * y4[i % 4];
        }
      }
      product(r)[0] = sum[0][0] + sum[0][1];
      product(r)[1] = sum[1][0] + sum[1][1];
    });
    group.template sum_lanes<4>([&](Registers& r) -> A& { return product(r)[0]; });
    group.template sum_lanes<4>([&](Registers& r) -> A& { return product(r)[1]; });
  }

  // The block's sums of registers.sum and .sum2, the same bits in every thread.
  KALMANET_KERNEL void sum_block(double* sum, double* sum2) {
    group.template sum_lanes<32>([](Registers& r) -> double& { return r.sum; });
    group.template sum_lanes<32>([](Registers& r) -> double& { return r.sum2; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) {
        shared.warp[0][thread / 32] = r.sum;
        shared.warp[1][thread / 32] = r.sum2;
      }
    });
    group.barrier();
    *sum = *sum2 = 0.0;
    for (int w = 0; w < KP / 16; ++w) {
      *sum += shared.warp[0][w];
      *sum2 += shared.warp[1][w];
    }
    group.barrier();
  }
};

}  // namespace kalmanet::cuda
