// What a warpgroup of four warps does together on Hopper: products whose right factor lies in
// shared memory (wgmma), and loads of 8 x 8 numbers into fragments; on the CPU the same index
// arithmetic.
//
// A left factor of 64 rows lies in registers, 16 columns in four words: words 4 k .. of a row-major
// 64 x K hold columns 16 k .. ; or in shared memory as well. Sums of 64 x N lie so that elements 2
// j and 2 j + 1 become word j of a left factor: row 16 warp + lane / 4 + 8 (j % 2), columns 8 (j /
// 2) + 2 (lane % 4) and the next. Several warpgroups of a block do the same product apart, each
// with factors of its own.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cuda/group.hpp"

namespace kalmanet::cuda {

// 8 x 8 numbers of 16 bits by rows: what wgmma takes as one piece without swizzling (a "core
// matrix"), eight rows of 16 bytes, which a warp writes and reads without two lanes in a bank.
struct alignas(128) Core {
  uint32_t word[32];
};

// A matrix of cores in shared memory: how many cores further the next eight rows lie; the next
// eight columns follow at once.
struct Cores {
  const Core* at;
  int rows_apart;
};

// The row of element 2 j (or 2 j + 1) of a sum, of all the block's warps (of its own warpgroup:
// modulo 64), and its column.
KALMANET_KERNEL int sum_row(int thread, int j) {
  return thread / 32 * 16 + thread % 32 / 4 + j % 2 * 8;
}
KALMANET_KERNEL int sum_column(int thread, int j) {
  return j / 2 * 8 + thread % 4 * 2;
}

#ifdef __CUDACC__

// Registers d[i] .. d[i + 7] as operands.
#define KALMANET_EIGHT(how, d, i)                                                       \
  how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]), \
      how(d[i + 6]), how(d[i + 7])

// d += a b, 16 columns of a, in registers or by its descriptor; b's descriptor. kRows: the right
// factor's rows lie as rows (k), else as columns. _first: d = a b, with which what d was need not
// be in the registers where it becomes this.
template <bool kRows>
KALMANET_KERNEL void wgmma64(float* d, const uint32_t* a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, keep, 1, 1, %37;\n}"
      : KALMANET_EIGHT("+f", d, 0), KALMANET_EIGHT("+f", d, 8), KALMANET_EIGHT("+f", d, 16),
        KALMANET_EIGHT("+f", d, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRows ? 1 : 0));
#endif
}
template <bool kRows>
KALMANET_KERNEL void wgmma64_first(float* d, const uint32_t* a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, keep, 1, 1, %37;\n}"
      : KALMANET_EIGHT("=f", d, 0), KALMANET_EIGHT("=f", d, 8), KALMANET_EIGHT("=f", d, 16),
        KALMANET_EIGHT("=f", d, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRows ? 1 : 0));
#endif
}
template <bool kRows>
KALMANET_KERNEL void wgmma128(float* d, const uint32_t* a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, keep, 1, 1, %69;\n}"
      : KALMANET_EIGHT("+f", d, 0), KALMANET_EIGHT("+f", d, 8), KALMANET_EIGHT("+f", d, 16),
        KALMANET_EIGHT("+f", d, 24), KALMANET_EIGHT("+f", d, 32), KALMANET_EIGHT("+f", d, 40),
        KALMANET_EIGHT("+f", d, 48), KALMANET_EIGHT("+f", d, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRows ? 1 : 0));
#endif
}
template <bool kRows>
KALMANET_KERNEL void wgmma128_bfloat16(float* d, const uint32_t* a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, keep, 1, 1, %69;\n}"
      : KALMANET_EIGHT("+f", d, 0), KALMANET_EIGHT("+f", d, 8), KALMANET_EIGHT("+f", d, 16),
        KALMANET_EIGHT("+f", d, 24), KALMANET_EIGHT("+f", d, 32), KALMANET_EIGHT("+f", d, 40),
        KALMANET_EIGHT("+f", d, 48), KALMANET_EIGHT("+f", d, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRows ? 1 : 0));
#endif
}
template <bool kRows>
KALMANET_KERNEL void wgmma64_shared(float* d, uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, keep, 1, 1, 0, %34;\n}"
      : KALMANET_EIGHT("+f", d, 0), KALMANET_EIGHT("+f", d, 8), KALMANET_EIGHT("+f", d, 16),
        KALMANET_EIGHT("+f", d, 24)
      : "l"(a), "l"(b), "n"(kRows ? 1 : 0));
#endif
}
template <bool kRows>
KALMANET_KERNEL void wgmma64_shared_first(float* d, uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, keep, 1, 1, 0, %34;\n}"
      : KALMANET_EIGHT("=f", d, 0), KALMANET_EIGHT("=f", d, 8), KALMANET_EIGHT("=f", d, 16),
        KALMANET_EIGHT("=f", d, 24)
      : "l"(a), "l"(b), "n"(kRows ? 1 : 0));
