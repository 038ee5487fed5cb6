// The causal convolution on the CPU: cuts sequences and channels into tasks and hands the kernels
// rows of adjacent channels. What a task computes depends on the shapes only, never on the threads.
#include "cpu/conv.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "core/half.hpp"
#include "cpu/conv_data.hpp"
#include "cpu/dispatch.hpp"

namespace kalmanet::cpu {
namespace {

using namespace conv;

// Elements a task has at least (about 5 microseconds of work), and tokens at most: the weight
// gradient is summed in float32 within a task and in float64 over tasks.
constexpr int64_t kTaskElements = 8192;
constexpr int64_t kTaskRows = 512;

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

template <class S>
const ConvKernels<S>& table_of() {
  if constexpr (std::is_same_v<S, double>) {
    return kernels().conv_float64;
  } else {
    return kernels().conv;
  }
}

template <class S>
void forward_span(const ConvKernels<S>& table, const Span& span, const Input<S>& in,
                  const Plane<void>& y, const TapPlane<void>& final_state, bool silu,
                  const Scratch<S>& scratch) {
  const bool y_dense = y.dense<S>();
  const bool direct = in.x.template dense<S>() && y_dense;
  const int64_t step = direct ? std::max<int64_t>(span.end - span.begin, 1) : kTileRows;
  for (int64_t t = span.begin; t < span.end; t += step) {
    const int64_t rows = std::min(step, span.end - t);
    ConvForwardJob<S> job;
    job.in = in.window(t, rows, scratch);
    job.silu = silu;
    job.y = y_dense ? y.row<S>(t) : scratch.output.data;
    job.y_stride = y_dense ? y.row_stride : scratch.output.stride;
    table.forward(job);
    if (y_dense) continue;
    for (int64_t r = 0; r < rows; ++r) y.write(scratch.output.row(r), in.channels, t + r);
  }
  // The state is read by the first span only, so that this may be written over it here.
  if (span.begin == 0 && final_state.defined()) {
    store_final_state(in, span.sequence->length(), final_state, scratch);
  }
}

// Backward of one span, last tile first. scratch.dpre holds a tile's gradients of the convolution's
// sums, then the width - 1 rows that follow: zeros past the sequence's end.
template <class S>
struct BackwardSpan {
  const ConvKernels<S>& table;
  const Span& span;
  const Input<S>& in;
  Plane<const void> dy;
  TapPlane<const void> d_final_state;
  Plane<void> dx;
  TapPlane<void> dstate;
  bool silu;
  bool want_dweight;  // added to scratch.dweight
  const Scratch<S>& scratch;

  int64_t length() const { return span.sequence->length(); }

  // dpre of tokens [t, t + rows), into the first rows of its tile.
  void differentiate(int64_t t, int64_t rows, bool with_weight) const {
    ConvGradJob<S> job;
    job.in = in.window(t, rows, scratch);
    job.silu = silu;
    if (dy.dense<S>()) {
      job.dy = dy.row<S>(t);
      job.dy_stride = dy.row_stride;
    } else {
      for (int64_t r = 0; r < rows; ++r) dy.read(t + r, in.channels, scratch.output.row(r));
      job.dy = scratch.output.data;
      job.dy_stride = scratch.output.stride;
    }
    job.dpre = scratch.dpre.data;
    job.dpre_stride = scratch.dpre.stride;
    job.dweight = with_weight && want_dweight ? scratch.dweight.data : nullptr;
    table.grad(job);
  }

  // to_s = sum_j weight_j dpre_{s + width - 1 - j}: the forward's sum with the taps in reverse,
  // over rows that begin at s and not end there.
  void correlate(const Tile<S>& from, int64_t rows, S* to, int64_t to_stride) const {
    ConvForwardJob<S> job;
    job.in.past = from.data;
    job.in.past_stride = from.stride;
    job.in.x = from.row(in.width - 1);
    job.in.x_stride = from.stride;
    job.in.rows = rows;
    job.in.channels = in.channels;
    job.in.width = in.width;
    job.in.weight = scratch.reversed.data;
    job.in.weight_stride = scratch.reversed.stride;
    job.y = to;
    job.y_stride = to_stride;
    job.silu = false;
    table.forward(job);
  }

