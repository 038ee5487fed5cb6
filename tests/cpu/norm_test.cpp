// The gated RMS norm of the CPU room against a scalar float64 twin, on every instruction set.
#include "cpu/norm.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/arrays.hpp"

namespace kalmanet {
namespace {

using testing::Array;
using testing::ArrayOf;
using testing::BFloat16;
using testing::expect_close;
using testing::expect_same_bits;
using testing::Float16;
using testing::for_each_dtype;
using testing::for_each_instruction_set;
using testing::Layout;
using testing::ReversedExecutor;

// Relative error of every output: 17 unit roundoffs of the arithmetic. The twin of float64 problems
// has its own.
constexpr double kBound = 1e-6;
template <class T>
constexpr double kBoundOf = std::is_same_v<T, double> ? 2 * 0x1p-29 * kBound : kBound;

struct Case {
  int64_t R, V;
  bool gate = true;
  Layout layout = Layout::dense;
  double eps = 1e-6;
  float size = 1.0f;  // of the elements of o
  uint64_t seed = 1;

  std::string text() const {
    std::ostringstream s;
    s << "gated_rms_norm R=" << R << " V=" << V << " gate=" << gate
      << " layout=" << testing::name(layout) << " eps=" << eps << " size=" << size
      << " seed=" << seed;
    return s.str();
  }
};

// W: the dtype of the weight, T or (beside 16-bit T) float.
template <class T, class W = T>
struct TensorsOf {
  ArrayOf<T> o, gate, dy;  // inputs
  ArrayOf<W> weight;
  ArrayOf<T> y, d_o, d_gate;  // outputs
  ArrayOf<W> d_weight;
  double eps;

  explicit TensorsOf(const Case& c) : eps(c.eps) {
    std::mt19937_64 random(c.seed);
    o = ArrayOf<T>({c.R, c.V}, c.layout).fill(random, c.size);
    weight = ArrayOf<W>({c.V}, c.layout).fill(random);
    dy = ArrayOf<T>({c.R, c.V}, c.layout).fill(random);
    if (c.gate) {
      gate = ArrayOf<T>({c.R, c.V}, c.layout).fill(random, 2.0f);
      d_gate = ArrayOf<T>({c.R, c.V}, c.layout);
    }
    y = ArrayOf<T>({c.R, c.V}, c.layout);
    d_o = ArrayOf<T>({c.R, c.V}, c.layout);
    d_weight = ArrayOf<W>({c.V}, c.layout);
  }
  NormInputs inputs() const {
    NormInputs in;
    in.o = o.view();
    in.gate = gate.view();
    in.weight = weight.view();
    in.eps = eps;
    return in;
  }
  void forward(Executor& executor) { cpu::gated_rms_norm_forward(inputs(), y.view(), executor); }
  void backward(Executor& executor) {
    cpu::gated_rms_norm_backward(inputs(), dy.view(), d_o.view(), d_gate.view(), d_weight.view(),
                                 executor);
  }
};
using Tensors = TensorsOf<float>;

// The definition in float64 (long sums in long double), row-major.
struct Twin {
  Case c;
  std::vector<double> o, gate, weight, dy;
  std::vector<double> y, d_o, d_gate, d_weight;
  std::vector<double> d_weight_terms;  // the root of the sum of the squares of what d_weight sums

  template <class T, class W>
  Twin(const Case& case_, const TensorsOf<T, W>& t) : c(case_) {
    o = t.o.values();
    if (c.gate) gate = t.gate.values();
    weight = t.weight.values();
    dy = t.dy.values();
  }

  double factor(int64_t i) const { return c.gate ? gate[i] / (1.0 + std::exp(-gate[i])) : 1.0; }
  double inverse_rms(int64_t r) const {
    long double sum = 0;
    for (int64_t i = r * c.V; i < (r + 1) * c.V; ++i) sum += o[i] * o[i];
    return static_cast<double>(1.0 / std::sqrt(sum / static_cast<long double>(c.V) + c.eps));
  }

  void forward() {
    y.assign(o.size(), 0.0);
    for (int64_t r = 0; r < c.R; ++r) {
      const double inverse = inverse_rms(r);
      for (int64_t v = 0; v < c.V; ++v) {
        const int64_t i = r * c.V + v;
        y[i] = weight[v] * o[i] * inverse * factor(i);
      }
    }
  }

