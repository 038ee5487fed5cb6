// The causal convolution of the CPU room against a scalar float64 twin, on every instruction set.
#include "cpu/conv.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cpu/arrays.hpp"
#include "cpu/conv_cases.hpp"

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
using namespace testing::conv;

// Relative error of every output: 17 unit roundoffs of the arithmetic. The twin of float64 problems
// has its own.
constexpr double kBound = 1e-6;
template <class T>
constexpr double kBoundOf = std::is_same_v<T, double> ? 2 * 0x1p-29 * kBound : kBound;

template <class T, class W>
void check_dtype(const Case& c) {
  TensorsOf<T, W> reference(c);
  Twin twin(c, reference);
  twin.forward();
  twin.backward();
  for_each_instruction_set([&] {
    TensorsOf<T, W> t(c);
    run_forward(c, t, default_executor());
    run_backward(c, t, default_executor());
    const std::string where =
        c.text() + " " + name(DTypeOf<T>::value) + ", weight " + name(DTypeOf<W>::value);
    const double bound = kBoundOf<T>;
    expect_close("y", t.y, twin.y, bound, where);
    expect_close("final_state", t.final_state, twin.final_state, 0.0, where);  // copies
    expect_close("dx", t.dx, twin.dx, bound, where);
    expect_close("dweight", t.dweight, twin.dweight, bound, where, twin.dweight_terms);
    expect_close("dstate", t.dstate, twin.dstate, bound, where);
  });
}

void check(const Case& c) {
  check_dtype<float, float>(c);
  check_dtype<double, double>(c);
  check_dtype<BFloat16, BFloat16>(c);
  check_dtype<Float16, Float16>(c);
  check_dtype<BFloat16, float>(c);
}

TEST(ConvTwin, GradientsAgainstFiniteDifferences) {
  for (const Case& c : {Case{2, 5, 3, 4, {}}, Case{1, 6, 2, 3, {2, 0, 1, 3}},
                        Case{1, 2, 2, 5, {}, false}, Case{1, 4, 2, 1, {}}}) {
    Tensors t(c);
    Twin twin(c, t);
    twin.backward();
    const auto compare = [&](const char* what, std::vector<double>& input,
                             const std::vector<double>& gradient) {
      std::vector<double> differences;
      for (double& e : input) {
        const double h = 1e-5, before = e;
        e = before + h;
        const double above = twin.loss();
        e = before - h;
        const double below = twin.loss();
        e = before;
        differences.push_back((above - below) / (2 * h));
      }
      const double error = testing::relative_error(gradient, differences, differences);
      EXPECT_TRUE(error <= 1e-8) << what << " of " << c.text() << ": relative error " << error;
    };
    compare("dx", twin.x, twin.dx);
    compare("dweight", twin.weight, twin.dweight);
    compare("dstate", twin.state, twin.dstate);
  }
}

TEST(Conv, OddSizes) {
  uint64_t seed = 1;
  for (int64_t T : {1, 2, 3, 63, 65}) {
    for (int64_t D : {1, 5, 60, 128, 200}) {
      for (int64_t W : {1, 2, 3, 4, 5, 16}) {
        ++seed;
        check({T < 10 ? 3 : 2, T, D, W, {}, seed % 3 != 0, seed % 2 != 0, Layout::dense, seed});
      }
    }
  }
}

// More channels than a task takes, more tokens than a task and a tile take.
TEST(Conv, SeveralTasks) {
  check({2, 150, 300, 4, {}});
  check({1, 700, 40, 16, {}});
  check({1, 90, 513, 3, {}, false, true});
  check({40, 3, 257, 4, {}, true, false});
}

TEST(Conv, PackedSequences) {
  for (int64_t W : {1, 3, 4, 16}) {
    check({1, 40, 20, W, {0, 1, 5, 0, 0, 1, 1, 20, 3, 2, 7, 0}});
    check({1, 40, 20, W, {0, 1, 5, 0, 0, 1, 1, 20, 3, 2, 7, 0}, false, false});
    check({1, 1030, 130, W, {500, 1, 0, 64, 465}});
    check({1, 0, 20, W, {0, 0}});
  }
  check({1, 300, 8, 4, std::vector<int64_t>(300, 1)});
}

TEST(Conv, AnyStrides) {
  for (Layout layout : {Layout::padded, Layout::spread, Layout::transposed, Layout::mirrored}) {
    for (int64_t W : {1, 4, 7}) {
      check({2, 37, 20, W, {}, true, true, layout});
      check({2, 9, 260, W, {}, true, true, layout});
      check({3, 6, 1, W, {}, true, true, layout});
      check({1, 100, 5, W, {50, 1, 0, 49}, false, true, layout});
    }
  }
}

