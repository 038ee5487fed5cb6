// The bodies of the convolution's and the gated norm's CUDA kernels, run by the CPU with the GPU's
// index arithmetic: against the convolution's float64 twin, and against the CPU room's norm on the
// same numbers in float64; and in the other order of threads, bit for bit.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpu/arrays.hpp"
#include "cpu/conv_cases.hpp"
#include "cpu/norm.hpp"
#include "cuda/conv_body.hpp"
#include "cuda/layer_plan.hpp"
#include "cuda/norm_body.hpp"

namespace kalmanet::testing {
namespace {

// Relative error of every output: 17 unit roundoffs of the arithmetic, as in tests/cpu.
template <class T>
constexpr double kBound = std::is_same_v<T, double> ? 2e-6 * 0x1p-29 : 1e-6;
template <class T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The sums of kPartsAThread parts at a time, as src/cuda/layer.cpp launches them.
void emulate_sums(View result, int64_t columns, std::vector<double> parts, int64_t count,
                  int64_t width) {
  while (count > cuda::kPartsAThread) {
    const int64_t groups = (count + cuda::kPartsAThread - 1) / cuda::kPartsAThread;
    std::vector<double> sums(static_cast<size_t>(groups * width));
    const cuda::SumJob job{parts.data(), sums.data(), count, width, {}, columns};
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t e = 0; e < width; ++e) cuda::run_sum(job, g, e);
    }
    parts = std::move(sums);
    count = groups;
  }
  cuda::SumJob job{parts.data(), nullptr, count, width, {}, columns};
  job.result = cuda::array_of(result);
  if (result.rank == 1) job.result.stride[1] = result.stride[0], job.columns = width;
  for (int64_t e = 0; e < width; ++e) cuda::run_sum(job, 0, e);
}

// Every thread of the grid, in its order or the opposite one.
template <class F>
void for_threads(int64_t count, bool backwards, const F& f) {
  for (int64_t i = 0; i < count; ++i) f(backwards ? count - 1 - i : i);
}

template <class T, class W>
void emulate_conv(const conv::Case& c, conv::TensorsOf<T, W>& t, bool backwards) {
  using S = Computed<T>;
  ConvInputs inputs = t.inputs();
  std::vector<int64_t> offsets = {0};
  for (int64_t n : c.lengths) offsets.push_back(offsets.back() + n);
  if (!c.lengths.empty()) inputs.cu_seqlens = offsets;
  for (const bool backward : {false, true}) {
    std::vector<cuda::ConvSpan> spans;
    cuda::ConvJob job = cuda::conv_job(
        inputs, c.sequences(), backward ? cuda::kConvBackwardTokens : cuda::kConvForwardTokens,
        c.silu, spans);
    if (!spans.empty()) job.spans = spans.data();
    std::vector<double> parts(static_cast<size_t>(job.num_spans * c.D * c.W), NAN);
    if (backward) {
      job.dy = cuda::array_of(t.dy.view()), job.d_final = cuda::array_of(t.d_final_state.view());
      job.dx = cuda::array_of(t.dx.view()), job.dstate = cuda::array_of(t.dstate.view());
      job.parts = parts.data();
    } else {
      job.y = cuda::array_of(t.y.view()), job.final_state = cuda::array_of(t.final_state.view());
    }
    for_threads(job.num_spans * c.D, backwards,
                [&](int64_t i) { cuda::run_conv<S>(job, i / c.D, i % c.D, backward); });
    if (backward) emulate_sums(t.dweight.view(), c.W, parts, job.num_spans, c.D * c.W);
  }
}

template <class T, class W>
void check_conv_dtype(const conv::Case& c) {
  conv::TensorsOf<T, W> t(c), other(c);
  conv::Twin twin(c, t);
  twin.forward();
  twin.backward();
  emulate_conv(c, t, false);
  emulate_conv(c, other, true);
  const std::string where = "emulated CUDA " + c.text() + " " + name(DTypeOf<T>::value) +
                            ", weight " + name(DTypeOf<W>::value);
  expect_same_bits("y", t.y, other.y, where);
  expect_same_bits("dx", t.dx, other.dx, where);
  expect_same_bits("dweight", t.dweight, other.dweight, where);
  expect_close("y", t.y, twin.y, kBound<T>, where);
  expect_close("final_state", t.final_state, twin.final_state, 0.0, where);  // copies
  expect_close("dx", t.dx, twin.dx, kBound<T>, where);
  expect_close("dweight", t.dweight, twin.dweight, kBound<T>, where, twin.dweight_terms);
  expect_close("dstate", t.dstate, twin.dstate, kBound<T>, where);
}