  void backward() {
    d_o.assign(o.size(), 0.0);
    d_gate.assign(gate.size(), 0.0);
    std::vector<long double> weight_sums(weight.size(), 0.0L);
    d_weight_terms.assign(weight.size(), 0.0);
    for (int64_t r = 0; r < c.R; ++r) {
      const double inverse = inverse_rms(r);
      long double mean = 0;  // of o times the gradient of o * inverse
      for (int64_t v = 0; v < c.V; ++v) {
        const int64_t i = r * c.V + v;
        mean += o[i] * weight[v] * factor(i) * dy[i] / static_cast<double>(c.V);
      }
      for (int64_t v = 0; v < c.V; ++v) {
        const int64_t i = r * c.V + v;
        const double term = dy[i] * o[i] * inverse * factor(i);
        weight_sums[v] += term;
        d_weight_terms[v] += term * term;
        d_o[i] = inverse * weight[v] * factor(i) * dy[i] -
                 inverse * inverse * inverse * static_cast<double>(mean) * o[i];
        if (!c.gate) continue;
        const double s = 1.0 / (1.0 + std::exp(-gate[i]));
        d_gate[i] = dy[i] * weight[v] * o[i] * inverse * s * (1.0 + gate[i] * (1.0 - s));
      }
    }
    for (double& e : d_weight_terms) e = std::sqrt(e);
    d_weight.assign(weight_sums.begin(), weight_sums.end());
  }

