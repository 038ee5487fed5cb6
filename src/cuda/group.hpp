// How a kernel's body is written once and run twice: by the threads of a block on the GPU, and by a
// loop on the CPU, where the tests run the very same index arithmetic against the oracle.
//
// A body is a template over a group. group.each(f) runs f(thread, registers) for every thread of
// the block; what a thread keeps from one each() to the next lies in its registers, a plain struct
// that the compiler takes apart. group.barrier() separates what one thread writes to shared memory
// from what another reads. On the CPU the threads of an each() run one after the other, in either
// order: a result that depends on the order is a missing barrier.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/words.hpp"

namespace kalmanet::cuda {

// 16 x 16 numbers of 16 bits in shared memory as four matrices of 8 x 8 (row-major among
// themselves), each 128 bytes by rows: what a warp loads in one instruction, as it lies or each
// matrix transposed, without two lanes meeting in a bank. Word [m][lane] of matrix m holds row lane
// / 4 and columns 2 (lane % 4) and the next: where a warp's sums have them.
struct alignas(16) Quad {
  uint32_t word[4][32];
};

#ifdef __CUDACC__
template <class Registers>
class DeviceGroup {
 public:
  __device__ __forceinline__ explicit DeviceGroup(int thread = static_cast<int>(threadIdx.x))
      : thread_(thread) {}
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    __builtin_assume(thread_ >= 0 && thread_ < 1024);
    f(thread_, registers_);
  }
  // Where a long loop's next part begins: what follows from a thread's number alone is computed
  // anew, instead of waiting in registers through all parts.
  __device__ __forceinline__ void new_part() { asm volatile("" : "+r"(thread_)); }
  __device__ __forceinline__ void barrier() { __syncthreads(); }
  // In each thread, the sum of member(registers) over its kLanes neighbours (a power of two,
  // aligned): the same bits in all of them.
  template <int kLanes, class Member>
  __device__ __forceinline__ void sum_lanes(Member&& member) {
    auto& value = member(registers_);
    KALMANET_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) value += __shfl_xor_sync(~0u, value, mask);
  }
  // The same over so many neighbours as the kernel is told.
  template <class Member>
  __device__ __forceinline__ void sum_neighbours(int lanes, Member&& member) {
    auto& value = member(registers_);
    for (int mask = 1; mask < lanes; mask *= 2) value += __shfl_xor_sync(~0u, value, mask);
  }
  // The same over the eight lanes with the same lane % 4.
  template <class Member>
  __device__ __forceinline__ void sum_rows(Member&& member) {
    auto& value = member(registers_);
    KALMANET_UNROLL
    for (int mask = 4; mask < 32; mask *= 2) value += __shfl_xor_sync(~0u, value, mask);
  }
  // c[4] += a[4] b[2], a warp's m16n8k16 product of bfloat16 with float32 sums.
  template <class C, class A, class B>
  __device__ __forceinline__ void multiply_add(C&& c_of, A&& a_of, B&& b_of) {
    auto& c = c_of(registers_);
    const auto& a = a_of(registers_);
    const auto& b = b_of(registers_);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  // d[4] = c[4] + a[4] b[2] of float16, sums in float32. d and c may be the same.
  template <class D, class C, class A, class B>
  __device__ __forceinline__ void multiply_add_float16(D&& d_of, C&& c_of, A&& a_of, B&& b_of) {
    auto& d = d_of(registers_);
    auto& c = c_of(registers_);
    const auto& a = a_of(registers_);
    const auto& b = b_of(registers_);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
  // f() by the threads of `count` warps alone, or of one.
  template <class F>
  __device__ __forceinline__ void with_warps(int first, int count, F&& f) {
    if (thread_ / 32 >= first && thread_ / 32 < first + count) f();
  }
  template <class F>
  __device__ __forceinline__ void with_warp(int warp, F&& f) {
    __builtin_assume(thread_ >= 0 && thread_ < 1024);
    if (thread_ / 32 == warp) f();
  }
  // to(registers) = from(registers) of lane lane_of(thread) of the same warp.
  template <class To, class From, class Lane>
  __device__ __forceinline__ void shuffle(To&& to, From&& from, Lane&& lane_of) {
    to(registers_) = __shfl_sync(~0u, from(registers_), lane_of(thread_));
  }
  // The same from the lane whose number differs in the bits of kMask.
  template <int kMask, class To, class From>
  __device__ __forceinline__ void exchange(To&& to, From&& from) {
    to(registers_) = __shfl_xor_sync(~0u, from(registers_), kMask);
  }
  // The largest over the warp.
  template <class Member>
  __device__ __forceinline__ void max_warp(Member&& member) {
    auto& value = member(registers_);
    if constexpr (sizeof(value) == 4 && !std::is_same_v<std::decay_t<decltype(value)>, float>) {
      value = __reduce_max_sync(~0u, value);
    } else {
      KALMANET_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) {
        const auto other = __shfl_xor_sync(~0u, value, mask);
        value = other > value ? other : value;
      }
    }
  }
  // Of the 8 x 8 of 16 bits that a warp holds in a register, two a lane by rows: its transpose.
  template <class Member>
  __device__ __forceinline__ void transpose(Member&& member) {
    uint32_t& value = member(registers_);
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(value));
  }
  // f(warp) by each of the warps [first, last), apart from one another.
  template <class F>
  __device__ __forceinline__ void by_warp(int first, int last, F&& f) {
    __builtin_assume(thread_ >= 0 && thread_ < 1024);
    const int warp = thread_ / 32;
    if (warp >= first && warp < last) f(warp);
  }
  // What a warp's lanes wrote to shared memory is there for all of them.
  __device__ __forceinline__ void barrier_warp() { __syncwarp(); }
  // The same for warps w and w + 4 of eight.
  __device__ __forceinline__ void barrier_pairs() {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + thread_ / 32 % 4) : "memory");
  }
  // to(registers)[0 .. 3] <- the four matrices of the warp's from(thread), each transposed or not,
  // the middle two in each other's place (kSwap) or not.
  template <bool kTranspose, bool kSwap, class To, class From>
  __device__ __forceinline__ void load_quad(To&& to, From&& from) {
    __builtin_assume(thread_ >= 0 && thread_ < 1024);
    uint32_t* const t = to(registers_);
    const int lane = thread_ % 32;
    const int row = kSwap ? ((lane & 7) | (lane & 8) << 1 | (lane & 16) >> 1) : lane;
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(from(thread_))) +
                        static_cast<uint32_t>(row) * 16;
    if (kTranspose) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(t[0]), "=r"(t[1]), "=r"(t[2]), "=r"(t[3])
                   : "r"(at));
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(t[0]), "=r"(t[1]), "=r"(t[2]), "=r"(t[3])
                   : "r"(at));
    }
  }
  // The sum, and the largest, over the lanes with the same lane % kApart.
  template <int kApart, class Member>
  __device__ __forceinline__ void sum_apart(Member&& member) {
    auto& value = member(registers_);
    KALMANET_UNROLL
    for (int mask = kApart; mask < 32; mask *= 2) value += __shfl_xor_sync(~0u, value, mask);
  }
  template <int kApart, class Member>
  __device__ __forceinline__ void max_apart(Member&& member) {
    auto& value = member(registers_);
    KALMANET_UNROLL
    for (int mask = kApart; mask < 32; mask *= 2) {
      const auto other = __shfl_xor_sync(~0u, value, mask);
      value = other > value ? other : value;
    }
  }

 private:
  int thread_;
  Registers registers_;
};

