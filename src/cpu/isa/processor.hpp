// What __builtin_cpu_supports does not tell with every compiler.
#pragma once

#include <cpuid.h>

namespace kalmanet::cpu {

// The float16 conversions of half_avx2.hpp. (Whether the system saves the registers they use is
// asked with AVX2.)
inline bool processor_has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// AVX512_BF16, which avx512_bf16.cpp needs beside what avx512.cpp does.
inline bool processor_has_avx512_bf16() {
  constexpr unsigned kBit = 1u << 5;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kBit) != 0;
}

}  // namespace kalmanet::cpu
