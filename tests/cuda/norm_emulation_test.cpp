// The bodies of the norms' CUDA kernels, run by the CPU: against the CPU room's norms on the same
// numbers in float64; and in the other order of threads, bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/norm.hpp"
#include "cuda/layer_emulation.hpp"
#include "cuda/layer_plan.hpp"
#include "cuda/norm_vectors.hpp"

namespace kalmanet::testing {
namespace {

struct NormCase {
  int64_t R, V;
  bool gate;
  Layout layout;
};

template <class T, class W = T>
struct NormTensors {
  ArrayOf<T> o, gate, dy, y, d_o, d_gate;
  ArrayOf<W> weight, d_weight;
  Layout layout;

  NormTensors(const NormCase& c, uint64_t seed) : layout(c.layout) {
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

// Which sizes norm_vectors.hpp takes: 2^i vectors of 16 bytes, at most 32, or 64 of float32.
template <class T>
bool is_for_vectors(int64_t V, Layout layout) {
  const int64_t vectors = V / static_cast<int64_t>(16 / sizeof(T));
  return is_aligned<T>(V, layout) && (vectors & (vectors - 1)) == 0 &&
         vectors <= (sizeof(T) == 4 ? 64 : 32);
}

template <class T, class W>
void emulate_norm_by_vectors(NormTensors<T, W>& t, bool backwards) {
  cuda::NormJob forward = cuda::norm_job(t.inputs()), job = forward;
  forward.y = cuda::array_of(t.y.view());
  cuda::choose_norm_vectors(forward, {std::as_const(t.o).view(), t.inputs().gate, t.y.view()},
                            t.inputs().weight);
  emulate_norm_vectors<T>(forward, false, backwards);
  job.dy = cuda::array_of(t.dy.view());
  job.d_o = cuda::array_of(t.d_o.view()), job.d_gate = cuda::array_of(t.d_gate.view());
  cuda::choose_norm_vectors(
      job, {t.inputs().o, t.inputs().gate, t.dy.view(), t.d_o.view(), t.d_gate.view()},
      t.inputs().weight);
  const int64_t groups = (job.R + cuda::kNormVectorRows - 1) / cuda::kNormVectorRows;
  std::vector<double> parts(static_cast<size_t>(groups * job.V), NAN);
  job.parts = parts.data();
  emulate_norm_vectors<T>(job, true, backwards);
  emulate_sums(t.d_weight.view(), 1, parts, groups, job.V);
}

template <class T, class W>
void emulate_norm(NormTensors<T, W>& t, bool backwards) {
  using S = Computed<T>;
  cuda::NormJob job = cuda::norm_job(t.inputs());
  cuda::choose_norm_vectors(job, {t.inputs().o, t.inputs().gate, t.dy.view()}, t.inputs().weight);
  EXPECT_EQ(job.lanes != 0, is_for_vectors<T>(job.V, t.layout)) << "V " << job.V;
  if (job.lanes != 0) return emulate_norm_by_vectors(t, backwards);
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

TEST(CudaNormEmulation, GatedNormOfAlignedRows) {
  uint64_t seed = 1;
  for (int64_t R : {1, 7, 17, 255, 257, 600}) {
    for (int64_t V : {8, 16, 32, 64, 128, 256}) {
      const NormCase c{R, V, ++seed % 3 != 0, Layout::dense};
      check_norm<float>(c, seed);
      check_norm<BFloat16, float>(c, seed);
      check_norm<Float16>(c, seed);
    }
  }
}

TEST(CudaNormEmulation, GatedNormOverShapes) {
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
    const ConstView x = one->o.view(), dy = one->dy.view();
    cuda::choose_norm_vectors(forward, {x, one->y.view()}, {});
    cuda::choose_norm_vectors(backward, {x, dy, one->d_o.view()}, {});
    EXPECT_EQ(forward.lanes != 0, is_for_vectors<T>(K, layout)) << "K " << K;
    if (forward.lanes != 0) {
      emulate_norm_vectors<T>(forward, false, backwards);
      emulate_norm_vectors<T>(backward, true, backwards);
      continue;
    }
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

TEST(CudaNormEmulation, UnitNormOverShapes) {
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