  void store_dx(int64_t t, int64_t rows) const {
    const bool dense = dx.dense<S>();
    const Tile<S> to = dense ? Tile<S>{dx.row<S>(t), dx.row_stride} : scratch.output;
    correlate(scratch.dpre, rows, to.data, to.stride);
    if (d_final_state.defined()) {
      // Token i is element i - (length - width) of the final state.
      for (int64_t i = std::max(t, length() - in.width); i < t + rows; ++i) {
        add_to(to.row(i - t), i - length() + in.width);
      }
    }
    if (dense) return;
    for (int64_t r = 0; r < rows; ++r) dx.write(to.row(r), in.channels, t + r);
  }

  // row[c] += d_final_state(c, w)
  void add_to(S* row, int64_t w) const {
    S* const column = scratch.unused.row(0);
    d_final_state.read(w, in.channels, column);
    for (int64_t c = 0; c < in.channels; ++c) row[c] += column[c];
  }

  // Element w of the state is token w - width. dpre's first rows are those of the sequence.
  void store_dstate() const {
    const int64_t past = in.width - 1;
    const Tile<S>& padded = scratch.input;
    for (int64_t i = 0; i < past; ++i) {
      std::fill_n(padded.row(i), in.channels, S{0});
      std::copy_n(scratch.dpre.row(i), in.channels, padded.row(past + i));
    }
    if (past > 0) correlate(padded, past, scratch.output.data, scratch.output.stride);
    TapRows<S> rows{};
    rows[0] = scratch.input.row(0);  // free by now
    std::fill_n(rows[0], in.channels, S{0});
    for (int64_t w = 1; w < in.width; ++w) rows[w] = scratch.output.row(w - 1);
    for (int64_t w = length(); w < in.width && d_final_state.defined(); ++w) {
      add_to(rows[w], w - length());  // where this element went
    }
    transpose(rows, in.channels, in.width, dstate, scratch.taps);
  }

