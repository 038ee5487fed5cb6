// Numbers of 16 bits in pairs, single instructions, and loads and stores of 16 bytes: what a thread
// does alone, on the GPU and, with the same results or nearly, on the CPU (cuda/group.hpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KALMANET_KERNEL __device__ __forceinline__
#define KALMANET_BOTH __host__ __device__
#define KALMANET_CONSTANT static __constant__ const
#define KALMANET_UNROLL _Pragma("unroll")
#define KALMANET_LOOP _Pragma("unroll 1")
#else
#include "core/half.hpp"
#define KALMANET_KERNEL inline
#define KALMANET_BOTH
#define KALMANET_CONSTANT static constexpr
#define KALMANET_UNROLL
#define KALMANET_LOOP
#endif

namespace kalmanet::cuda {

// Two bfloat16 in one register, `low` in the lower half; rounded to the nearest, ties to even.
KALMANET_KERNEL uint32_t pack_bfloat16(float low, float high) {
#ifdef __CUDACC__
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
#else
  return core::to_bfloat16(low) | static_cast<uint32_t>(core::to_bfloat16(high)) << 16;
#endif
}
KALMANET_KERNEL float low_bfloat16(uint32_t both) {
#ifdef __CUDACC__
  return __uint_as_float(both << 16);
#else
  return core::from_bfloat16(static_cast<uint16_t>(both));
#endif
}
KALMANET_KERNEL float high_bfloat16(uint32_t both) {
#ifdef __CUDACC__
  return __uint_as_float(both & 0xffff0000u);
#else
  return core::from_bfloat16(static_cast<uint16_t>(both >> 16));
#endif
}

// Two float16 likewise.
KALMANET_KERNEL uint32_t pack_float16(float low, float high) {
#ifdef __CUDACC__
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
#else
  return core::to_float16(low) | static_cast<uint32_t>(core::to_float16(high)) << 16;
#endif
}
KALMANET_KERNEL float low_float16(uint32_t both) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(static_cast<uint16_t>(both)));
#else
  return core::from_float16(static_cast<uint16_t>(both));
#endif
}
KALMANET_KERNEL float high_float16(uint32_t both) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(static_cast<uint16_t>(both >> 16)));
#else
  return core::from_float16(static_cast<uint16_t>(both >> 16));
#endif
}

// The high parts, then the low.
KALMANET_KERNEL uint32_t split_float16(float a, float b, uint32_t& low) {
  const uint32_t high = pack_float16(a, b);
  low = pack_float16(a - low_float16(high), b - high_float16(high));
  return high;
}

// a * b + c, and a * b, of two float16 each, rounded once.
KALMANET_KERNEL uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return pack_float16(low_float16(a) * low_float16(b) + low_float16(c),
                      high_float16(a) * high_float16(b) + high_float16(c));
#endif
}
KALMANET_KERNEL uint32_t multiply_halves(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return pack_float16(low_float16(a) * low_float16(b), high_float16(a) * high_float16(b));
#endif
}

KALMANET_KERNEL uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  return bits;
}
// 2^exponent, exponent in [-126, 127].
KALMANET_KERNEL float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float a;
  memcpy(&a, &bits, 4);
  return a;
}

// a / b; float32 to two units in the last place, without the branches of an exact division.
KALMANET_KERNEL float divide(float a, float b) {
#ifdef __CUDACC__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
// sqrt(a) and log(a), to some units in the last place; of 0, 0.
KALMANET_KERNEL float root(float a) {
#ifdef __CUDACC__
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
#else
  return std::sqrt(a);
#endif
}
KALMANET_KERNEL float logarithm(float a) {
#ifdef __CUDACC__
  return __logf(a);
#else
  return std::log(a);
#endif
}
// a * b + c, rounded once on the GPU: where a sum of two products must be the same bits wherever it
// is compiled.
KALMANET_KERNEL float fused(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}
// cos(a), 0 <= a <= pi, to 1e-6.
KALMANET_KERNEL float cosine(float a) {
#ifdef __CUDACC__
  return __cosf(a);
#else
  return std::cos(a);
#endif
}
KALMANET_KERNEL double divide(double a, double b) {
  return a / b;
}

// x, of which the compiler must not think that it knew it before: what follows from it is then
// computed here, and not kept in registers from the loop's start.
KALMANET_KERNEL int64_t opaque(int64_t x) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// In a branch that a whole warp takes or does not: what follows is skipped, not done and thrown
// away.
KALMANET_KERNEL void only_here() {
#ifdef __CUDACC__
  asm volatile("");
#endif
}

// 16 bytes, aligned.
KALMANET_KERNEL void load16(const void* p, uint32_t (&out)[4]) {
#ifdef __CUDACC__
  const uint4 v = *static_cast<const uint4*>(p);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
#else
  std::memcpy(out, p, 16);
#endif
}
KALMANET_KERNEL void store16(void* p, const uint32_t (&in)[4]) {
#ifdef __CUDACC__
  *static_cast<uint4*>(p) = make_uint4(in[0], in[1], in[2], in[3]);
#else
  std::memcpy(p, in, 16);
#endif
}

// 8 bytes, aligned.
KALMANET_KERNEL void load8(const void* p, uint32_t (&out)[2]) {
#ifdef __CUDACC__
  const uint2 v = *static_cast<const uint2*>(p);
  out[0] = v.x, out[1] = v.y;
#else
  std::memcpy(out, p, 8);
#endif
}
KALMANET_KERNEL void store8(void* p, const uint32_t (&in)[2]) {
#ifdef __CUDACC__
  *static_cast<uint2*>(p) = make_uint2(in[0], in[1]);
#else
  std::memcpy(p, in, 8);
#endif
}

KALMANET_KERNEL void prefetch([[maybe_unused]] const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Four neighbours in 16-byte aligned memory (32 of float64).
KALMANET_KERNEL void load4(const float* p, float (&out)[4]) {
#ifdef __CUDACC__
  const float4 v = *reinterpret_cast<const float4*>(p);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
#else
  for (int i = 0; i < 4; ++i) out[i] = p[i];
#endif
}
KALMANET_KERNEL void load4(const double* p, double (&out)[4]) {
#ifdef __CUDACC__
  const double2 a = reinterpret_cast<const double2*>(p)[0],
                b = reinterpret_cast<const double2*>(p)[1];
  out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y;
#else
  for (int i = 0; i < 4; ++i) out[i] = p[i];
#endif
}
KALMANET_KERNEL void store4(float* p, const float (&in)[4]) {
#ifdef __CUDACC__
  *reinterpret_cast<float4*>(p) = make_float4(in[0], in[1], in[2], in[3]);
#else
  for (int i = 0; i < 4; ++i) p[i] = in[i];
#endif
}
KALMANET_KERNEL void store4(double* p, const double (&in)[4]) {
#ifdef __CUDACC__
  reinterpret_cast<double2*>(p)[0] = make_double2(in[0], in[1]);
  reinterpret_cast<double2*>(p)[1] = make_double2(in[2], in[3]);
#else
  for (int i = 0; i < 4; ++i) p[i] = in[i];
#endif
}

}  // namespace kalmanet::cuda
