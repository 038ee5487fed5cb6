// The decode step at full speed: K = V = 128, float32 states that are dense in rows of 16 bytes,
// any dtype of q, k, v but float64 (the token kernel is the plain twin, for everything else).
//
// One block a sequence and head. All of both states is on its way from the first instruction on:
// H into registers, 64 floats a thread, U into shared memory by copies that need no register. H
// goes back as soon as it is updated, before the solve; U while it is read out. So of a block's
// life only the solve itself moves nothing, and another block's states travel meanwhile.
//
// A Chebyshev step costs a warp 64 multiply-adds, 4 loads of the iterate and one barrier. A thread
// has 4 rows of H and of each 16 columns, in 4 pieces of 4 that the 8 threads of a row take in
// turn: a piece's loads and stores are whole lines of 128 bytes, and so are the reads of the
// iterate. The 8 partial sums of 4 rows are added by halves first, then four at once (add_sums).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/async_copy.hpp"
#include "cuda/group.hpp"
#include "cuda/job.hpp"

namespace kalmanet::cuda {

// (Code that a warp runs once costs it some 12 cycles an instruction, which must be fetched: hence
// the rolled loops, the dense states, and one load for all of a token's own numbers.)
struct StepLayout {
  static constexpr int kDim = 128;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = 4, kPieces = 4;
  static constexpr int kUSteps = kDim / kWarps;  // rows of U a thread has four columns of

  KALMANET_KERNEL static int row(int thread) { return thread / 8 * kRows; }
  KALMANET_KERNEL static int column(int thread, int piece) { return (piece * 8 + thread % 8) * 4; }
  // Where element `row` of the iterate lies: the first two of every four in one half, so that a
  // thread reads a piece of it as two times 8 bytes that no compiler makes one load of
  // (async_copy.hpp).
  KALMANET_KERNEL static int place(int row) {
    return row / 4 * 2 + row % 2 + row % 4 / 2 * (kDim / 2);
  }
  // Where a thread writes its row's: the second of the two that have it, where nobody reads.
  KALMANET_KERNEL static int own_place(int thread) {
    return place(own_row(thread)) + thread % 2 * kDim;
  }
  // The iterate lies in one of two places in turn, so many bytes apart. (Places in bytes are what a
  // load takes as it is.)
  static constexpr int kTurn = 2 * kDim * sizeof(float);
  KALMANET_KERNEL static int read_byte(int thread) {
    return thread % 8 * 2 * static_cast<int>(sizeof(float));
  }
  KALMANET_KERNEL static int own_byte(int thread) {
    return own_place(thread) * static_cast<int>(sizeof(float));
  }
  template <class T>
  KALMANET_KERNEL static T* at_byte(T* p, int byte) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + byte);
  }
  KALMANET_KERNEL static void load_piece(const float* x, int piece, float (&out)[4]) {
    float a[2], b[2];
    load2(x + piece * 16, a);
    load2(x + piece * 16 + kDim / 2, b);
    out[0] = a[0], out[1] = a[1], out[2] = b[0], out[3] = b[1];
  }
  // The row whose sum a thread (and its neighbour) ends with.
  KALMANET_KERNEL static int own_row(int thread) { return thread / 2; }
  // Where a thread's piece of U begins; the others follow, a row further on each.
  KALMANET_KERNEL static int u_begin(int thread) {
    return thread / 32 * kUSteps * kDim + thread % 32 * 4;
  }
};

// 1 / a to one unit in the last place; a and the result normal numbers.
KALMANET_KERNEL float reciprocal(float a) {
#ifdef __CUDACC__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
#else
  return 1.0f / a;
#endif
}
// x, of which the compiler must not think that it could as well compute it again.
KALMANET_KERNEL int kept(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

template <class T>
KALMANET_KERNEL T* kept(T* x) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(x));
#endif
  return x;
}
// x, which is the same in all lanes of a warp, known to be: what branches on it stays together.
KALMANET_KERNEL int uniform(int x) {
#ifdef __CUDACC__
  return __shfl_sync(~0u, x, 0);
#else
  return x;
#endif
}

// A token's own numbers, as GkaJob::scalars has them.
enum StepScalar { kStepDecay, kStepUDecay, kStepBeta, kStepAlpha, kStepRidge, kStepScalars };

KALMANET_KERNEL float absent_scalar(const GkaJob& job, int which) {
  if (which == kStepRidge) return static_cast<float>(job.ridge_ratio);
  return which <= kStepUDecay ? 0.0f : 1.0f;
}

// A dense state of one sequence and head; null: absent.
KALMANET_KERNEL float* dense_state(const Array& a, int64_t row, int64_t head) {
  if (a.data == nullptr) return nullptr;
  return static_cast<float*>(a.data) + row * a.stride[0] + head * a.stride[1];
}
KALMANET_KERNEL int64_t grouped(int64_t head, int64_t group) {
  return group == 1 ? head : static_cast<uint32_t>(head) / static_cast<uint32_t>(group);
}

