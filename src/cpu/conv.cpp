// The causal convolution on the CPU: cuts sequences and channels into tasks and hands the kernels
// rows of adjacent channels. What a task computes depends on the shapes only, never on the threads.
#include "cpu/conv.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/dispatch.hpp"

namespace kalmanet::cpu {
namespace {

using core::Sequence;

// Channels a task: 1 KiB of each row, so that the rows of a tile, their gradients and the weights
// stay in the first-level cache and the hardware still sees runs of 16 cache lines.
constexpr int64_t kChannels = 256;
// Tokens a tile. At least kMaxConvWidth - 1: then only a sequence's first tile reaches into the
// state.
constexpr int64_t kTileRows = 16;
static_assert(kTileRows >= kMaxConvWidth - 1);
// Elements a task has at least (about 5 microseconds of work), and tokens at most: the weight
// gradient is summed in float32 within a task and in float64 over tasks.
constexpr int64_t kTaskElements = 8192;
constexpr int64_t kTaskRows = 512;

using Row = std::array<float, kChannels>;
struct alignas(64) Taps : std::array<Row, kMaxConvWidth> {};
struct alignas(64) Tile : std::array<Row, kTileRows + kMaxConvWidth - 1> {};

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

using Rows = std::array<float*, kMaxConvWidth>;

// rows[w][c] = from(c, w)
void transpose(const TapPlane<const float>& from, int64_t channels, int64_t width,
               const Rows& rows) {
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
void transpose(const Rows& rows, int64_t channels, int64_t width, const TapPlane<float>& to) {
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

void gather(const Plane<const float>& from, int64_t t, int64_t channels, float* to) {
  const float* p = from.row(t);
  for (int64_t c = 0; c < channels; ++c) to[c] = p[c * from.stride];
}

void scatter(const float* from, const Plane<float>& to, int64_t t, int64_t channels) {
  float* p = to.row(t);
  for (int64_t c = 0; c < channels; ++c) p[c * to.stride] = from[c];
}

// A run of tokens [begin, end) of one sequence, counted from the sequence's first.
struct Span {
  const Sequence* sequence;
  int64_t begin, end;
};

// Spans in the order of the sequences, gathered into groups: a task is one group of one block of
// channels. Every sequence has a span, the empty ones too (their states pass through).
struct Plan {
  std::vector<Span> spans;
  std::vector<int64_t> group_begin;  // indices of spans; one more than there are groups
  int64_t total = 0;                 // tokens
  int64_t channels = 0;              // D
  int64_t blocks = 0;                // of kChannels

  int64_t groups() const { return std::ssize(group_begin) - 1; }
  int64_t tasks() const { return groups() * blocks; }
};

Plan make_plan(const std::vector<Sequence>& sequences, int64_t channels) {
  Plan plan;
  plan.channels = channels;
  plan.blocks = (channels + kChannels - 1) / kChannels;
  for (const Sequence& s : sequences) plan.total += s.length();
  const int64_t width = std::clamp<int64_t>(channels, 1, kChannels);
  // 128 groups are enough to share out; more of them would only cost more partial weight gradients.
  const int64_t smallest = std::max<int64_t>(kTaskElements / width, kTileRows);
  const int64_t rows = std::max(smallest, std::min(plan.total / 128, kTaskRows));
  int64_t filled = rows;  // of the current group
  for (const Sequence& s : sequences) {
    int64_t begin = 0;
    do {
      const int64_t end = std::min(begin + rows, s.length());
      if (filled >= rows) {
        plan.group_begin.push_back(std::ssize(plan.spans));
        filled = 0;
      }
      plan.spans.push_back({&s, begin, end});
      filled += std::max<int64_t>(end - begin, 1);
      begin = end;
    } while (begin < s.length());
  }
  plan.group_begin.push_back(std::ssize(plan.spans));
  return plan;
}

struct Block {
  int64_t c0, channels;
};

// task(group, block of channels) for all of them. A handful of tokens is done before another thread
// would have woken up.
template <class F>
void spread(const Plan& plan, Executor& executor, const F& task) {
  const auto run = [&](int64_t i) {
    const int64_t c0 = i % plan.blocks * kChannels;
    task(i / plan.blocks, Block{c0, std::min(kChannels, plan.channels - c0)});
  };
  if (plan.total * plan.channels <= kTaskElements) {
    for (int64_t i = 0; i < plan.tasks(); ++i) run(i);
  } else {
    executor.run(plan.tasks(), run);
  }
}

void load_weight(const ConstView& weight, const Block& block, bool reversed, Taps& taps) {
  const int64_t width = weight.size[1];
  Rows rows{};
  for (int64_t j = 0; j < width; ++j) rows[j] = taps[reversed ? width - 1 - j : j].data();
  const float* data = static_cast<const float*>(weight.data) + block.c0 * weight.stride[0];
  transpose(TapPlane<const float>{data, weight.stride[0], weight.stride[1]}, block.channels, width,
            rows);
}

// What a span reads of its input: x, and before the sequence's start the state.
struct Input {
  Plane<const float> x;
  TapPlane<const float> state;
  int64_t channels, width;

  // Copies tokens [t, t + count), t >= -width, into rows of `tile`.
  void copy(int64_t t, int64_t count, Tile& tile) const {
    const int64_t before = std::min(count, -t);  // tokens that are in the state
    if (before > 0 && state.defined()) {
      Taps unused;
      Rows rows;
      for (int64_t w = 0; w < width; ++w) rows[w] = unused[w].data();
      for (int64_t i = 0; i < before; ++i) rows[width + t + i] = tile[i].data();
      transpose(state, channels, width, rows);
    } else {
      for (int64_t i = 0; i < before; ++i) std::fill_n(tile[i].data(), channels, 0.0f);
    }
    for (int64_t i = std::max<int64_t>(before, 0); i < count; ++i) {
      gather(x, t + i, channels, tile[i].data());
    }
  }

  // Tokens [t, t + rows) and the width - 1 before them: where they lie if the kernel can read them
  // there, else copied into `tile` (rows <= kTileRows then).
  ConvWindow window(int64_t t, int64_t rows, const Taps& weight, Tile& tile) const {
    ConvWindow w;
    w.rows = rows;
    w.channels = channels;
    w.width = width;
    w.weight = weight[0].data();
    w.weight_stride = kChannels;
    const int64_t past = width - 1;
    w.past = tile[0].data();
    w.past_stride = kChannels;
    if (!x.dense()) {
      copy(t - past, past + rows, tile);
      w.x = tile[past].data();
      w.x_stride = kChannels;
      return w;
    }
    w.x = x.row(t);
    w.x_stride = x.row_stride;
    if (t >= past) {
      w.past = x.row(t - past);
      w.past_stride = x.row_stride;
    } else {
      copy(t - past, past, tile);
    }
    return w;
  }
};

// The last `width` inputs of the sequence. Reads all before it writes: `out` may be the state
// itself.
void store_final_state(const Input& in, int64_t length, const TapPlane<float>& out, Tile& tile) {
  in.copy(length - in.width, in.width, tile);
  Rows rows{};
  for (int64_t w = 0; w < in.width; ++w) rows[w] = tile[w].data();
  transpose(rows, in.channels, in.width, out);
}

void forward_span(const KernelTable& table, const Span& span, const Input& in,
                  const Plane<float>& y, const TapPlane<float>& final_state, bool silu,
                  const Taps& weight) {
  Tile x_tile, y_tile;
  const bool direct = in.x.dense() && y.dense();
  const int64_t step = direct ? std::max<int64_t>(span.end - span.begin, 1) : kTileRows;
  for (int64_t t = span.begin; t < span.end; t += step) {
    const int64_t rows = std::min(step, span.end - t);
    ConvForwardJob job;
    job.in = in.window(t, rows, weight, x_tile);
    job.silu = silu;
    job.y = y.dense() ? y.row(t) : y_tile[0].data();
    job.y_stride = y.dense() ? y.row_stride : kChannels;
    table.conv.forward(job);
    if (y.dense()) continue;
    for (int64_t r = 0; r < rows; ++r) {
      scatter(y_tile[r].data(), y, t + r, in.channels);
    }
  }
  // The state is read by the first span only, so that this may be written over it here.
  if (span.begin == 0 && final_state.defined()) {
    store_final_state(in, span.sequence->length(), final_state, x_tile);
  }
}

// Backward of one span, last tile first. `dpre` holds a tile's gradients of the convolution's sums,
// then the width - 1 rows that follow: zeros past the sequence's end.
struct BackwardSpan {
  const KernelTable& table;
  const Span& span;
  const Input& in;
  Plane<const float> dy;
  TapPlane<const float> d_final_state;
  Plane<float> dx;
  TapPlane<float> dstate;
  bool silu;
  const Taps& weight;
  const Taps& reversed;
  Taps* dweight;  // added to; null: not wanted
  Tile& dpre;
  Tile& x_tile;
  Tile& other_tile;

  int64_t length() const { return span.sequence->length(); }

  void differentiate(int64_t t, int64_t rows, float* to, bool with_weight) {
    ConvGradJob job;
    job.in = in.window(t, rows, weight, x_tile);
    job.silu = silu;
    if (dy.dense()) {
      job.dy = dy.row(t);
      job.dy_stride = dy.row_stride;
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        gather(dy, t + r, in.channels, other_tile[r].data());
      }
      job.dy = other_tile[0].data();
      job.dy_stride = kChannels;
    }
    job.dpre = to;
    job.dpre_stride = kChannels;
    job.dweight = with_weight && dweight != nullptr ? (*dweight)[0].data() : nullptr;
    table.conv.grad(job);
  }

  // to_s = sum_j weight_j dpre_{s + width - 1 - j}: the forward's sum with the taps in reverse,
  // over rows that begin at s and not end there.
  void correlate(const Tile& from, int64_t rows, float* to, int64_t to_stride) const {
    ConvForwardJob job;
    job.in.past = from[0].data();
    job.in.past_stride = kChannels;
    job.in.x = from[in.width - 1].data();
    job.in.x_stride = kChannels;
    job.in.rows = rows;
    job.in.channels = in.channels;
    job.in.width = in.width;
    job.in.weight = reversed[0].data();
    job.in.weight_stride = kChannels;
    job.y = to;
    job.y_stride = to_stride;
    job.silu = false;
    table.conv.forward(job);
  }

  void store_dx(int64_t t, int64_t rows) {
    if (dx.dense()) {
      correlate(dpre, rows, dx.row(t), dx.row_stride);
    } else {
      correlate(dpre, rows, other_tile[0].data(), kChannels);
      for (int64_t r = 0; r < rows; ++r) {
        scatter(other_tile[r].data(), dx, t + r, in.channels);
      }
    }
    if (!d_final_state.defined()) return;
    // Token i is element i - (length - width) of the final state.
    for (int64_t i = std::max(t, length() - in.width); i < t + rows; ++i) {
      for (int64_t c = 0; c < in.channels; ++c) {
        dx.row(i)[c * dx.stride] += d_final_state.at(c, i - length() + in.width);
      }
    }
  }

  // Element w of the state is token w - width. dpre's first rows are those of the sequence.
  void store_dstate() {
    const int64_t past = in.width - 1;
    Tile& padded = x_tile;
    for (int64_t i = 0; i < past; ++i) {
      padded[i].fill(0.0f);
      padded[past + i] = dpre[i];
    }
    if (past > 0) correlate(padded, past, other_tile[0].data(), kChannels);
    for (int64_t c = 0; c < in.channels; ++c) {
      for (int64_t w = 0; w < in.width; ++w) {
        float d = w == 0 ? 0.0f : other_tile[w - 1][c];
        const int64_t final_column = w - length();  // where this element went
        if (d_final_state.defined() && final_column >= 0) d += d_final_state.at(c, final_column);
        dstate.at(c, w) = d;
      }
    }
  }

  void run() {
    const int64_t past = in.width - 1;
    const bool inputs = dx.defined() || (dstate.defined() && span.begin == 0);
    if (inputs) {
      const int64_t known = std::min(past, length() - span.end);
      for (int64_t i = known; i < past; ++i) {
        dpre[i].fill(0.0f);
      }
      if (known > 0) differentiate(span.end, known, dpre[0].data(), false);
    }
    const int64_t tiles = (span.end - span.begin + kTileRows - 1) / kTileRows;
    for (int64_t i = tiles - 1; i >= 0; --i) {
      const int64_t t = span.begin + i * kTileRows;
      const int64_t rows = std::min(kTileRows, span.end - t);
      if (inputs) {
        // The first rows of what comes later are what follows this tile.
        std::memmove(&dpre[rows], &dpre[0], past * sizeof(Row));
      }
      differentiate(t, rows, dpre[0].data(), true);
      if (dx.defined()) store_dx(t, rows);
    }
    if (dstate.defined() && span.begin == 0) store_dstate();
  }
};

}  // namespace

void causal_conv_forward(const ConvInputs& inputs, const std::vector<Sequence>& sequences,
                         const View& y, const View& final_state, bool silu, Executor& executor) {
  const KernelTable& table = kernels();
  const Plan plan = make_plan(sequences, inputs.x.size[2]);
  const int64_t width = inputs.weight.size[1];
  spread(plan, executor, [&](int64_t group, const Block& block) {
    Taps weight;
    load_weight(inputs.weight, block, false, weight);
    for (int64_t i = plan.group_begin[group]; i < plan.group_begin[group + 1]; ++i) {
      const Span& span = plan.spans[i];
      const Sequence& s = *span.sequence;
      const Input in{tokens<const float>(inputs.x, s, block.c0),
                     state_of<const float>(inputs.state, s, block.c0), block.channels, width};
      forward_span(table, span, in, tokens<float>(y, s, block.c0),
                   state_of<float>(final_state, s, block.c0), silu, weight);
    }
  });
}

void causal_conv_backward(const ConvInputs& inputs, const std::vector<Sequence>& sequences,
                          const ConstView& dy, const ConstView& d_final_state, const View& dx,
                          const View& dweight, const View& dstate, bool silu, Executor& executor) {
  const KernelTable& table = kernels();
  const Plan plan = make_plan(sequences, inputs.x.size[2]);
  const int64_t width = inputs.weight.size[1];
  const int64_t channels = plan.channels;
  // Each group's part of the weight gradient, [groups, W, D]; their sum is taken in the groups'
  // order.
  std::vector<float> parts;
  if (dweight.defined()) parts.resize(plan.groups() * width * channels);
  spread(plan, executor, [&](int64_t group, const Block& block) {
    Taps weight, reversed, sum;
    Tile dpre, x_tile, other_tile;
    load_weight(inputs.weight, block, false, weight);
    load_weight(inputs.weight, block, true, reversed);
    for (int64_t j = 0; j < width; ++j) sum[j].fill(0.0f);
    for (int64_t i = plan.group_begin[group]; i < plan.group_begin[group + 1]; ++i) {
      const Span& span = plan.spans[i];
      const Sequence& s = *span.sequence;
      const Input in{tokens<const float>(inputs.x, s, block.c0),
                     state_of<const float>(inputs.state, s, block.c0), block.channels, width};
      BackwardSpan{.table = table,
                   .span = span,
                   .in = in,
                   .dy = tokens<const float>(dy, s, block.c0),
                   .d_final_state = state_of<const float>(d_final_state, s, block.c0),
                   .dx = tokens<float>(dx, s, block.c0),
                   .dstate = state_of<float>(dstate, s, block.c0),
                   .silu = silu,
                   .weight = weight,
                   .reversed = reversed,
                   .dweight = dweight.defined() ? &sum : nullptr,
                   .dpre = dpre,
                   .x_tile = x_tile,
                   .other_tile = other_tile}
          .run();
    }
    if (!dweight.defined()) return;
    for (int64_t j = 0; j < width; ++j) {
      std::copy_n(sum[j].data(), block.channels,
                  parts.data() + (group * width + j) * channels + block.c0);
    }
  });
  if (!dweight.defined()) return;
  executor.run(plan.blocks, [&](int64_t b) {
    const int64_t c0 = b * kChannels;
    const int64_t n = std::min(kChannels, channels - c0);
    for (int64_t j = 0; j < width; ++j) {
      std::array<double, kChannels> sum{};
      for (int64_t group = 0; group < plan.groups(); ++group) {
        const float* part = parts.data() + (group * width + j) * channels + c0;
        for (int64_t c = 0; c < n; ++c) sum[c] += part[c];
      }
      float* out =
          static_cast<float*>(dweight.data) + c0 * dweight.stride[0] + j * dweight.stride[1];
      for (int64_t c = 0; c < n; ++c) {
        out[c * dweight.stride[0]] = static_cast<float>(sum[c]);
      }
    }
  });
}

// The forward over N sequences of one token: the same kernels in the same order of operations, so
// that tokens one by one give bit for bit what the whole sequence gives.
void causal_conv_step(const ConstView& x, const ConstView& weight, const View& state, const View& y,
                      bool silu, Executor& executor) {
  const auto one_token = [](auto view) {
    view.rank = 3;
    view.size[2] = view.size[1];
    view.stride[2] = view.stride[1];
    view.size[1] = 1;
    view.stride[1] = 0;
    return view;
  };
  std::vector<Sequence> sequences;
  for (int64_t n = 0; n < x.size[0]; ++n) sequences.push_back({n, n, 0, 1});
  ConvInputs inputs;
  inputs.x = one_token(x);
  inputs.weight = weight;
  inputs.state = state;
  causal_conv_forward(inputs, sequences, one_token(y), state, silu, executor);
}

}  // namespace kalmanet::cpu
