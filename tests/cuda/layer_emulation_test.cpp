// The bodies of the convolution's CUDA kernels, run by the CPU with the GPU's index arithmetic:
// against the convolution's float64 twin; and in the other order of threads, bit for bit.
#include "cuda/layer_emulation.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cpu/conv_cases.hpp"
#include "cuda/conv_vectors.hpp"
#include "cuda/layer_plan.hpp"

namespace kalmanet::testing {
namespace {

// The blocks of conv_vectors.hpp; the number of the weight gradient's parts.
template <DType kType>
int64_t emulate_conv_vectors(const cuda::ConvJob& job, bool backward, bool backwards) {
  const int64_t width =
      32 * (backward ? cuda::kConvChannels<kType, true> : cuda::kConvChannels<kType, false>);
  const int64_t spans = (job.num_spans + cuda::kConvSpans - 1) / cuda::kConvSpans;
  const int64_t channels = (job.D + width - 1) / width;
  for_threads(spans * channels, backwards, [&](int64_t block) {
    if (!backward) {
      for_threads(cuda::kConvThreads, backwards, [&](int64_t thread) {
        cuda::run_conv_vectors<kType>(job, block / channels, block % channels,
                                      static_cast<int>(thread));
      });
      return;
    }
    constexpr int kCount = cuda::kConvChannels<kType, true>;
    cuda::HostGroup<cuda::ConvRegisters<kCount>> group(cuda::kConvThreads, backwards);
    cuda::ConvShared<kCount> shared;
    std::fill_n(&shared.part[0][0][0], sizeof(shared) / sizeof(float), NAN);
    cuda::run_conv_vectors_backward<kType>(group, shared, job, block / channels, block % channels);
  });
  return spans;
}

template <class T, class W>
void emulate_conv(const conv::Case& c, conv::TensorsOf<T, W>& t, bool backwards,
                  int64_t span_tokens = 32) {
  using S = Computed<T>;
  ConvInputs inputs = t.inputs();
  std::vector<int64_t> offsets = {0};
  for (int64_t n : c.lengths) offsets.push_back(offsets.back() + n);
  if (!c.lengths.empty()) inputs.cu_seqlens = offsets;
  for (const bool backward : {false, true}) {
    std::vector<cuda::ConvSpan> spans;
    const bool vectors =
        backward ? cuda::fits_conv_vectors(inputs, {std::as_const(t.dy).view(), t.dx.view()})
                 : cuda::fits_conv_vectors(inputs, {t.y.view()});
    EXPECT_EQ(vectors, is_aligned<T>(c.D, c.layout) && c.W == 4) << c.text();
    int64_t tokens = backward ? cuda::kConvBackwardTokens : cuda::kConvForwardTokens;
    if (vectors) tokens = span_tokens;
    cuda::ConvJob job = cuda::conv_job(inputs, c.sequences(), tokens, c.silu, spans);
    job.vectors = vectors;
    if (!spans.empty()) job.spans = spans.data();
    std::vector<double> parts(static_cast<size_t>(job.num_spans * c.D * c.W), NAN);
    if (backward) {
      job.dy = cuda::array_of(t.dy.view()), job.d_final = cuda::array_of(t.d_final_state.view());
      job.dx = cuda::array_of(t.dx.view()), job.dstate = cuda::array_of(t.dstate.view());
      job.parts = parts.data();
    } else {
      job.y = cuda::array_of(t.y.view()), job.final_state = cuda::array_of(t.final_state.view());
    }
    int64_t num_parts = job.num_spans;
    if constexpr (!std::is_same_v<T, double>) {
      if (vectors) {
        num_parts = emulate_conv_vectors<DTypeOf<T>::value>(job, backward, backwards);
        if (backward) emulate_sums(t.dweight.view(), c.W, parts, num_parts, c.D * c.W);
        continue;
      }
    }
    for_threads(job.num_spans * c.D, backwards,
                [&](int64_t i) { cuda::run_conv<S>(job, i / c.D, i % c.D, backward); });
    if (backward) emulate_sums(t.dweight.view(), c.W, parts, num_parts, c.D * c.W);
  }
}

template <class T, class W>
void check_conv_dtype(const conv::Case& c, int64_t span_tokens = 32) {
  conv::TensorsOf<T, W> t(c), other(c);
  conv::Twin twin(c, t);
  twin.forward();
  twin.backward();
  emulate_conv(c, t, false, span_tokens);
  emulate_conv(c, other, true, span_tokens);
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

// Channels side by side, 16 bytes at a time; more of them than a block has threads for.
TEST(CudaLayerEmulation, ConvolutionOfAlignedRows) {
  uint64_t seed = 100;
  for (int64_t D : {8, 40, 264}) {
    for (int64_t T : {0, 1, 2, 3, 4, 31, 32, 33, 34, 35, 36, 65, 130}) {
      if (D == 264 && T % 2 == 0) continue;
      ++seed;
      check_conv({T < 10 ? 3 : 2, T, D, 4, {}, seed % 3 != 0, seed % 2 != 0, Layout::dense, seed});
    }
  }
}

// Spans as long as the plan makes them, and how long that is.
TEST(CudaLayerEmulation, SpansOfAlignedRows) {
  for (const int64_t tokens : {16, 64, 128}) {
    check_conv_dtype<BFloat16, float>({2, 203, 24, 4, {}, true, true}, tokens);
    check_conv_dtype<float, float>({1, 260, 8, 4, {3, 130, 0, 127}, true, true}, tokens);
  }
  const auto tokens = [](int64_t B, int64_t T, int64_t D, int64_t channels) {
    ConvInputs in;
    in.x.rank = 3;
    in.x.size = {B, T, D};
    return cuda::conv_vector_tokens(in, channels);
  };
  EXPECT_EQ(tokens(1, 8192, 4096, 8), 64);
  EXPECT_EQ(tokens(1, 8192, 4096, 4), 128);
  EXPECT_EQ(tokens(1, 2048, 4096, 8), 16);
  EXPECT_EQ(tokens(8, 2048, 4096, 8), 128);
  EXPECT_EQ(tokens(1, 1, 8, 8), 16);
}

TEST(CudaLayerEmulation, ConvolutionOfPackedSequences) {
  check_conv({1, 104, 16, 4, {3, 0, 1, 64, 0, 33, 2, 1}, true, true});
  check_conv({1, 104, 16, 4, {3, 0, 1, 64, 0, 33, 2, 1}, false, false});
  for (int64_t W : {1, 4, 7, 16}) {
    check_conv({1, 104, 5, W, {3, 0, 1, 64, 0, 33, 2, 1}, true, true});
    check_conv({1, 3, 2, W, {0, 3}, false, true});
  }
}

// More parts than one thread adds, twice over.
TEST(CudaLayerEmulation, SumsOfManyParts) {
  check_conv({1, 33 * cuda::kPartsAThread * cuda::kConvBackwardTokens, 1, 2, {}, true, false});
  const int64_t tokens = 32 * cuda::kConvSpans;
  check_conv_dtype<float, float>({1, 33 * cuda::kPartsAThread * tokens, 8, 4, {}, true, false});
}

// In vectors, too, a NaN stays where its window is.
TEST(CudaLayerEmulation, AnAlignedWindowEndsWhereItsTapsDo) {
  conv::Case c{1, 70, 8, 4, {}, true, false};
  conv::Tensors t(c);
  t.x.at(0, 5, 3) = NAN;
  t.dy.at(0, 33, 3) = NAN;
  emulate_conv(c, t, false);
  for (int64_t i = 0; i < c.T; ++i) {
    for (int64_t d = 0; d < c.D; ++d) {
      EXPECT_EQ(std::isnan(t.y.at(0, i, d)), d == 3 && i >= 5 && i < 9) << i << ", " << d;
      EXPECT_EQ(std::isnan(t.dx.at(0, i, d)), d == 3 && ((i >= 2 && i < 9) || (i >= 30 && i <= 33)))
          << "dx, token " << i << ", channel " << d;
    }
  }
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
    conv::Case c{2, T, 4, 4, {}};
    conv::Tensors t(c), aligned(c);
    conv::Twin twin(c, t);
    twin.forward();
    std::vector<cuda::ConvSpan> spans;
    cuda::ConvJob vectors = cuda::conv_job(aligned.inputs(), c.sequences(), 32, true, spans);
    vectors.y = cuda::array_of(aligned.y.view());
    vectors.final_state = vectors.state;
    emulate_conv_vectors<DType::float32>(vectors, false, false);
    expect_close("y", aligned.y, twin.y, kBound<float>, "aligned, in place, " + c.text());
    expect_close("state", aligned.state, twin.final_state, 0.0, "aligned, in place, " + c.text());
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

}  // namespace
}  // namespace kalmanet::testing