struct StepShared {
  alignas(128) float u[StepLayout::kDim * StepLayout::kDim];
  // What the next product is taken of, in turn, q first: by StepLayout::place.
  alignas(16) float x[2][2 * StepLayout::kDim];
  alignas(16) double x64[2][StepLayout::kDim];
  alignas(16) float k[StepLayout::kDim];
  alignas(16) float v[StepLayout::kDim];
  alignas(16) float m[StepLayout::kDim];
  alignas(16) float partial[StepLayout::kWarps][StepLayout::kDim];  // of o
  alignas(16) double partial64[StepLayout::kWarps][StepLayout::kDim];
  alignas(16) float squares[4][StepLayout::kWarps];  // of H, x, U and o
  alignas(16) float scalar[8];
  double least_o2;  // |o|^2 below which a token is amplified
};

struct StepRegisters {
  float h[StepLayout::kPieces][StepLayout::kRows][4];
  float sum[StepLayout::kRows], sent[2], got[3], product;
  float x, previous, q, rest, carried;  // of own_row
  double sum64[StepLayout::kRows], sent64[2], got64[3], product64;
  double x_64, previous64;
  float squares, o[4];
  double o64[4];
  int place;                       // of its first piece of H
  int own_byte, read_byte;         // of the iterate; kept: nothing before a step's loads
  uint32_t first, second, scalar;  // of the next token: bits of k and q, or v; one of its numbers
};

// The operations on H in registers.
template <class Group>
struct StepProducts {
  using L = StepLayout;
  using Registers = StepRegisters;
  Group& group;
  StepShared& shared;

  // sum[4] of the 8 threads of four rows -> product, the whole sum of own_row.
  template <class Sum, class Sent, class Got, class Product>
  KALMANET_KERNEL void add_sums(Sum&& sum, Sent&& sent, Got&& got, Product&& product) {
    group.each([&](int thread, Registers& r) {
      const bool upper = (thread & 4) != 0;
      auto& s = sum(r);
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        sent(r)[i] = upper ? s[i] : s[i + 2];
        s[i] = upper ? s[i + 2] : s[i];
      }
    });
    KALMANET_UNROLL
    for (int i = 0; i < 2; ++i) {
      group.template exchange<4>([&](Registers& r) -> auto& { return got(r)[i]; },
                                 [&](Registers& r) { return sent(r)[i]; });
    }
    group.each([&](int thread, Registers& r) {
      const bool upper = (thread & 2) != 0;
      auto& s = sum(r);
      s[0] += got(r)[0];
      s[1] += got(r)[1];
      sent(r)[0] = upper ? s[0] : s[1];
      s[0] = upper ? s[1] : s[0];
    });
    // Of the row's other three lanes, all on their way at once.
    group.template exchange<1>([&](Registers& r) -> auto& { return got(r)[0]; },
                               [&](Registers& r) { return sum(r)[0]; });
    group.template exchange<2>([&](Registers& r) -> auto& { return got(r)[1]; },
                               [&](Registers& r) { return sent(r)[0]; });
    group.template exchange<3>([&](Registers& r) -> auto& { return got(r)[2]; },
                               [&](Registers& r) { return sent(r)[0]; });
    group.each(
        [&](int, Registers& r) { product(r) = (sum(r)[0] + got(r)[0]) + (got(r)[1] + got(r)[2]); });
  }
  KALMANET_KERNEL void add_sums() {
    add_sums([](Registers& r) -> auto& { return r.sum; },
             [](Registers& r) -> auto& { return r.sent; },
             [](Registers& r) -> auto& { return r.got; },
             [](Registers& r) -> auto& { return r.product; });
  }

  // registers.product <- own_row of H x, of the x that read_byte says; which then is the other.
  KALMANET_KERNEL void multiply() {
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < L::kRows; ++i) r.sum[i] = 0;
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        float y4[4];
        L::load_piece(L::at_byte(const_cast<const float*>(shared.x[0]), r.read_byte), p, y4);
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < L::kRows; ++i) r.sum[i] += r.h[p][i][j] * y4[j];
        }
      }
      r.read_byte = kept(r.read_byte ^ L::kTurn);
    });
    add_sums();
  }
  KALMANET_KERNEL void multiply64(const double* y) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < L::kRows; ++i) r.sum64[i] = 0;
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) {
          const double yj = y[L::column(thread, p) + j];
          KALMANET_UNROLL
          for (int i = 0; i < L::kRows; ++i) r.sum64[i] += static_cast<double>(r.h[p][i][j]) * yj;
        }
      }
    });
    add_sums([](Registers& r) -> auto& { return r.sum64; },
             [](Registers& r) -> auto& { return r.sent64; },
             [](Registers& r) -> auto& { return r.got64; },
             [](Registers& r) -> auto& { return r.product64; });
  }

  // A block's sum of member(registers) into shared.squares[which], a warp each; added up by
  // total() after a barrier.
  template <class Member>
  KALMANET_KERNEL void put_squares(int which, Member&& member) {
    group.template sum_lanes<32>(member);
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.squares[which][thread / 32] = member(r);
    });
  }
  KALMANET_KERNEL float total(int which) const {
    float a[4], b[4];
    load4(shared.squares[which], a);
    load4(shared.squares[which] + 4, b);
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3]));
  }
};

}  // namespace kalmanet::cuda
