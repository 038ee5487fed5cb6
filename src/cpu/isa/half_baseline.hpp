// 16-bit numbers to and from float32 by the compiler's vector extension, 4 at a time: bit for bit
// what core/half.hpp says, whose cases are here computed side by side and chosen from.
#pragma once

#include <cstdint>
#include <cstring>

namespace kalmanet::cpu {

struct HalfBaseline {
  typedef float Reg __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  typedef uint16_t Half __attribute__((vector_size(8)));

  static Reg load_bf16(const uint16_t* p) { return as_float(load_bits(p) << 16); }
  static Reg load_f16(const uint16_t* p) {
    const Bits bits = load_bits(p);
    const Bits sign = (bits & 0x8000) << 16;
    const Bits exponent = bits & 0x7C00, fraction = bits & 0x3FF;
    const Bits normal = (exponent << 13) + (fraction << 13) + (uint32_t{127 - 15} << 23);
    const Bits payload = (fraction << 13) | (fraction != 0 ? Bits{} + 0x400000 : Bits{});
    // fraction 2^-24, exactly
    const Reg small =
        __builtin_convertvector(__builtin_convertvector(fraction, Int), Reg) * 0x1p-24f;
    Bits magnitude = exponent == 0 ? as_bits(small) : normal;
    magnitude = exponent == 0x7C00 ? payload | 0x7F800000 : magnitude;
    return as_float(sign | magnitude);
  }
  static void store_bf16(uint16_t* p, Reg a) {
    const Bits bits = as_bits(a);
    const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    store_bits(p, a != a ? (bits >> 16) | 0x40 : rounded);
  }
  static void store_f16(uint16_t* p, Reg a) {
    const Bits bits = as_bits(a);
    const Bits sign = (bits >> 16) & 0x8000;
    const Bits magnitude = bits & 0x7FFFFFFF;
    const Bits rebiased = magnitude - (uint32_t{127 - 15} << 23);
    const Bits normal = (rebiased + 0xFFF + ((rebiased >> 13) & 1)) >> 13;
    const Reg half = Reg{} + 0.5f;  // its last place is 2^-24, that of the subnormal numbers
    const Bits small = as_bits(as_float(magnitude) + half) - as_bits(half);
    Bits result = magnitude < 0x38800000 ? small : normal;
    result = magnitude >= 0x477FF000 ? Bits{} + 0x7C00 : result;
    result = a != a ? ((magnitude >> 13) & 0x3FF) | 0x7E00 : result;
    store_bits(p, sign | result);
  }

 private:
  static Bits load_bits(const uint16_t* p) {
    Half half;
    std::memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, Bits);
  }
  static void store_bits(uint16_t* p, Bits bits) {
    const Half half = __builtin_convertvector(bits, Half);
    std::memcpy(p, &half, sizeof half);
  }
  static Bits as_bits(Reg a) {
    Bits bits;
    std::memcpy(&bits, &a, sizeof bits);
    return bits;
  }
  static Reg as_float(Bits bits) {
    Reg a;
    std::memcpy(&a, &bits, sizeof a);
    return a;
  }
};

}  // namespace kalmanet::cpu