// Threads kPart kThreads .. (kPart + 1) kThreads of a block as a group of their own.
template <class Registers, int kThreads, int kPart>
class DevicePart : public DeviceGroup<Registers> {
 public:
  __device__ __forceinline__ DevicePart()
      : DeviceGroup<Registers>(static_cast<int>(threadIdx.x) - kPart * kThreads) {}
  __device__ __forceinline__ void barrier() {
    asm volatile("bar.sync %0, %1;" ::"n"(1 + kPart), "n"(kThreads) : "memory");
  }
};
#endif

template <class Registers>
class HostGroup {
 public:
  HostGroup(int threads, bool backwards)
      : registers_(static_cast<size_t>(threads)),
        backwards_(backwards),
        end_(static_cast<size_t>(threads)) {}
  template <class F>
  void each(F&& f) {
    for (size_t i = begin_; i < end_; ++i) {
      const size_t thread = backwards_ ? begin_ + end_ - 1 - i : i;
      f(static_cast<int>(thread), registers_[thread]);
    }
  }
  void new_part() {}
  template <class F>
  void with_warps(int first, int count, F&& f) {
    const size_t end = end_;
    begin_ = static_cast<size_t>(first) * 32;
    end_ = begin_ + static_cast<size_t>(count) * 32;
    f();
    begin_ = 0;
    end_ = end;
  }
  template <class F>
  void with_warp(int warp, F&& f) {
    with_warps(warp, 1, f);
  }
  template <class To, class From, class Lane>
  void shuffle(To&& to, From&& from, Lane&& lane_of) {
    using Value = std::decay_t<decltype(from(registers_[0]))>;
    std::vector<Value> old(registers_.size());
    for (size_t i = begin_; i < end_; ++i) old[i] = from(registers_[i]);
    for (size_t i = begin_; i < end_; ++i) {
      const size_t lane = static_cast<size_t>(lane_of(static_cast<int>(i))) % 32;
      to(registers_[i]) = old[i / 32 * 32 + lane];
    }
  }
  template <int kMask, class To, class From>
  void exchange(To&& to, From&& from) {
    shuffle(to, from, [](int t) { return t % 32 ^ kMask; });
  }
  template <class Member>
  void max_warp(Member&& member) {
    for (size_t warp = begin_; warp < end_; warp += 32) {
      auto largest = member(registers_[warp]);
      for (size_t i = warp; i < warp + 32; ++i) {
        if (member(registers_[i]) > largest) largest = member(registers_[i]);
      }
      for (size_t i = warp; i < warp + 32; ++i) member(registers_[i]) = largest;
    }
  }
  void barrier() {}
  template <class Member>
  void sum_rows(Member&& member) {
    using Value = std::decay_t<decltype(member(registers_[0]))>;
    std::vector<Value> old(registers_.size());
    for (size_t mask = 4; mask < 32; mask *= 2) {
      for (size_t i = begin_; i < end_; ++i) old[i] = member(registers_[i]);
      for (size_t i = begin_; i < end_; ++i) member(registers_[i]) = old[i] + old[i ^ mask];
    }
  }
  template <class C, class A, class B>
  void multiply_add(C&& c_of, A&& a_of, B&& b_of) {
    multiply_tiles(c_of, c_of, a_of, b_of, low_bfloat16, high_bfloat16);
  }
  template <class D, class C, class A, class B>
  void multiply_add_float16(D&& d_of, C&& c_of, A&& a_of, B&& b_of) {
    multiply_tiles(d_of, c_of, a_of, b_of, low_float16, high_float16);
  }
  template <class D, class C, class A, class B, class Half>
  void multiply_tiles(D&& d_of, C&& c_of, A&& a_of, B&& b_of, Half low, Half high) {
    for (size_t warp = begin_; warp < end_; warp += 32) {
      float a[16][16], b[16][8];
      for (size_t lane = 0; lane < 32; ++lane) {
        Registers& r = registers_[warp + lane];
        const size_t row = lane / 4, column = lane % 4 * 2;
        for (size_t i = 0; i < 4; ++i) {
          float* const to = &a[row + i % 2 * 8][column + i / 2 * 8];
          to[0] = low(a_of(r)[i]), to[1] = high(a_of(r)[i]);
        }
        for (size_t i = 0; i < 2; ++i) {
          b[column + i * 8][row] = low(b_of(r)[i]);
          b[column + i * 8 + 1][row] = high(b_of(r)[i]);
        }
      }
      for (size_t lane = 0; lane < 32; ++lane) {
        auto& c = c_of(registers_[warp + lane]);
        auto& d = d_of(registers_[warp + lane]);
        for (size_t i = 0; i < 4; ++i) {
          const size_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
          float sum = c[i];
          for (size_t k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
          d[i] = sum;
        }
      }
    }
  }
  template <class Member>
  void transpose(Member&& member) {
    for (size_t warp = begin_; warp < end_; warp += 32) {
      uint16_t m[8][8];
      for (size_t lane = 0; lane < 32; ++lane) {
        const uint32_t both = member(registers_[warp + lane]);
        m[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(both);
        m[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(both >> 16);
      }
      for (size_t lane = 0; lane < 32; ++lane) {
        const size_t row = lane / 4, column = lane % 4 * 2;
        member(registers_[warp + lane]) = m[column][row] | static_cast<uint32_t>(m[column + 1][row])
                                                               << 16;
      }
    }
  }
  template <int kLanes, class Member>
  void sum_lanes(Member&& member) {
    sum_neighbours(kLanes, member);
  }
  template <class Member>
  void sum_neighbours(int lanes, Member&& member) {
    using Value = std::decay_t<decltype(member(registers_[0]))>;
    std::vector<Value> old(registers_.size());
    for (int mask = 1; mask < lanes; mask *= 2) {
      for (size_t i = begin_; i < end_; ++i) old[i] = member(registers_[i]);
      for (size_t i = begin_; i < end_; ++i) {
        member(registers_[i]) = old[i] + old[i ^ static_cast<size_t>(mask)];
      }
    }
  }
  template <class F>
  void by_warp(int first, int last, F&& f) {
    const size_t begin = begin_, end = end_;
    for (int i = first; i < last; ++i) {
      const int warp = backwards_ ? first + last - 1 - i : i;
      const size_t at = static_cast<size_t>(warp) * 32;
      if (at < begin || at >= end) continue;  // (within another by_warp)
      begin_ = at;
      end_ = at + 32;
      f(warp);
      begin_ = begin;
      end_ = end;
    }
  }
  void barrier_warp() {}
  void barrier_pairs() {}
  template <bool kTranspose, bool kSwap, class To, class From>
  void load_quad(To&& to, From&& from) {
    for (size_t i = begin_; i < end_; ++i) {
      const Quad& quad = *from(static_cast<int>(i));
      uint32_t* const t = to(registers_[i]);
      const size_t row = i % 32 / 4, column = i % 4 * 2;
      for (size_t m = 0; m < 4; ++m) {
        const size_t which = kSwap && (m == 1 || m == 2) ? 3 - m : m;
        const auto half = [&](size_t r, size_t c) {
          return quad.word[which][r * 4 + c / 2] >> (c % 2 * 16) & 0xffff;
        };
        t[m] =
            kTranspose ? half(column, row) | half(column + 1, row) << 16 : quad.word[which][i % 32];
      }
    }
  }
  template <int kApart, class Member>
  void sum_apart(Member&& member) {
    using Value = std::decay_t<decltype(member(registers_[0]))>;
    std::vector<Value> old(registers_.size());
    for (size_t mask = kApart; mask < 32; mask *= 2) {
      for (size_t i = begin_; i < end_; ++i) old[i] = member(registers_[i]);
      for (size_t i = begin_; i < end_; ++i) member(registers_[i]) = old[i] + old[i ^ mask];
    }
  }
  template <int kApart, class Member>
  void max_apart(Member&& member) {
    using Value = std::decay_t<decltype(member(registers_[0]))>;
    std::vector<Value> old(registers_.size());
    for (size_t mask = kApart; mask < 32; mask *= 2) {
      for (size_t i = begin_; i < end_; ++i) old[i] = member(registers_[i]);
      for (size_t i = begin_; i < end_; ++i) {
        if (old[i ^ mask] > old[i]) member(registers_[i]) = old[i ^ mask];
      }
    }
  }

 private:
  std::vector<Registers> registers_;
  bool backwards_;
  size_t begin_ = 0, end_;  // the threads at work
};

}  // namespace kalmanet::cuda