#endif
}

// A factor's descriptor: where it lies, and its cores' distances in bytes by 16, along k in bits 16
// .. and along the product's own side in 32 .. . kRows: k goes along its rows.
template <bool kRows>
KALMANET_KERNEL uint64_t descriptor_of(Cores x) {
  constexpr uint64_t kCore = sizeof(Core) / 16;
  const uint64_t rows = static_cast<uint64_t>(x.rows_apart) * kCore;
  const uint64_t along_k = kRows ? rows : kCore, other = kRows ? kCore : rows;
  uint64_t descriptor =
      (__cvta_generic_to_shared(x.at) & 0x3ffff) >> 4 | along_k << 16 | other << 32;
  // (Made here, and not kept in registers from a loop's start.)
  asm volatile("" : "+l"(descriptor));
  return descriptor;
}
// How much further 16 of k are.
template <bool kRows>
KALMANET_KERNEL uint64_t step_of(Cores x) {
  return 2 * (kRows ? static_cast<uint64_t>(x.rows_apart) : 1) * (sizeof(Core) / 16);
}

// c[32 or 64] += a b, or = a b where not `keep`, for 16 columns a[4] of a left factor (c_of and
// a_of say where in the registers) and 64 or 128 columns (kColumns) of b (of a thread). kRows: b's
// rows are as in memory; otherwise b is the transpose of what lies there. Between begin_products()
// and settle<..>() neither c nor a may be touched.
// kBfloat16 (128 columns): of bfloat16 instead of float16.
template <int kColumns, bool kRows, bool kBfloat16 = false, class Registers, class C, class A,
          class B>
KALMANET_KERNEL void multiply_wide(DeviceGroup<Registers>& group, C&& c_of, A&& a_of, B&& b_of,
                                   bool keep = true) {
  group.each([&](int thread, Registers& r) {
    const uint64_t b = descriptor_of<kRows>(b_of(thread));
    if constexpr (kColumns == 64) {
      keep ? wgmma64<kRows>(c_of(r), a_of(r), b) : wgmma64_first<kRows>(c_of(r), a_of(r), b);
    } else if constexpr (kBfloat16) {
      wgmma128_bfloat16<kRows>(c_of(r), a_of(r), b);
    } else {
      wgmma128<kRows>(c_of(r), a_of(r), b);
    }
  });
}
// The same, 64 columns, for a left factor of kSteps times 16 columns that lies in shared memory as
// well.
template <int kSteps, bool kRows, class Registers, class C, class A, class B>
KALMANET_KERNEL void multiply_shared(DeviceGroup<Registers>& group, C&& c_of, A&& a_of, B&& b_of,
                                     bool keep = true) {
  group.each([&](int thread, Registers& r) {
    const Cores a_cores = a_of(thread), b_cores = b_of(thread);
    uint64_t a = descriptor_of<false>(a_cores), b = descriptor_of<kRows>(b_cores);
    keep ? wgmma64_shared<kRows>(c_of(r), a, b) : wgmma64_shared_first<kRows>(c_of(r), a, b);
    KALMANET_UNROLL
    for (int k = 1; k < kSteps; ++k) {
      a += step_of<false>(a_cores), b += step_of<kRows>(b_cores);
      wgmma64_shared<kRows>(c_of(r), a, b);
    }
  });
}

template <class Registers>
KALMANET_KERNEL void begin_products(DeviceGroup<Registers>&) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// The products since the last call become one group, of which kPending may be under way when
// wait_products returns.
template <class Registers>
KALMANET_KERNEL void commit_products(DeviceGroup<Registers>&) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending, class Registers>
KALMANET_KERNEL void wait_products(DeviceGroup<Registers>&) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// The compiler must not read sums before the wait: it does not know that they come late.
template <int kSums, class Registers, class C>
KALMANET_KERNEL void settle(DeviceGroup<Registers>& group, C&& c_of) {
  group.each([&](int, Registers& r) {
    float* const c = c_of(r);
    KALMANET_UNROLL
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(c[i])::"memory");
  });
}

// What this thread stored to shared memory is there for the products after the next barrier.
template <class Registers>
KALMANET_KERNEL void publish(DeviceGroup<Registers>&) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// to(registers)[m] <- the 8 x 8 of which lanes 8 m .. 8 m + 7 name the rows (row_at(thread), 16
// bytes each), as a warp's fragment has it, or transposed.
template <bool kTranspose, class Registers, class To, class Row>
KALMANET_KERNEL void load_fragment(DeviceGroup<Registers>& group, To&& to, Row&& row_at) {
  group.each([&](int thread, Registers& r) {
    uint32_t* const t = to(r);
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row_at(thread)));
    if constexpr (kTranspose) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(t[0]), "=r"(t[1]), "=r"(t[2]), "=r"(t[3])
                   : "r"(at));
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(t[0]), "=r"(t[1]), "=r"(t[2]), "=r"(t[3])
                   : "r"(at));
    }
  });
}

