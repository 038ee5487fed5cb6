// What the convolution's tasks read and write: strided tensors seen from one sequence and one block
// of channels, and the scratch rows that the kernels take instead where memory lies otherwise.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "core/problem.hpp"
#include "cpu/conv_kernels.hpp"
#include "cpu/strided.hpp"
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
template <class S>
struct Tile {
  S* data = nullptr;
  int64_t stride = 0;
  S* row(int64_t i) const { return data + i * stride; }
};

// A task's tiles. A thread keeps the memory for its next task.
template <class S>
class Scratch {
 public:
  Scratch(int64_t channels, int64_t width) {
    // Aligned rows, and not a power of two apart: those would all fall on the same few cache sets.
    const int64_t stride = (channels + 15) / 16 * 16 + 16;
    const int64_t tile_rows = kTileRows + width - 1;
    thread_local std::vector<S> memory;
    const size_t numbers = (5 * width + 3 * tile_rows) * stride + 16;
    if (memory.size() < numbers) memory.resize(numbers);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    S* next = memory.data() + (64 - address % 64) % 64 / sizeof(S);
    const auto take = [&](int64_t rows) {
      const Tile<S> tile{next, stride};
      next += rows * stride;
      return tile;
    };
    weight = take(width);
    reversed = take(width);
    dweight = take(width);
    unused = take(width);
    taps = take(width).data;
    dpre = take(tile_rows);
    input = take(tile_rows);
    output = take(tile_rows);
  }

  Tile<S> weight, reversed, dweight;  // tap by tap
  Tile<S> unused;                     // for the columns of a state that nobody asked for
  Tile<S> dpre, input, output;        // tokens
  S* taps;                            // a state or a weight in its own order, converted
};

// Tokens of one sequence, channels from c0.
template <class Void, class V>
Plane<Void> tokens(const V& view, const Sequence& sequence, int64_t c0) {
  if (!view.defined()) return {};
  const int64_t at =
      sequence.row * view.stride[0] + sequence.begin * view.stride[1] + c0 * view.stride[2];
  return {shifted(view.data, view.dtype, at), view.dtype, view.stride[1],
          view.size[2] == 1 ? 1 : view.stride[2]};
}

// Channels with `width` numbers each (a state, the weight): element (c, w) is number
// c * stride + w * tap_stride from data.
template <class Void>
struct TapPlane {
  Void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
  int64_t tap_stride = 0;

  bool defined() const { return data != nullptr; }
  // to[c] = element (c, w)
  template <class S>
  void read(int64_t w, int64_t channels, S* to) const {
    read_strided(dtype, data, w * tap_stride, stride, channels, to);
  }
  template <class S>
  void write(const S* from, int64_t w, int64_t channels) const {
    write_strided(from, channels, dtype, data, w * tap_stride, stride);
  }
  bool contiguous(int64_t width) const { return stride == width && tap_stride == 1; }
};

template <class Void, class V>
TapPlane<Void> state_of(const V& view, const Sequence& sequence, int64_t c0) {
  if (!view.defined()) return {};
  const int64_t at = sequence.index * view.stride[0] + c0 * view.stride[1];
  return {shifted(view.data, view.dtype, at), view.dtype, view.stride[1], view.stride[2]};
}

template <class S>
using TapRows = std::array<S*, kMaxConvWidth>;

// rows[w][c] = from(c, w). The usual case, four contiguous taps, has a loop that the compiler turns
// into shuffles; 16-bit numbers are converted first, all at once, into `taps`.
template <class S>
void transpose(const TapPlane<const void>& from, int64_t channels, int64_t width,
               const TapRows<S>& rows, S* taps) {
  if (from.contiguous(width) && (width == 4 || from.dtype != DTypeOf<S>::value)) {
    const S* __restrict p = static_cast<const S*>(from.data);
    if (from.dtype != DTypeOf<S>::value) {
      read_strided(from.dtype, from.data, 0, 1, channels * width, taps);
      p = taps;
    }
    if (width == 4) {
      S* __restrict r0 = rows[0];
      S* __restrict r1 = rows[1];
      S* __restrict r2 = rows[2];
      S* __restrict r3 = rows[3];
      for (int64_t c = 0; c < channels; ++c) {
        r0[c] = p[4 * c];
        r1[c] = p[4 * c + 1];
        r2[c] = p[4 * c + 2];
        r3[c] = p[4 * c + 3];
      }
      return;
    }
    for (int64_t w = 0; w < width; ++w) {
      for (int64_t c = 0; c < channels; ++c) rows[w][c] = p[c * width + w];
    }
    return;
  }
  for (int64_t w = 0; w < width; ++w) from.read(w, channels, rows[w]);
}

