// What the convolution's tasks read and write: strided tensors seen from one sequence and one block
// of channels, and the scratch rows that the kernels take instead where memory lies otherwise.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "core/problem.hpp"
#include "cpu/conv_kernels.hpp"
#include "kalmanet/conv.hpp"

namespace kalmanet::cpu::conv {

using core::Sequence;

// Channels a task: rows as long as a page, because memory is read fastest in long runs (narrower
// tasks were measured slower), while a tile of them still fits the second-level cache.
constexpr int64_t kChannels = 1024;
// Tokens a tile. At least kMaxConvWidth - 1: then only a sequence's first tile reaches into the
// state.
constexpr int64_t kTileRows = 16;
static_assert(kTileRows >= kMaxConvWidth - 1);

// Rows of channels in a thread's own memory.
struct Tile {
  float* data = nullptr;
  int64_t stride = 0;
  float* row(int64_t i) const { return data + i * stride; }
};

// A task's tiles. A thread keeps the memory for its next task.
class Scratch {
 public:
  Scratch(int64_t channels, int64_t width) {
    // Aligned rows, and not a power of two apart: those would all fall on the same few cache sets.
    const int64_t stride = (channels + 15) / 16 * 16 + 16;
    const int64_t tile_rows = kTileRows + width - 1;
    thread_local std::vector<float> memory;
    const size_t floats = (4 * width + 3 * tile_rows) * stride + 16;
    if (memory.size() < floats) memory.resize(floats);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    float* next = memory.data() + (64 - address % 64) % 64 / sizeof(float);
    const auto take = [&](int64_t rows) {
      const Tile tile{next, stride};
      next += rows * stride;
      return tile;
    };
    weight = take(width);
    reversed = take(width);
    dweight = take(width);
    unused = take(width);
    dpre = take(tile_rows);
    input = take(tile_rows);
    output = take(tile_rows);
  }

  Tile weight, reversed, dweight;  // tap by tap
  Tile unused;                     // for the columns of a state that nobody asked for
  Tile dpre, input, output;        // tokens
};

// Tokens of one sequence, channels from c0: element (t, c) is data[t * row_stride + c * stride].
template <class T>
struct Plane {
  T* data = nullptr;
  int64_t row_stride = 0;
  int64_t stride = 0;

  bool defined() const { return data != nullptr; }
  bool dense() const { return stride == 1; }
  T* row(int64_t t) const { return data + t * row_stride; }
};

template <class T, class V>
Plane<T> tokens(const V& view, const Sequence& sequence, int64_t c0) {
  if (!view.defined()) return {};
  T* data = static_cast<T*>(view.data) + sequence.row * view.stride[0] +
            sequence.begin * view.stride[1] + c0 * view.stride[2];
  return {data, view.stride[1], view.size[2] == 1 ? 1 : view.stride[2]};
}

// Channels with `width` numbers each (a state, the weight): element (c, w) is
// data[c * stride + w * tap_stride].
template <class T>
struct TapPlane {
  T* data = nullptr;
  int64_t stride = 0;
  int64_t tap_stride = 0;

  bool defined() const { return data != nullptr; }
  T& at(int64_t c, int64_t w) const { return data[c * stride + w * tap_stride]; }
  // The usual case has a loop that the compiler turns into shuffles: width 4, contiguous.
  bool fours(int64_t width) const { return width == 4 && stride == 4 && tap_stride == 1; }
};

using TapRows = std::array<float*, kMaxConvWidth>;

// rows[w][c] = from(c, w)
inline void transpose(const TapPlane<const float>& from, int64_t channels, int64_t width,
                      const TapRows& rows) {
  if (from.fours(width)) {
    const float* __restrict p = from.data;
    float* __restrict r0 = rows[0];
    float* __restrict r1 = rows[1];
    float* __restrict r2 = rows[2];
    float* __restrict r3 = rows[3];
    for (int64_t c = 0; c < channels; ++c) {
      r0[c] = p[4 * c];
      r1[c] = p[4 * c + 1];
      r2[c] = p[4 * c + 2];
      r3[c] = p[4 * c + 3];
    }
    return;
  }
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t c = 0; c < channels; ++c) rows[w][c] = from.at(c, w);
  }
}