TEST(Conv, NothingToDo) {
  check({0, 5, 4, 4, {}});
  check({2, 0, 4, 4, {}});
  check({2, 5, 0, 4, {}});
}

TEST(Conv, OutputsAreOptional) {
  const Case c{2, 70, 30, 4, {}};
  Tensors all(c);
  run_backward(c, all, default_executor());
  for (int leave_out = 0; leave_out < 8; ++leave_out) {
    Tensors t(c);
    if (leave_out & 1) t.dx = Array();
    if (leave_out & 2) t.dweight = Array();
    if (leave_out & 4) t.dstate = Array();
    run_backward(c, t, default_executor());
    const std::string where = c.text() + " left out: " + std::to_string(leave_out);
    if (t.dx.defined()) expect_same_bits("dx", t.dx, all.dx, where);
    if (t.dweight.defined()) expect_same_bits("dweight", t.dweight, all.dweight, where);
    if (t.dstate.defined()) expect_same_bits("dstate", t.dstate, all.dstate, where);
  }
  Tensors t(c), full(c);
  t.final_state = Array();
  run_forward(c, t, default_executor());
  run_forward(c, full, default_executor());
  expect_same_bits("y", t.y, full.y, c.text());
}

TEST(Conv, AnyNumberOfThreadsGivesTheSameBits) {
  const int before = num_threads();
  const auto check_bits = [&]<class T>(const Case& c, T) {
    for_each_instruction_set([&] {
      TensorsOf<T> one(c);
      set_num_threads(1);
      run_forward(c, one, default_executor());
      run_backward(c, one, default_executor());
      const auto compare = [&](Executor& executor, const std::string& how) {
        TensorsOf<T> t(c);
        run_forward(c, t, executor);
        run_backward(c, t, executor);
        const std::string where = c.text() + ", " + how;
        expect_same_bits("y", t.y, one.y, where);
        expect_same_bits("final_state", t.final_state, one.final_state, where);
        expect_same_bits("dx", t.dx, one.dx, where);
        expect_same_bits("dweight", t.dweight, one.dweight, where);
        expect_same_bits("dstate", t.dstate, one.dstate, where);
      };
      for (int threads : {2, 3, 7}) {
        set_num_threads(threads);
        compare(default_executor(), std::to_string(threads) + " threads");
      }
      ReversedExecutor reversed;
      compare(reversed, "tasks in reverse");
    });
  };
  for (const Case& c : {Case{3, 200, 300, 4, {}}, Case{1, 1030, 130, 5, {500, 1, 0, 64, 465}},
                        Case{1, 300, 8, 4, std::vector<int64_t>(300, 1)}}) {
    for_each_dtype([&](auto type) { check_bits(c, type); });
  }
  set_num_threads(before);
}

// Part [begin, end) of all sequences of `whole` as a problem of its own.
template <class T>
ArrayOf<T> slice(const ArrayOf<T>& whole, int64_t begin, int64_t end) {
  ArrayOf<T> part({whole.size(0), end - begin, whole.size(2)});
  part.for_each(
      [&](int64_t b, int64_t t, int64_t d) { part.at(b, t, d) = whole.at(b, begin + t, d); });
  return part;
}

template <class T>
void expect_slice(const char* what, const ArrayOf<T>& part, const ArrayOf<T>& whole, int64_t begin,
                  const std::string& where) {
  expect_same_bits(what, part, slice(whole, begin, begin + part.size(1)), where);
}

template <class T>
void whole_sequence_is_any_split() {
  for (int64_t W : {1, 3, 4, 16}) {
    for (bool silu : {false, true}) {
      const Case c{2, 75, 37, W, {}, silu};
      for_each_instruction_set([&] {
        TensorsOf<T> whole(c);
        run_forward(c, whole, default_executor());
        for (const std::vector<int64_t>& cuts :
             {std::vector<int64_t>{0, 40, 75}, {0, 1, 3, 3, 64, 75}, {0, 74, 75}}) {
          ArrayOf<T> state = whole.state;
          for (size_t i = 0; i + 1 < cuts.size(); ++i) {
            const int64_t length = cuts[i + 1] - cuts[i];
            const Case part_case{2, length, 37, W, {}, silu};
            ArrayOf<T> x = slice(whole.x, cuts[i], cuts[i + 1]);
            ArrayOf<T> y({2, length, 37});
            ConvInputs in = whole.inputs();
            in.x = x.view();
            in.state = state.view();
            // The new state over the old one.
            cpu::causal_conv_forward(in, part_case.sequences(), y.view(), state.view(), silu,
                                     default_executor());
            expect_slice("y", y, whole.y, cuts[i],
                         c.text() + " from token " + std::to_string(cuts[i]));
          }
          expect_same_bits("final_state", state, whole.final_state, c.text());
        }
        ArrayOf<T> state = whole.state;
        for (int64_t t = 0; t < c.T; ++t) {
          ArrayOf<T> x({2, 37}), y({2, 37});
          x.for_each([&](int64_t b, int64_t d, int64_t) { x.at(b, d) = whole.x.at(b, t, d); });
          cpu::causal_conv_step(x.view(), whole.weight.view(), state.view(), y.view(), silu,
                                default_executor());
          ArrayOf<T> expected({2, 37});
          expected.for_each(
              [&](int64_t b, int64_t d, int64_t) { expected.at(b, d) = whole.y.at(b, t, d); });
          expect_same_bits("step's y", y, expected, c.text() + " token " + std::to_string(t));
        }
        expect_same_bits("step's state", state, whole.final_state, c.text());
      });
    }
  }
}

