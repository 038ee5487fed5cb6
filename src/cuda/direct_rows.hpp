// What directly solving kernels do with a chunk's tokens before there is anything to multiply: rows
// of tensors as float16, sums along tokens. Registers have raw, most; pair, scan, other;
// part, dot.
#pragma once

#include "cuda/any_rows.hpp"
#include "cuda/direct_kernel.hpp"

namespace kalmanet::cuda {

// Rows of a [B,T,heads,128] tensor, `left` of them, on their way into raw[at ..]: a warp's 8 tokens
// from first(thread) on, 16 bytes a load, eight lanes beside each other in as many rows. (So that
// eight lanes' stores are a matrix.) base: row 0. Beyond the last row that one again, beyond a
// row's end its start, which are thrown away later.
template <class Group, class First>
KALMANET_KERNEL void fetch_token_rows(Group& group, const Array& a, const uint16_t* base,
                                      int64_t left, First&& first, int at) {
  group.each([&](int thread, auto& r) {
    const int token = first(thread) + thread % 8;
    const int64_t row = token < left ? token : left - 1;
    const int column = thread % 32 / 8 * 8;
    const uint16_t* const from = base + row * a.stride[1] + column;
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      load16(from + (has_column<Group>(a, column + i * 32) ? i * 32 : -column), r.raw[at + i]);
    }
  });
}

// They, scaled to float16 by a power of two a token; tokens from n on are zero, as are dims that
// the tensor has not. to(token, column):
// where 8 dims from 8 column on go. unit <- what a number there stands for; ill <- 1 where one is
// not finite.
template <class Group, class First, class To>
KALMANET_KERNEL void put_token_rows(Group& group, const Array& a, int n, First&& first, int at,
                                    int log2, float* unit, int& ill, To&& to) {
  group.each([&](int, auto& r) {
    uint32_t most = 0;
    KALMANET_UNROLL
    for (int i = 0; i < 16; ++i) {
      const uint32_t v = r.raw[at + i / 4][i % 4];
      const uint32_t low = v & 0x7fff, high = v >> 16 & 0x7fff;
      most = low > most ? low : most;
      most = high > most ? high : most;
    }
    r.most = most;
  });
  group.template max_apart<8>([](auto& r) -> uint32_t& { return r.most; });
  group.each([&](int thread, auto& r) {
    const int token = first(thread) + thread % 8;
    const uint32_t most = bfloat16_magnitude<Group>(a, r.most);
    const int exponent = exponent_for(most, log2);
    const float power = power_of_two(exponent);
    if (token < n && most >= 0x7f80) ill = 1;
    if (thread % 32 < 8) {
      unit[token] = token < n && most > 0 ? power_of_two(-exponent) : 0.0f;
    }
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int column = thread % 32 / 8 + i * 4;
      const bool real = token < n && has_column<Group>(a, column * 8);
      uint32_t v[4];
      KALMANET_UNROLL
      for (int e = 0; e < 4; ++e) {
        const uint32_t both = real ? r.raw[at + i][e] : 0;
        v[e] =
            pack_float16(low_number<Group>(a, both) * power, high_number<Group>(a, both) * power);
      }
      store16(to(token, column), v);
    }
  });
}

// pair (float64) or part (float32) <- the sums over the warp's pairs up to and with each.
template <class Group, class Pair, class Scan, class Other>
KALMANET_KERNEL void scan_lanes(Group& group, Pair&& pair, Scan&& scan, Other&& other) {
  const auto add_before = [&](int step, auto&& add) {
    group.shuffle(
        other, [&](auto& r) { return scan(r); }, [step](int thread) { return thread - step; });
    group.each(add);
  };
  group.each([&](int, auto& r) { scan(r) = pair(r)[0] + pair(r)[1]; });
  KALMANET_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    add_before(step, [&](int thread, auto& r) {
      if (thread % 32 >= step) scan(r) += other(r);
    });
  }
  add_before(1, [&](int thread, auto& r) {
    pair(r)[0] = thread % 32 == 0 ? pair(r)[0] : other(r) + pair(r)[0];
    pair(r)[1] += pair(r)[0];
  });
}
template <class Group>
KALMANET_KERNEL void scan_pairs(Group& group) {
  scan_lanes(
      group, [](auto& r) -> double* { return r.pair; }, [](auto& r) -> double& { return r.scan; },
      [](auto& r) -> double& { return r.other; });
}
template <class Group>
KALMANET_KERNEL void scan_parts(Group& group) {
  scan_lanes(
      group, [](auto& r) -> float* { return r.part; }, [](auto& r) -> float& { return r.dot[0]; },
      [](auto& r) -> float& { return r.dot[1]; });
}

}  // namespace kalmanet::cuda