// to(c, w) = rows[w][c]
inline void transpose(const TapRows& rows, int64_t channels, int64_t width,
                      const TapPlane<float>& to) {
  if (to.fours(width)) {
    float* __restrict p = to.data;
    const float* __restrict r0 = rows[0];
    const float* __restrict r1 = rows[1];
    const float* __restrict r2 = rows[2];
    const float* __restrict r3 = rows[3];
    for (int64_t c = 0; c < channels; ++c) {
      p[4 * c] = r0[c];
      p[4 * c + 1] = r1[c];
      p[4 * c + 2] = r2[c];
      p[4 * c + 3] = r3[c];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t w = 0; w < width; ++w) to.at(c, w) = rows[w][c];
  }
}

template <class T, class V>
TapPlane<T> state_of(const V& view, const Sequence& sequence, int64_t c0) {
  if (!view.defined()) return {};
  T* data = static_cast<T*>(view.data) + sequence.index * view.stride[0] + c0 * view.stride[1];
  return {data, view.stride[1], view.stride[2]};
}

inline void gather(const Plane<const float>& from, int64_t t, int64_t channels, float* to) {
  const float* p = from.row(t);
  for (int64_t c = 0; c < channels; ++c) to[c] = p[c * from.stride];
}

inline void scatter(const float* from, const Plane<float>& to, int64_t t, int64_t channels) {
  float* p = to.row(t);
  for (int64_t c = 0; c < channels; ++c) p[c * to.stride] = from[c];
}

// A task's channels.
struct Block {
  int64_t c0, channels;
};

// taps.row(j)[c] = weight(c0 + c, j), or of tap W - 1 - j.
inline void load_weight(const ConstView& weight, const Block& block, bool reversed,
                        const Tile& taps) {
  const int64_t width = weight.size[1];
  TapRows rows{};
  for (int64_t j = 0; j < width; ++j) rows[j] = taps.row(reversed ? width - 1 - j : j);
  const float* data = static_cast<const float*>(weight.data) + block.c0 * weight.stride[0];
  transpose(TapPlane<const float>{data, weight.stride[0], weight.stride[1]}, block.channels, width,
            rows);
}

// What a span reads of its input: x, and before the sequence's start the state.
struct Input {
  Plane<const float> x;
  TapPlane<const float> state;
  int64_t channels, width;

  // Copies tokens [t, t + count), t >= -width, into the scratch's input tile.
  void copy(int64_t t, int64_t count, const Scratch& scratch) const {
    const int64_t before = std::min(count, -t);  // tokens that are in the state
    if (before > 0 && state.defined()) {
      TapRows rows{};
      for (int64_t w = 0; w < width; ++w) rows[w] = scratch.unused.row(w);
      for (int64_t i = 0; i < before; ++i) rows[width + t + i] = scratch.input.row(i);
      transpose(state, channels, width, rows);
    } else {
      for (int64_t i = 0; i < before; ++i) std::fill_n(scratch.input.row(i), channels, 0.0f);
    }
    for (int64_t i = std::max<int64_t>(before, 0); i < count; ++i) {
      gather(x, t + i, channels, scratch.input.row(i));
    }
  }

  // Tokens [t, t + rows) and the width - 1 before them: where they lie if the kernel can read them
  // there, else copied (rows <= kTileRows then).
  ConvWindow window(int64_t t, int64_t rows, const Scratch& scratch) const {
    ConvWindow w;
    w.rows = rows;
    w.channels = channels;
    w.width = width;
    w.weight = scratch.weight.data;
    w.weight_stride = scratch.weight.stride;
    const int64_t past = width - 1;
    w.past = scratch.input.data;
    w.past_stride = scratch.input.stride;
    if (!x.dense()) {
      copy(t - past, past + rows, scratch);
      w.x = scratch.input.row(past);
      w.x_stride = scratch.input.stride;
      return w;
    }
    w.x = x.row(t);
    w.x_stride = x.row_stride;
    if (t >= past) {
      w.past = x.row(t - past);
      w.past_stride = x.row_stride;
    } else {
      copy(t - past, past, scratch);
    }
    return w;
  }
};

// The last `width` inputs of the sequence. Reads all before it writes: `out` may be the state
// itself.
inline void store_final_state(const Input& in, int64_t length, const TapPlane<float>& out,
                              const Scratch& scratch) {
  in.copy(length - in.width, in.width, scratch);
  TapRows rows{};
  for (int64_t w = 0; w < in.width; ++w) rows[w] = scratch.input.row(w);
  transpose(rows, in.channels, in.width, out);
}

}  // namespace kalmanet::cpu::conv