void check_conv(const conv::Case& c) {
  check_conv_dtype<float, float>(c);
  check_conv_dtype<double, double>(c);
  check_conv_dtype<BFloat16, BFloat16>(c);
  check_conv_dtype<Float16, float>(c);
}

TEST(CudaLayerEmulation, ConvolutionOverShapes) {
  uint64_t seed = 1;
  for (int64_t T : {0, 1, 2, 3, 15, 16, 17, 33, 65}) {
    for (int64_t W : {1, 2, 3, 4, 5, 16}) {
      ++seed;
      for (const Layout layout : {Layout::dense, Layout::spread, Layout::mirrored}) {
        if (T == 0 && layout == Layout::mirrored) continue;  // (an empty array has no last element)
        check_conv({T < 10 ? 3 : 2,
                    T,
                    static_cast<int64_t>(1 + seed % 5),
                    W,
                    {},
                    seed % 3 != 0,
                    seed % 2 != 0,
                    layout,
                    seed});
      }
    }
  }
}

TEST(CudaLayerEmulation, ConvolutionOfPackedSequences) {
  for (int64_t W : {1, 4, 7, 16}) {
    check_conv({1, 104, 5, W, {3, 0, 1, 64, 0, 33, 2, 1}, true, true});
    check_conv({1, 3, 2, W, {0, 3}, false, true});
  }
}

// More parts than one thread adds, twice over.
TEST(CudaLayerEmulation, SumsOfManyParts) {
  check_conv({1, 33 * cuda::kPartsAThread * cuda::kConvBackwardTokens, 1, 2, {}, true, false});
}

// What a window does not reach is not multiplied by zero either: NaN in front of it stays there.
TEST(CudaLayerEmulation, TheWindowEndsWhereItsTapsDo) {
  conv::Case c{1, 40, 1, 3, {}, true, false};
  conv::Tensors t(c);
  t.x.at(0, 5, 0) = NAN;
  t.dy.at(0, 20, 0) = NAN;
  emulate_conv(c, t, false);
  for (int64_t i = 0; i < c.T; ++i) {
    EXPECT_EQ(std::isnan(t.y.at(0, i, 0)), i >= 5 && i < 8) << "y, token " << i;
    EXPECT_EQ(std::isnan(t.dx.at(0, i, 0)), (i >= 3 && i < 8) || (i >= 18 && i <= 20))
        << "dx, token " << i;
  }
}

TEST(CudaLayerEmulation, TheStateMayBeUpdatedInPlace) {
  for (int64_t T : {1, 2, 3, 20}) {
    conv::Case c{2, T, 3, 4, {}};
    conv::Tensors t(c);
    conv::Twin twin(c, t);
    twin.forward();
    std::vector<cuda::ConvSpan> spans;
    cuda::ConvJob job =
        cuda::conv_job(t.inputs(), c.sequences(), cuda::kConvForwardTokens, true, spans);
    job.y = cuda::array_of(t.y.view());
    job.final_state = job.state;
    for (int64_t i = 0; i < job.num_spans * c.D; ++i) {
      cuda::run_conv<float>(job, i / c.D, i % c.D, false);
    }
    expect_close("y", t.y, twin.y, kBound<float>, "in place, " + c.text());
    expect_close("state", t.state, twin.final_state, 0.0, "in place, " + c.text());
  }
}

struct NormCase {
  int64_t R, V;
  bool gate;
  Layout layout;
};

template <class T, class W = T>
struct NormTensors {
  ArrayOf<T> o, gate, dy, y, d_o, d_gate;
  ArrayOf<W> weight, d_weight;

