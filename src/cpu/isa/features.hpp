// What the processor can do, where the compilers' own question does not reach.
#pragma once

#if defined(KALMANET_X86_64)
#include <cpuid.h>

namespace kalmanet::cpu {

// Half-precision conversions, which not every compiler's __builtin_cpu_supports knows. (Whether the
// system saves the registers they use is asked with AVX2.)
inline bool processor_has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

}  // namespace kalmanet::cpu
#endif
