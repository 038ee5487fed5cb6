// Problems of the causal convolution and their answer by definition: a scalar twin in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "cpu/arrays.hpp"
#include "cpu/conv.hpp"

namespace kalmanet::testing::conv {

using core::Sequence;

struct Case {
  int64_t B, T, D, W;
  std::vector<int64_t> lengths;  // packed sequences (B = 1, T = their sum); empty: none
  bool silu = true;
  bool state = true;  // initial and final state and their gradients
  Layout layout = Layout::dense;
  uint64_t seed = 1;

  std::string text() const {
    std::ostringstream s;
    s << "conv B=" << B << " T=" << T << " D=" << D << " W=" << W << " silu=" << silu
      << " state=" << state << " layout=" << testing::name(layout) << " seed=" << seed;
    if (!lengths.empty()) s << " packed:";
    for (int64_t n : lengths) s << ' ' << n;
    return s.str();
  }
  std::vector<Sequence> sequences() const {
    std::vector<Sequence> all;
    int64_t begin = 0;
    for (int64_t b = 0; lengths.empty() && b < B; ++b) all.push_back({b, b, 0, T});
    for (int64_t n : lengths) {
      all.push_back({std::ssize(all), 0, begin, begin + n});
      begin += n;
    }
    return all;
  }
};

// W: the dtype of the weight, T or (beside 16-bit T) float.
template <class T, class W = T>
struct TensorsOf {
  ArrayOf<T> x, state, dy, d_final_state;  // inputs
  ArrayOf<W> weight;
  ArrayOf<T> y, final_state, dx, dstate;  // outputs
  ArrayOf<W> dweight;

  explicit TensorsOf(const Case& c) {
    std::mt19937_64 random(c.seed);
    const int64_t N = std::ssize(c.sequences());
    x = ArrayOf<T>({c.B, c.T, c.D}, c.layout).fill(random);
    weight = ArrayOf<W>({c.D, c.W}, c.layout).fill(random, 0.7f);
    dy = ArrayOf<T>({c.B, c.T, c.D}, c.layout).fill(random);
    if (c.state) {
      state = ArrayOf<T>({N, c.D, c.W}, c.layout).fill(random);
      d_final_state = ArrayOf<T>({N, c.D, c.W}, c.layout).fill(random);
      final_state = ArrayOf<T>({N, c.D, c.W}, c.layout);
      dstate = ArrayOf<T>({N, c.D, c.W}, c.layout);
    }
    y = ArrayOf<T>({c.B, c.T, c.D}, c.layout);
    dx = ArrayOf<T>({c.B, c.T, c.D}, c.layout);
    dweight = ArrayOf<W>({c.D, c.W}, c.layout);
  }
  ConvInputs inputs() const {
    ConvInputs in;
    in.x = x.view();
    in.weight = weight.view();
    in.state = state.view();
    return in;
  }
};
using Tensors = TensorsOf<float>;

template <class T, class W>
void run_forward(const Case& c, TensorsOf<T, W>& t, Executor& executor) {
  cpu::causal_conv_forward(t.inputs(), c.sequences(), t.y.view(), t.final_state.view(), c.silu,
                           executor);
}
template <class T, class W>
void run_backward(const Case& c, TensorsOf<T, W>& t, Executor& executor) {
  cpu::causal_conv_backward(t.inputs(), c.sequences(), t.dy.view(), t.d_final_state.view(),
                            t.dx.view(), t.dweight.view(), t.dstate.view(), c.silu, executor);
}

// The definition, one scalar at a time in float64. Dense arrays in row-major order.
struct Twin {
  const Case& c;
  std::vector<Sequence> sequences;
  std::vector<double> x, weight, state, dy, d_final_state;
  std::vector<double> y, final_state, dx, dweight, dstate;
  std::vector<double> dweight_terms;  // the root of the sum of the squares of what dweight sums

  template <class T, class W>
  Twin(const Case& case_, const TensorsOf<T, W>& t) : c(case_), sequences(case_.sequences()) {
    x = t.x.values();
    weight = t.weight.values();
    dy = t.dy.values();
    state = c.state ? t.state.values() : zeros(states());
    d_final_state = c.state ? t.d_final_state.values() : zeros(states());
  }

  static std::vector<double> zeros(int64_t n) { return std::vector<double>(n, 0.0); }
  int64_t states() const { return std::ssize(sequences) * c.D * c.W; }
  int64_t token(const Sequence& s, int64_t t, int64_t d) const {
    return (s.row * c.T + s.begin + t) * c.D + d;
  }
  int64_t state_at(const Sequence& s, int64_t d, int64_t w) const {
    return (s.index * c.D + d) * c.W + w;
  }
  // Where input t (>= -W) of a sequence is kept, in x or in its state, or its gradient likewise.
  double& input(std::vector<double>& of_x, std::vector<double>& of_state, const Sequence& s,
                int64_t t, int64_t d) const {
    return t >= 0 ? of_x[token(s, t, d)] : of_state[state_at(s, d, c.W + t)];
  }

  double pre(const Sequence& s, int64_t t, int64_t d) {
    double sum = 0;
    for (int64_t j = 0; j < c.W; ++j) {
      sum += weight[d * c.W + j] * input(x, state, s, t - c.W + 1 + j, d);
    }
    return sum;
  }

  void forward() {
    y = zeros(c.B * c.T * c.D);
    final_state = zeros(states());
    for (const Sequence& s : sequences) {
      for (int64_t d = 0; d < c.D; ++d) {
        for (int64_t t = 0; t < s.length(); ++t) {
          const double p = pre(s, t, d);
          y[token(s, t, d)] = c.silu ? p / (1.0 + std::exp(-p)) : p;
        }
        for (int64_t w = 0; w < c.W; ++w) {
          final_state[state_at(s, d, w)] = input(x, state, s, s.length() - c.W + w, d);
        }
      }
    }
  }

  void backward() {
    dx = zeros(c.B * c.T * c.D);
    dweight = zeros(c.D * c.W);
    dweight_terms = zeros(c.D * c.W);
    dstate = zeros(states());
    for (const Sequence& s : sequences) {
      for (int64_t d = 0; d < c.D; ++d) {
        for (int64_t t = 0; t < s.length(); ++t) {
          double dp = dy[token(s, t, d)];
          if (c.silu) {
            const double p = pre(s, t, d), sigmoid = 1.0 / (1.0 + std::exp(-p));
            dp *= sigmoid * (1.0 + p * (1.0 - sigmoid));
          }
          for (int64_t j = 0; j < c.W; ++j) {
            const int64_t from = t - c.W + 1 + j;
            const double term = dp * input(x, state, s, from, d);
            dweight[d * c.W + j] += term;
            dweight_terms[d * c.W + j] += term * term;
            input(dx, dstate, s, from, d) += dp * weight[d * c.W + j];
          }
        }
        for (int64_t w = 0; w < c.W; ++w) {
          input(dx, dstate, s, s.length() - c.W + w, d) += d_final_state[state_at(s, d, w)];
        }
      }
    }
    for (double& e : dweight_terms) e = std::sqrt(e);
  }

  // The loss whose gradient backward() is.
  double loss() {
    forward();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
    for (size_t i = 0; i < final_state.size(); ++i) sum += final_state[i] * d_final_state[i];
    return sum;
  }
};

}  // namespace kalmanet::testing::conv