  NormTensors(const NormCase& c, uint64_t seed) {
    std::mt19937_64 random(seed);
    const auto rows = [&] { return ArrayOf<T>({c.R, c.V}, c.layout); };
    o = rows().fill(random), dy = rows().fill(random);
    weight = ArrayOf<W>({c.V}, c.layout).fill(random);
    if (c.gate) gate = rows().fill(random, 2.0f), d_gate = rows();
    y = rows(), d_o = rows();
    d_weight = ArrayOf<W>({c.V}, c.layout);
  }
  // The same numbers in float64.
  template <class U, class X>
  void take(const NormTensors<U, X>& from) {
    const auto copy = [](auto& to, const auto& source) {
      if (to.defined()) to.for_each([&](auto... i) { to.at(i...) = source.at(i...); });
    };
    copy(o, from.o), copy(gate, from.gate), copy(dy, from.dy), copy(weight, from.weight);
  }
  NormInputs inputs() const {
    return {.o = o.view(), .gate = gate.view(), .weight = weight.view(), .eps = 1e-6};
  }
};

template <class T, class W>
void emulate_norm(NormTensors<T, W>& t, bool backwards) {
  using S = Computed<T>;
  cuda::NormJob job = cuda::norm_job(t.inputs());
  job.y = cuda::array_of(t.y.view()), job.dy = cuda::array_of(t.dy.view());
  job.d_o = cuda::array_of(t.d_o.view()), job.d_gate = cuda::array_of(t.d_gate.view());
  const int64_t groups = (job.R + cuda::kNormRowsAPart - 1) / cuda::kNormRowsAPart;
  std::vector<double> inverse(static_cast<size_t>(job.R), NAN);
  std::vector<double> parts(static_cast<size_t>(groups * job.V), NAN);
  job.inverse = inverse.data(), job.parts = parts.data();
  cuda::HostGroup<cuda::NormRegisters<S>> group(cuda::kNormThreads, backwards);
  for_threads((job.R + cuda::kNormRows - 1) / cuda::kNormRows, backwards, [&](int64_t block) {
    cuda::run_norm<S>(group, job, block);
    cuda::run_norm_backward<S>(group, job, block);
  });
  for_threads(groups * job.V, backwards,
              [&](int64_t i) { cuda::run_norm_weight<S>(job, i / job.V, i % job.V); });
  emulate_sums(t.d_weight.view(), 1, parts, groups, job.V);
}

template <class T, class W = T>
void check_norm(const NormCase& c, uint64_t seed) {
  NormTensors<T, W> t(c, seed), other(c, seed);
  NormTensors<double> twin({c.R, c.V, c.gate, Layout::dense}, seed);
  twin.take(t);
  emulate_norm(t, false);
  emulate_norm(other, true);
  cpu::gated_rms_norm_forward(twin.inputs(), twin.y.view(), default_executor());
  cpu::gated_rms_norm_backward(twin.inputs(), twin.dy.view(), twin.d_o.view(), twin.d_gate.view(),
                               twin.d_weight.view(), default_executor());
  const std::string where = "emulated CUDA gated_rms_norm R=" + std::to_string(c.R) +
                            " V=" + std::to_string(c.V) + " gate=" + std::to_string(c.gate) +
                            " layout=" + name(c.layout) + " seed=" + std::to_string(seed) + " " +
                            name(DTypeOf<T>::value);
  expect_same_bits("d_o", t.d_o, other.d_o, where);
  expect_same_bits("d_weight", t.d_weight, other.d_weight, where);
  // Sums of V products in a row of float32 keep sqrt(V) roundings of it, at most 16 here.
  expect_close("y", t.y, twin.y.values(), kBound<T>, where);
  // d_o is a difference of two terms of one size, which cancel where V is 1: the bound is of the
  // first.
  std::vector<double> terms;
  for (int64_t r = 0; r < c.R; ++r) {
    double sum = 0;
    for (int64_t v = 0; v < c.V; ++v) sum += twin.o.at(r, v) * twin.o.at(r, v);
    const double inverse = 1 / std::sqrt(sum / static_cast<double>(c.V) + 1e-6);
    for (int64_t v = 0; v < c.V; ++v) {
      const double g = c.gate ? twin.gate.at(r, v) : 0;
      const double silu = c.gate ? g / (1 + std::exp(-g)) : 1;
      terms.push_back(twin.dy.at(r, v) * twin.weight.at(v) * silu * inverse);
    }
  }
  expect_close("d_o", t.d_o, twin.d_o.values(), 2 * kBound<T>, where, terms);
  if (c.gate) expect_close("d_gate", t.d_gate, twin.d_gate.values(), kBound<T>, where);
  // Each column cancels as its numbers fall: the bound is of the largest of them.
  expect_close("d_weight", t.d_weight, twin.d_weight.values(), 4 * kBound<T>, where);
}