  // The loss whose gradient backward() is.
  double loss() {
    forward();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
    return sum;
  }
};

// A row of n elements is summed in at most n / 2 terms a lane, whose roundings add up to about
// sqrt(n / 2) of them: 141 for the longest row here, and half of that reaches its root.
template <class T, class W>
void check_dtype(const Case& c) {
  TensorsOf<T, W> reference(c);
  Twin twin(c, reference);
  twin.forward();
  twin.backward();
  for_each_instruction_set([&] {
    TensorsOf<T, W> t(c);
    t.forward(default_executor());
    t.backward(default_executor());
    const std::string where =
        c.text() + " " + name(DTypeOf<T>::value) + ", weight " + name(DTypeOf<W>::value);
    const double bound = kBoundOf<T> * std::max(1.0, std::sqrt(static_cast<double>(c.V)) / 34);
    expect_close("y", t.y, twin.y, bound, where);
    expect_close("d_o", t.d_o, twin.d_o, bound, where);
    expect_close("d_gate", t.d_gate, twin.d_gate, bound, where);
    expect_close("d_weight", t.d_weight, twin.d_weight, bound, where, twin.d_weight_terms);
  });
}

// float16 where it can hold the elements.
void check(const Case& c, bool with_float16 = true) {
  check_dtype<float, float>(c);
  check_dtype<double, double>(c);
  check_dtype<BFloat16, BFloat16>(c);
  check_dtype<BFloat16, float>(c);
  if (!with_float16) return;
  check_dtype<Float16, Float16>(c);
}

TEST(NormTwin, GradientsAgainstFiniteDifferences) {
  for (const Case& c :
       {Case{3, 5}, Case{2, 7, false}, Case{4, 1}, Case{2, 3, true, Layout::dense, 0.5}}) {
    Tensors t(c);
    Twin twin(c, t);
    twin.backward();
    const auto compare = [&](const char* what, std::vector<double>& input,
                             const std::vector<double>& gradient, double scale) {
      std::vector<double> differences;
      for (double& e : input) {
        const double h = 1e-6, before = e;
        e = before + h;
        const double above = twin.loss();
        e = before - h;
        const double below = twin.loss();
        e = before;
        differences.push_back((above - below) / (2 * h));
      }
      double worst = 0;
      for (size_t i = 0; i < gradient.size(); ++i) {
        worst = std::max(worst, std::abs(gradient[i] - differences[i]));
      }
      EXPECT_LE(worst, 1e-8 * scale) << what << " of " << c.text();
    };
    compare("d_o", twin.o, twin.d_o, 10);  // V = 1: d_o itself is near 0, its terms are not
    compare("d_gate", twin.gate, twin.d_gate, 1);
    compare("d_weight", twin.weight, twin.d_weight, 1);
  }
}

TEST(Norm, OddSizes) {
  uint64_t seed = 1;
  for (int64_t V : {2, 5, 16, 32, 60, 64, 100, 128, 200, 256, 1000}) {
    for (int64_t R : {1, 2, 3, 63, 65, 300}) {
      for (bool gate : {true, false}) check({R, V, gate, Layout::dense, 1e-6, 1.0f, ++seed});
    }
  }
}

// Rows for many tasks; rows longer than a task.
TEST(Norm, SeveralTasks) {
  check_dtype<float, float>({40000, 32});
  check_dtype<double, double>({40000, 32});
  check_dtype<BFloat16, float>({40000, 32});
  check({5000, 128});
  check({3, 40000});
}

// With one element a row d_o is a difference of two equal terms but for eps: only its size is
// checked.
TEST(Norm, RowsOfOneElement) {
  const Case c{50, 1};
  Tensors reference(c);
  Twin twin(c, reference);
  twin.forward();
  twin.backward();
  for_each_instruction_set([&] {
    Tensors t(c);
    t.forward(default_executor());
    t.backward(default_executor());
    expect_close("y", t.y, twin.y, kBound, c.text());
    expect_close("d_gate", t.d_gate, twin.d_gate, kBound, c.text());
    expect_close("d_weight", t.d_weight, twin.d_weight, kBound, c.text(), twin.d_weight_terms);
    for (int64_t r = 0; r < c.R; ++r) {
      const double term =
          std::abs(twin.weight[0] * twin.factor(r) * twin.dy[r]) * twin.inverse_rms(r);
      EXPECT_NEAR(t.d_o.at(r, 0), twin.d_o[r], kBound * term) << c.text() << " row " << r;
    }
  });
}

TEST(Norm, AnyStrides) {
  for (Layout layout : {Layout::padded, Layout::spread, Layout::transposed, Layout::mirrored}) {
    for (bool gate : {true, false}) {
      check({70, 20, gate, layout});
      check({3, 129, gate, layout});
      check({1, 33, gate, layout});
    }
    check({600, 300, true, layout});
  }
}

// Where eps decides, where it does not, and rows whose squares would leave float32's normal range
// if they were not kept apart from eps.
TEST(Norm, SizesAgainstEps) {
  for (float size : {1e-12f, 1e-6f, 1e-3f, 1e3f, 1e12f}) {
    const bool normal = size >= 1e-3f && size <= 1e3f;  // in float16
    check({20, 64, true, Layout::dense, 1e-6, size}, normal);
    check({20, 64, true, Layout::dense, 0.1, size}, normal);
  }
}

TEST(Norm, RowOfZerosStaysZero) {
  for_each_instruction_set([] {
    const Case c{3, 40};
    Tensors t(c);
    for (int64_t v = 0; v < c.V; ++v) t.o.at(1, v) = 0.0f;
    t.forward(default_executor());
    t.backward(default_executor());
    for (int64_t v = 0; v < c.V; ++v) {
      EXPECT_EQ(t.y.at(1, v), 0.0f) << "element " << v;
      EXPECT_EQ(t.d_gate.at(1, v), 0.0f) << "element " << v;
      const double factor = t.gate.at(1, v) / (1.0 + std::exp(-double{t.gate.at(1, v)}));
      const double expected = t.weight.at(v) * factor * t.dy.at(1, v) * 1e3;  // 1 / sqrt(eps)
      EXPECT_NEAR(t.d_o.at(1, v), expected, 1e-6 * std::abs(expected)) << "element " << v;
    }
  });
}

TEST(Norm, NothingToDo) {
  check({0, 16});
  check({3, 0});
}

TEST(Norm, OutputsAreOptional) {
  const Case c{300, 70};
  Tensors all(c);
  all.backward(default_executor());
  for (int leave_out = 0; leave_out < 8; ++leave_out) {
    Tensors t(c);
    if (leave_out & 1) t.d_o = Array();
    if (leave_out & 2) t.d_gate = Array();
    if (leave_out & 4) t.d_weight = Array();
    t.backward(default_executor());
    const std::string where = c.text() + " left out: " + std::to_string(leave_out);
    if (t.d_o.defined()) expect_same_bits("d_o", t.d_o, all.d_o, where);
    if (t.d_gate.defined()) expect_same_bits("d_gate", t.d_gate, all.d_gate, where);
    if (t.d_weight.defined()) expect_same_bits("d_weight", t.d_weight, all.d_weight, where);
  }
}

TEST(Norm, AnyNumberOfThreadsGivesTheSameBits) {
  const int before = num_threads();
  const auto check_bits = [&]<class T>(const Case& c, T) {
    for_each_instruction_set([&] {
      TensorsOf<T> one(c);
      set_num_threads(1);
      one.forward(default_executor());
      one.backward(default_executor());
      const auto compare = [&](Executor& executor, const std::string& how) {
        TensorsOf<T> t(c);
        t.forward(executor);
        t.backward(executor);
        const std::string where = c.text() + ", " + how;
        expect_same_bits("y", t.y, one.y, where);
        expect_same_bits("d_o", t.d_o, one.d_o, where);
        expect_same_bits("d_gate", t.d_gate, one.d_gate, where);
        expect_same_bits("d_weight", t.d_weight, one.d_weight, where);
      };
      for (int threads : {2, 3, 7}) {
        set_num_threads(threads);
        compare(default_executor(), std::to_string(threads) + " threads");
      }
      ReversedExecutor reversed;
      compare(reversed, "tasks in reverse");
    });
  };
  for (const Case& c : {Case{3000, 64}, Case{700, 129}, Case{40000, 5}}) {
    for_each_dtype([&](auto type) { check_bits(c, type); });
  }
  set_num_threads(before);
}

// A row's result does not depend on which other rows there are.
TEST(Norm, RowsAreIndependent) {
  const Case c{200, 75};
  for_each_instruction_set([&] {
    Tensors all(c);
    all.forward(default_executor());
    for (int64_t r : {0, 63, 64, 199}) {
      Tensors one(Case{1, 75});
      for (int64_t v = 0; v < 75; ++v) {
        one.o.at(0, v) = all.o.at(r, v);
        one.gate.at(0, v) = all.gate.at(r, v);
        one.weight.at(v) = all.weight.at(v);
      }
      one.forward(default_executor());
      for (int64_t v = 0; v < 75; ++v) {
        EXPECT_EQ(one.y.at(0, v), all.y.at(r, v)) << "row " << r << ", element " << v;
      }
    }
  });
}

}  // namespace
}  // namespace kalmanet
