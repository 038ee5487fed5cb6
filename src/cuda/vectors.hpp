// Neighbours in memory, loaded and stored 16 (or 8) bytes at a time.
#pragma once

#include "cuda/job.hpp"

namespace kalmanet::cuda {

// kCount neighbours of one of the dtypes that are computed with in float32, aligned to their size:
// the bits, on their way while other loads are begun, and the numbers once they are needed.
template <DType kType, int kCount>
struct Pack {
  static constexpr int kBytes = kCount * (kType == DType::float32 ? 4 : 2);
  static_assert(kType != DType::float64 && (kBytes == 8 || kBytes % 16 == 0));
  uint32_t bits[kBytes / 4];

  KALMANET_KERNEL void load(const void* data, int64_t at) {
    const char* const from = static_cast<const char*>(data) + at * (kBytes / kCount);
    if constexpr (kBytes == 8) {
      load8(from, bits);
    } else {
      KALMANET_UNROLL
      for (int i = 0; i < kBytes / 16; ++i) {
        load16(from + 16 * i, reinterpret_cast<uint32_t (&)[4]>(bits[4 * i]));
      }
    }
  }
  KALMANET_KERNEL void store(void* data, int64_t at) const {
    char* const to = static_cast<char*>(data) + at * (kBytes / kCount);
    if constexpr (kBytes == 8) {
      store8(to, bits);
    } else {
      KALMANET_UNROLL
      for (int i = 0; i < kBytes / 16; ++i) {
        store16(to + 16 * i, reinterpret_cast<const uint32_t (&)[4]>(bits[4 * i]));
      }
    }
  }
  KALMANET_KERNEL void clear() {
    KALMANET_UNROLL
    for (int i = 0; i < kBytes / 4; ++i) bits[i] = 0;
  }
  KALMANET_KERNEL float operator[](int i) const {
    if constexpr (kType == DType::float32) return float_of(bits[i]);
    const uint32_t both = bits[i / 2];
    if constexpr (kType == DType::bfloat16) return i % 2 ? high_bfloat16(both) : low_bfloat16(both);
    return i % 2 ? high_float16(both) : low_float16(both);
  }
  // Rounded to the nearest, ties to even.
  KALMANET_KERNEL void set(const float (&x)[kCount]) {
    if constexpr (kType == DType::float32) {
      KALMANET_UNROLL
      for (int i = 0; i < kCount; ++i) bits[i] = bits_of(x[i]);
    } else {
      KALMANET_UNROLL
      for (int i = 0; i < kCount; i += 2) {
        bits[i / 2] =
            kType == DType::bfloat16 ? pack_bfloat16(x[i], x[i + 1]) : pack_float16(x[i], x[i + 1]);
      }
    }
  }

 private:
  KALMANET_KERNEL static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
};

// kCount neighbours of an array, dense and aligned to their size, of whatever dtype but float64.
template <int kCount>
KALMANET_KERNEL void load_neighbours(const Array& a, int64_t at, float (&out)[kCount]) {
  const auto take = [&](auto pack) {
    pack.load(a.data, at);
    KALMANET_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = pack[i];
  };
  if (a.dtype == DType::float32) return take(Pack<DType::float32, kCount>());
  if (a.dtype == DType::bfloat16) return take(Pack<DType::bfloat16, kCount>());
  take(Pack<DType::float16, kCount>());
}

}  // namespace kalmanet::cuda