TEST(Conv, WholeSequenceIsAnySplitIsStepByStep) {
  for_each_dtype([]<class T>(T) { whole_sequence_is_any_split<T>(); });
}

template <class T>
void step_with_any_strides() {
  for (Layout layout : {Layout::padded, Layout::spread, Layout::transposed, Layout::mirrored}) {
    const Case c{3, 1, 70, 4, {}, true, true, layout};
    TensorsOf<T> t(c);
    Twin twin(c, t);
    twin.forward();
    for_each_instruction_set([&] {
      ArrayOf<T> x({3, 70}, layout), y({3, 70}, layout), state = t.state;
      x.for_each([&](int64_t b, int64_t d, int64_t) { x.at(b, d) = t.x.at(b, 0, d); });
      cpu::causal_conv_step(x.view(), t.weight.view(), state.view(), y.view(), true,
                            default_executor());
      expect_close("step's y", y, twin.y, kBoundOf<T>, c.text());
      expect_close("step's state", state, twin.final_state, 0.0, c.text());
    });
  }
}

TEST(Conv, StepWithAnyStrides) {
  for_each_dtype([]<class T>(T) { step_with_any_strides<T>(); });
}

// The gradient through the state between two halves is the gradient of the whole.
TEST(Conv, GradientThroughTheStateOfASplit) {
  for (int64_t cut : {1, 2, 40, 73}) {
    const Case c{2, 75, 20, 4, {}};
    for_each_instruction_set([&] {
      Tensors whole(c);
      run_backward(c, whole, default_executor());
      const Case first_case{2, cut, 20, 4, {}}, second_case{2, 75 - cut, 20, 4, {}};
      Tensors first(first_case), second(second_case);
      first.x = slice(whole.x, 0, cut);
      first.dy = slice(whole.dy, 0, cut);
      first.weight = second.weight = whole.weight;
      first.state = whole.state;
      run_forward(first_case, first, default_executor());
      second.x = slice(whole.x, cut, 75);
      second.dy = slice(whole.dy, cut, 75);
      second.state = first.final_state;
      second.d_final_state = whole.d_final_state;
      run_backward(second_case, second, default_executor());
      first.d_final_state = second.dstate;
      run_backward(first_case, first, default_executor());
      const std::string where = c.text() + " cut at " + std::to_string(cut);
      expect_close("dx before the cut", first.dx, slice(whole.dx, 0, cut).values(), kBound, where);
      expect_close("dx after the cut", second.dx, slice(whole.dx, cut, 75).values(), kBound, where);
      expect_close("dstate", first.dstate, whole.dstate.values(), kBound, where);
      Array dweight({20, 4});
      dweight.for_each([&](int64_t d, int64_t j, int64_t) {
        dweight.at(d, j) = first.dweight.at(d, j) + second.dweight.at(d, j);
      });
      expect_close("dweight", dweight, whole.dweight.values(), kBound, where);
    });
  }
}

// Large inputs of either sign: SiLU and its derivative at both ends.
TEST(Conv, LargeInputs) {
  const Case c{1, 20, 17, 4, {}};
  for_each_instruction_set([&] {
    for (float value : {1e4f, -1e4f, 1e30f, -1e30f}) {
      Tensors t(c);
      t.x.for_each([&](int64_t b, int64_t i, int64_t d) { t.x.at(b, i, d) = value; });
      t.weight.for_each([&](int64_t d, int64_t j, int64_t) { t.weight.at(d, j) = 0.25f; });
      t.state = Array();
      t.final_state = t.d_final_state = t.dstate = Array();
      run_forward(c, t, default_executor());
      run_backward(c, t, default_executor());
      EXPECT_EQ(t.y.at(0, 10, 3), value > 0 ? value : 0.0f) << "silu(" << value << ")";
      t.dx.for_each([&](int64_t b, int64_t i, int64_t d) {
        EXPECT_TRUE(std::isfinite(t.dx.at(b, i, d))) << "x = " << value << ", token " << i;
      });
    }
  });
}

}  // namespace
}  // namespace kalmanet