// to(c, w) = rows[w][c]
template <class S>
void transpose(const TapRows<S>& rows, int64_t channels, int64_t width, const TapPlane<void>& to,
               S* taps) {
  if (to.contiguous(width) && (width == 4 || to.dtype != DTypeOf<S>::value)) {
    const bool convert = to.dtype != DTypeOf<S>::value;
    S* __restrict p = convert ? taps : static_cast<S*>(to.data);
    if (width == 4) {
      const S* __restrict r0 = rows[0];
      const S* __restrict r1 = rows[1];
      const S* __restrict r2 = rows[2];
      const S* __restrict r3 = rows[3];
      for (int64_t c = 0; c < channels; ++c) {
        p[4 * c] = r0[c];
        p[4 * c + 1] = r1[c];
        p[4 * c + 2] = r2[c];
        p[4 * c + 3] = r3[c];
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t w = 0; w < width; ++w) p[c * width + w] = rows[w][c];
      }
    }
    if (convert) write_strided(p, channels * width, to.dtype, to.data, 0, 1);
    return;
  }
  for (int64_t w = 0; w < width; ++w) to.write(rows[w], w, channels);
}

// A task's channels.
struct Block {
  int64_t c0, channels;
};

// taps.row(j)[c] = weight(c0 + c, j), or of tap W - 1 - j.
template <class S>
void load_weight(const ConvInputs& inputs, const Block& block, bool reversed, const Tile<S>& to,
                 const Scratch<S>& scratch) {
  const ConstView& weight = inputs.weight;
  const int64_t width = weight.size[1];
  TapRows<S> rows{};
  for (int64_t j = 0; j < width; ++j) rows[j] = to.row(reversed ? width - 1 - j : j);
  const TapPlane<const void> from{shifted(weight.data, weight.dtype, block.c0 * weight.stride[0]),
                                  weight.dtype, weight.stride[0], weight.stride[1]};
  transpose(from, block.channels, width, rows, scratch.taps);
}

// What a span reads of its input: x, and before the sequence's start the state.
template <class S>
struct Input {
  Plane<const void> x;
  TapPlane<const void> state;
  int64_t channels, width;

  // Copies tokens [t, t + count), t >= -width, into the scratch's input tile.
  void copy(int64_t t, int64_t count, const Scratch<S>& scratch) const {
    const int64_t before = std::min(count, -t);  // tokens that are in the state
    if (before > 0 && state.defined()) {
      TapRows<S> rows{};
      for (int64_t w = 0; w < width; ++w) rows[w] = scratch.unused.row(w);
      for (int64_t i = 0; i < before; ++i) rows[width + t + i] = scratch.input.row(i);
      transpose(state, channels, width, rows, scratch.taps);
    } else {
      for (int64_t i = 0; i < before; ++i) std::fill_n(scratch.input.row(i), channels, S{0});
    }
    for (int64_t i = std::max<int64_t>(before, 0); i < count; ++i) {
      x.read(t + i, channels, scratch.input.row(i));
    }
  }

  // Tokens [t, t + rows) and the width - 1 before them: where they lie if the kernel can read them
  // there, else copied (rows <= kTileRows then).
  ConvWindow<S> window(int64_t t, int64_t rows, const Scratch<S>& scratch) const {
    ConvWindow<S> w;
    w.rows = rows;
    w.channels = channels;
    w.width = width;
    w.weight = scratch.weight.data;
    w.weight_stride = scratch.weight.stride;
    const int64_t past = width - 1;
    w.past = scratch.input.data;
    w.past_stride = scratch.input.stride;
    if (!x.template dense<S>()) {
      copy(t - past, past + rows, scratch);
      w.x = scratch.input.row(past);
      w.x_stride = scratch.input.stride;
      return w;
    }
    w.x = x.template row<S>(t);
    w.x_stride = x.row_stride;
    if (t >= past) {
      w.past = x.template row<S>(t - past);
      w.past_stride = x.row_stride;
    } else {
      copy(t - past, past, scratch);
    }
    return w;
  }
};

// The last `width` inputs of the sequence. Reads all before it writes: `out` may be the state
// itself.
template <class S>
void store_final_state(const Input<S>& in, int64_t length, const TapPlane<void>& out,
                       const Scratch<S>& scratch) {
  in.copy(length - in.width, in.width, scratch);
  TapRows<S> rows{};
  for (int64_t w = 0; w < in.width; ++w) rows[w] = scratch.input.row(w);
  transpose(rows, in.channels, in.width, out, scratch.taps);
}

}  // namespace kalmanet::cpu::conv