TEST(CudaLayerEmulation, GatedNormOverShapes) {
  uint64_t seed = 1;
  for (int64_t R : {1, 2, 7, 8, 9, 65, 200}) {
    for (int64_t V : {1, 5, 31, 32, 33, 100, 256}) {
      for (const Layout layout : {Layout::dense, Layout::transposed, Layout::mirrored}) {
        const NormCase c{R, V, ++seed % 3 != 0, layout};
        check_norm<float>(c, seed);
        check_norm<double>(c, seed);
        check_norm<BFloat16, float>(c, seed);
        check_norm<Float16>(c, seed);
      }
    }
  }
}

template <class T>
void check_unit_norm(int64_t R, int64_t K, QkNorm kind, Layout layout, uint64_t seed) {
  using S = Computed<T>;
  const NormCase c{R, K, false, layout};
  NormTensors<T> t(c, seed), other(c, seed);
  NormTensors<double> twin({R, K, false, Layout::dense}, seed);
  twin.take(t);
  for (NormTensors<T>* one : {&t, &other}) {
    // A row of zeros, which has no direction.
    for (int64_t c0 = 0; c0 < K; ++c0) one->o.at(R - 1, c0) = T(0.0f);
    const UnitNormInputs inputs{.x = one->o.view(), .kind = kind};
    cuda::NormJob forward = cuda::norm_job(inputs), backward = forward;
    forward.y = cuda::array_of(one->y.view());
    backward.dy = cuda::array_of(one->dy.view()), backward.d_o = cuda::array_of(one->d_o.view());
    const bool backwards = one == &other;
    cuda::HostGroup<cuda::NormRegisters<S>> group(cuda::kNormThreads, backwards);
    for_threads((R + cuda::kNormRows - 1) / cuda::kNormRows, backwards, [&](int64_t block) {
      cuda::run_unit_norm<S>(group, forward, block);
      cuda::run_unit_norm<S>(group, backward, block);
    });
  }
  for (int64_t c0 = 0; c0 < K; ++c0) twin.o.at(R - 1, c0) = 0;
  const UnitNormInputs inputs{.x = twin.o.view(), .kind = kind};
  cpu::unit_norm_forward(inputs, twin.y.view(), default_executor());
  cpu::unit_norm_backward(inputs, twin.dy.view(), twin.d_o.view(), default_executor());
  const std::string where =
      "emulated CUDA unit_norm R=" + std::to_string(R) + " K=" + std::to_string(K) +
      " fla=" + std::to_string(kind == QkNorm::fla) + " layout=" + name(layout) +
      " seed=" + std::to_string(seed) + " " + name(DTypeOf<T>::value);
  expect_same_bits("y", t.y, other.y, where);
  expect_same_bits("dx", t.d_o, other.d_o, where);
  expect_close("y", t.y, twin.y.values(), kBound<T>, where);
  // dx is what is left of dy / s without its part along x: all but nothing where K is 1.
  std::vector<double> terms;
  for (int64_t r = 0; r < R; ++r) {
    double sum = 0;
    for (int64_t c0 = 0; c0 < K; ++c0) sum += twin.o.at(r, c0) * twin.o.at(r, c0);
    const double s = kind == QkNorm::fla ? std::sqrt(sum + 1e-6) : std::sqrt(sum) + 1e-6;
    for (int64_t c0 = 0; c0 < K; ++c0) terms.push_back(twin.dy.at(r, c0) / s);
  }
  expect_close("dx", t.d_o, twin.d_o.values(), 2 * kBound<T>, where, terms);
}

TEST(CudaLayerEmulation, UnitNormOverShapes) {
  uint64_t seed = 1;
  for (int64_t R : {1, 2, 8, 9, 65}) {
    for (int64_t K : {1, 5, 32, 33, 128, 256}) {
      for (const Layout layout : {Layout::dense, Layout::transposed, Layout::mirrored}) {
        const QkNorm kind = ++seed % 2 == 0 ? QkNorm::official : QkNorm::fla;
        check_unit_norm<float>(R, K, kind, layout, seed);
        check_unit_norm<double>(R, K, kind, layout, seed);
        check_unit_norm<BFloat16>(R, K, kind, layout, seed);
      }
    }
  }
}

}  // namespace
}  // namespace kalmanet::testing