#else  // of __CUDACC__

// A number of 16 bits, float16 or bfloat16; and number (row, column) of cores.
template <bool kBfloat16 = false>
float half_number(uint32_t both, int which) {
  if (kBfloat16) return which == 0 ? low_bfloat16(both) : high_bfloat16(both);
  return which == 0 ? low_float16(both) : high_float16(both);
}
template <bool kBfloat16 = false>
float core_number(Cores x, int row, int column) {
  const Core& core = x.at[row / 8 * x.rows_apart + column / 8];
  return half_number<kBfloat16>(core.word[row % 8 * 4 + column % 8 / 2], column % 2);
}

// What multiply_wide and multiply_shared do: left[thread / 128] is 64 x 16.
template <int kColumns, bool kRows, bool kBfloat16 = false, class Registers, class C, class B>
void multiply_left(HostGroup<Registers>& group, const float (&left)[2][64][16], C&& c_of, B&& b_of,
                   bool keep) {
  std::vector<float> right(2 * 16 * kColumns);
  bool made[2] = {};
  group.each([&](int thread, Registers& r) {
    const int part = thread / 128;
    float* const to = &right[static_cast<size_t>(part) * 16 * kColumns];
    if (!made[part]) {
      const Cores b = b_of(thread);
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < kColumns; ++n) {
          to[k * kColumns + n] = core_number<kBfloat16>(b, kRows ? k : n, kRows ? n : k);
        }
      }
      made[part] = true;
    }
    float* const c = c_of(r);
    for (int j = 0; j < kColumns / 4; ++j) {
      const int row = sum_row(thread, j) % 64, column = sum_column(thread, j);
      for (int i = 0; i < 2; ++i) {
        float sum = keep ? c[2 * j + i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[part][row][k] * to[k * kColumns + column + i];
        c[2 * j + i] = sum;
      }
    }
  });
}
template <int kColumns, bool kRows, bool kBfloat16 = false, class Registers, class C, class A,
          class B>
void multiply_wide(HostGroup<Registers>& group, C&& c_of, A&& a_of, B&& b_of, bool keep = true) {
  float left[2][64][16];
  group.each([&](int thread, Registers& r) {
    for (int j = 0; j < 4; ++j) {
      float* const to = &left[thread / 128][sum_row(thread, j) % 64][sum_column(thread, j)];
      for (int c = 0; c < 2; ++c) to[c] = half_number<kBfloat16>(a_of(r)[j], c);
    }
  });
  multiply_left<kColumns, kRows, kBfloat16>(group, left, c_of, b_of, keep);
}
template <int kSteps, bool kRows, class Registers, class C, class A, class B>
void multiply_shared(HostGroup<Registers>& group, C&& c_of, A&& a_of, B&& b_of, bool keep = true) {
  for (int k = 0; k < kSteps; ++k) {
    float left[2][64][16];
    group.each([&](int thread, Registers&) {
      if (thread % 128 != 0) return;
      for (int row = 0; row < 64; ++row) {
        for (int i = 0; i < 16; ++i) {
          left[thread / 128][row][i] = core_number(a_of(thread), row, 16 * k + i);
        }
      }
    });
    multiply_left<64, kRows>(
        group, left, c_of,
        [&](int thread) {
          Cores b = b_of(thread);
          b.at += 2 * k * (kRows ? b.rows_apart : 1);
          return b;
        },
        keep || k > 0);
  }
}
template <class Registers>
void begin_products(HostGroup<Registers>&) {}
template <class Registers>
void commit_products(HostGroup<Registers>&) {}
template <int kPending, class Registers>
void wait_products(HostGroup<Registers>&) {}
template <int kSums, class Registers, class C>
void settle(HostGroup<Registers>&, C&&) {}
template <class Registers>
void publish(HostGroup<Registers>&) {}

template <bool kTranspose, class Registers, class To, class Row>
void load_fragment(HostGroup<Registers>& group, To&& to, Row&& row_at) {
  std::vector<const uint32_t*> rows(1024);
  group.each([&](int thread, Registers&) { rows[static_cast<size_t>(thread)] = row_at(thread); });
  group.each([&](int thread, Registers& r) {
    const int warp = thread / 32 * 32, row = thread % 32 / 4, column = thread % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const auto half = [&](int i, int c) {
        return rows[static_cast<size_t>(warp + m * 8 + i)][c / 2] >> (c % 2 * 16) & 0xffff;
      };
      to(r)[m] = kTranspose ? half(column, row) | half(column + 1, row) << 16
                            : half(row, column) | half(row, column + 1) << 16;
    }
  });
}

#endif

}  // namespace kalmanet::cuda