  void run() const {
    const int64_t past = in.width - 1;
    const bool inputs = dx.defined() || (dstate.defined() && span.begin == 0);
    if (inputs) {
      const int64_t known = std::min(past, length() - span.end);
      for (int64_t i = known; i < past; ++i) {
        std::fill_n(scratch.dpre.row(i), in.channels, S{0});
      }
      if (known > 0) differentiate(span.end, known, false);
    }
    const int64_t tiles = (span.end - span.begin + kTileRows - 1) / kTileRows;
    for (int64_t i = tiles - 1; i >= 0; --i) {
      const int64_t t = span.begin + i * kTileRows;
      const int64_t rows = std::min(kTileRows, span.end - t);
      if (inputs) {
        // The first rows of what comes later are what follows this tile.
        std::memmove(scratch.dpre.row(rows), scratch.dpre.data,
                     past * scratch.dpre.stride * sizeof(S));
      }
      differentiate(t, rows, true);
      if (dx.defined()) store_dx(t, rows);
    }
    if (dstate.defined() && span.begin == 0) store_dstate();
  }
};

template <class S>
void forward_stored(const ConvInputs& inputs, const std::vector<Sequence>& sequences, const View& y,
                    const View& final_state, bool silu, Executor& executor) {
  const ConvKernels<S>& table = table_of<S>();
  const Plan plan = make_plan(sequences, inputs.x.size[2]);
  const int64_t width = inputs.weight.size[1];
  spread(plan, executor, [&](int64_t group, const Block& block) {
    const Scratch<S> scratch(block.channels, width);
    load_weight(inputs, block, false, scratch.weight, scratch);
    for (int64_t i = plan.group_begin[group]; i < plan.group_begin[group + 1]; ++i) {
      const Span& span = plan.spans[i];
      const Sequence& s = *span.sequence;
      const Input<S> in{tokens<const void>(inputs.x, s, block.c0),
                        state_of<const void>(inputs.state, s, block.c0), block.channels, width};
      forward_span(table, span, in, tokens<void>(y, s, block.c0),
                   state_of<void>(final_state, s, block.c0), silu, scratch);
    }
  });
}

template <class S>
void backward_stored(const ConvInputs& inputs, const std::vector<Sequence>& sequences,
                     const ConstView& dy, const ConstView& d_final_state, const View& dx,
                     const View& dweight, const View& dstate, bool silu, Executor& executor) {
  const ConvKernels<S>& table = table_of<S>();
  const Plan plan = make_plan(sequences, inputs.x.size[2]);
  const int64_t width = inputs.weight.size[1];
  const int64_t channels = plan.channels;
  // Each group's part of the weight gradient, [groups, W, D]; their sum is taken in the groups'
  // order.
  std::vector<S> parts;
  if (dweight.defined()) parts.resize(plan.groups() * width * channels);
  spread(plan, executor, [&](int64_t group, const Block& block) {
    const Scratch<S> scratch(block.channels, width);
    load_weight(inputs, block, false, scratch.weight, scratch);
    load_weight(inputs, block, true, scratch.reversed, scratch);
    for (int64_t j = 0; j < width; ++j) {
      std::fill_n(scratch.dweight.row(j), block.channels, S{0});
    }
    for (int64_t i = plan.group_begin[group]; i < plan.group_begin[group + 1]; ++i) {
      const Span& span = plan.spans[i];
      const Sequence& s = *span.sequence;
      const Input<S> in{tokens<const void>(inputs.x, s, block.c0),
                        state_of<const void>(inputs.state, s, block.c0), block.channels, width};
      BackwardSpan<S>{.table = table,
                      .span = span,
                      .in = in,
                      .dy = tokens<const void>(dy, s, block.c0),
                      .d_final_state = state_of<const void>(d_final_state, s, block.c0),
                      .dx = tokens<void>(dx, s, block.c0),
                      .dstate = state_of<void>(dstate, s, block.c0),
                      .silu = silu,
                      .want_dweight = dweight.defined(),
                      .scratch = scratch}
          .run();
    }
    if (!dweight.defined()) return;
    for (int64_t j = 0; j < width; ++j) {
      std::copy_n(scratch.dweight.row(j), block.channels,
                  parts.data() + (group * width + j) * channels + block.c0);
    }
  });
  if (!dweight.defined()) return;
  constexpr int64_t kSums = 256;  // channels a task
  executor.run((channels + kSums - 1) / kSums, [&](int64_t block) {
    const int64_t c0 = block * kSums;
    const int64_t n = std::min(kSums, channels - c0);
    for (int64_t j = 0; j < width; ++j) {
      std::array<double, kSums> sum{};
      for (int64_t group = 0; group < plan.groups(); ++group) {
        const S* part = parts.data() + (group * width + j) * channels + c0;
        for (int64_t c = 0; c < n; ++c) sum[c] += part[c];
      }
      for (int64_t c = 0; c < n; ++c) {
        const int64_t at = (c0 + c) * dweight.stride[0] + j * dweight.stride[1];
        core::store_element(dweight.dtype, dweight.data, at, sum[c]);
      }
    }
  });
}

}  // namespace

void causal_conv_forward(const ConvInputs& inputs, const std::vector<Sequence>& sequences,
                         const View& y, const View& final_state, bool silu, Executor& executor) {
  const auto run =
      inputs.x.dtype == DType::float64 ? &forward_stored<double> : &forward_stored<float>;
  run(inputs, sequences, y, final_state, silu, executor);
}

void causal_conv_backward(const ConvInputs& inputs, const std::vector<Sequence>& sequences,
                          const ConstView& dy, const ConstView& d_final_state, const View& dx,
                          const View& dweight, const View& dstate, bool silu, Executor& executor) {
  const auto run =
      inputs.x.dtype == DType::float64 ? &backward_stored<double> : &backward_stored<float>;
  run(inputs, sequences, dy, d_final_state, dx, dweight, dstate, silu, executor);
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
  sequences.reserve(static_cast<size_t>(x.size[0]));
  for (int64_t n = 0; n < x.size[0]; ++n) sequences.push_back({n, n, 0, 1});
  ConvInputs inputs;
  inputs.x = one_token(x);
  inputs.weight = weight;
  inputs.state = state;
  causal_conv_forward(inputs, sequences, one_token(y), state, silu, executor);
}

}  // namespace kalmanet::cpu
