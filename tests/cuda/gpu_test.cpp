// The CUDA backend on a GPU, through the library's front door, against the float64 oracle. Where
// there is no GPU every test here is skipped and says so.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <vector>

#include "cuda/device_case.hpp"
#include "cuda/gka_cases.hpp"
#include "cuda/gpu_fixture.hpp"
#include "cuda/job.hpp"
#include "support/message_of.hpp"

namespace kalmanet::testing {
namespace {

template <class T, class G>
GkaReport run(Case<T, G>& c, GkaOptions options, bool step) {
  options.backend = Backend::cuda;
  DeviceCase<T, G> on_gpu(c);
  const GkaReport report = step ? gka_step(on_gpu.inputs(), on_gpu.outputs(), options)
                                : gka_forward(on_gpu.inputs(), on_gpu.outputs(), options);
  on_gpu.download();
  return report;
}

template <class T, class G = T>
void check(const CaseSpec& spec, const GkaOptions& options, bool step = false) {
  Case<T, G> c(spec), again(spec);
  const Where where{step ? "gka_step" : "gka_forward", "cuda",
                    describe(spec) + ", " + name(options.solver) + ", " + name(DTypeOf<T>::value)};
  EXPECT_EQ(run(c, options, step).backend, Backend::cuda);
  run(again, options, step);
  for_each_output(c, again, [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b)) << "another run gives other bits";
  });
  EXPECT_TRUE(c.gaps_intact()) << text(where, "gaps");
  expect_oracle(c, options, where);
}

TEST_F(CudaGpu, MatchesTheOracleOverShapes) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (int64_t T : {1, 2, 63, 64, 65, 300}) {
      for (int64_t K : {1, 5, 60, 64, 100, 128, 200, 256}) {
        GkaOptions options;
        options.solver = solver;
        CaseSpec spec = small_case(turn++);
        spec.T = T, spec.K = K;
        spec.V = K == 128 || K == 64 ? K : (K * 7) % 97 + 3;
        if (K == 256) spec.V = 256;
        check<float>(spec, options);
        check<BFloat16, float>(spec, options);
        check<Float16>(spec, options);
        check<double>(spec, options);
      }
    }
  }
}

TEST_F(CudaGpu, MatchesTheOracleForEveryCombinationOfGates) {
  for (int gates = 0; gates < 64; ++gates) {
    CaseSpec spec = small_case(gates);
    spec.T = 37, spec.K = 20, spec.V = 12;
    spec.g = gates & 1, spec.gk = gates & 2, spec.alpha = gates & 4, spec.beta = gates & 8;
    spec.ridge_tensor = gates & 16;
    spec.same_gate = (gates & 32) && spec.g && spec.gk;
    check<float>(spec, {});
    check<BFloat16>(spec, {}, gates % 2 == 0);
  }
}

TEST_F(CudaGpu, CutsLongSequences) {
  for (int turn = 0; turn < 4; ++turn) {
    CaseSpec spec = small_case(turn);
    spec.T = 3 * kSegmentTokens + 5;
    spec.K = turn % 2 == 0 ? 64 : 128, spec.V = turn == 2 ? 70 : spec.K;
    check<float>(spec, {});
    check<BFloat16, float>(spec, {});
  }
}

TEST_F(CudaGpu, PackedSequences) {
  int turn = 0;
  for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{
           {0}, {1}, {0, 1, 0, 17, 1, 64, 0}, {16, kSegmentTokens + 1, 1, 0, 33}}) {
    CaseSpec spec = small_case(turn++);
    spec.lengths = lengths;
    spec.K = 60, spec.V = 33;
    check<float>(spec, {});
    check<BFloat16>(spec, {}, true);
  }
}

// The same sequence alone, and as one of a batch in another place: the same bits.
TEST_F(CudaGpu, NoAnswerDependsOnItsNeighbours) {
  CaseSpec spec = small_case(0);
  spec.B = 3, spec.T = kSegmentTokens + 50, spec.K = 64, spec.V = 64;
  Case<float> all(spec);
  run(all, {}, false);
  spec.B = 1;
  Case<float> one(spec);
  const auto take = [](Tensor<float>& to, const Tensor<float>& from) {
    if (!to.defined()) return;
    const std::vector<double> values = from.values();
    to.assign(std::span(values).last(static_cast<size_t>(to.view().numel())));
  };
  take(one.q, all.q), take(one.k, all.k), take(one.v, all.v), take(one.g, all.g);
  take(one.gk, all.gk), take(one.alpha, all.alpha), take(one.beta, all.beta);
  take(one.ridge_ratio, all.ridge_ratio), take(one.h0, all.h0), take(one.u0, all.u0);
  run(one, {}, false);
  const std::vector<double> got = one.o.values(), batch = all.o.values();
  const size_t from = batch.size() - got.size();
  for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], batch[from + i]) << "element " << i;
}

// The forward on matrix units against the oracle and against its twin, the token kernel (which runs
// where x is asked for).
template <class G, class T = BFloat16>
void check_chunks(const CaseSpec& spec, GkaOptions options, double bound) {
  options.backend = Backend::cuda;
  options.ridge_ratio = spec.ridge_ratio;
  Case<T, G> c(spec), again(spec), twin(spec);
  for (Case<T, G>* to : {&c, &again}) {
    DeviceCase<T, G> on_gpu(*to);
    GkaOutputs outputs = on_gpu.outputs();
    outputs.x = outputs.residual = View();
    const int64_t chunk = 64;
    EXPECT_EQ(gka_forward(on_gpu.inputs(), outputs, options).chunk_size, chunk) << describe(spec);
    on_gpu.download();
  }
  GkaOptions standard = options;
  standard.arithmetic = Arithmetic::standard;
  EXPECT_EQ(run(twin, standard, false).chunk_size, 1);
  const Where where{"gka_forward by chunks", name(DTypeOf<T>::value), describe(spec)};
  for_each_output(c, again, [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b)) << "another run gives other bits";
  });
  EXPECT_TRUE(c.gaps_intact()) << text(where, "gaps");
  Case<double> d = to_double(c);
  d.clear_results();
  options.backend = Backend::reference;
  options.arithmetic = Arithmetic::standard;
  gka_forward(d.inputs(), d.outputs(), options);
  const double alone = relative_error(twin.o.view(), d.o.view());
  const double error = relative_error(c.o.view(), d.o.view());
  std::printf("%s %s: o %.2e, its twin %.2e, h_final %.1e\n", name(DTypeOf<T>::value),
              describe(spec).c_str(), error, alone,
              relative_error(c.h_final.view(), d.h_final.view()));
  EXPECT_TRUE(within(where, "o", c.o.view(), d.o.view(), bound));
  EXPECT_TRUE(within(where, "h_final", c.h_final.view(), d.h_final.view(), 2e-5));
  EXPECT_TRUE(within(where, "u_final", c.u_final.view(), d.u_final.view(), 2e-5));
}

TEST_F(CudaGpu, DirectOnMatrixUnitsMatchesTheOracleAndTheTokenKernel) {
  GkaOptions direct;
  direct.solver = Solver::direct;
  int turn = 0;
  for (double ridge : {0.1, 0.02, 0.005, 0.001}) {
    for (double memory : {20.0, 200.0, 5000.0}) {
      for (int64_t T : {1, 33, 130, 512 + 70}) {
        CaseSpec spec = small_case(turn++);
        spec.T = T, spec.K = spec.V = 128, spec.strided = false, spec.ridge_ratio = ridge;
        spec.B = 1, spec.memory = memory;
        spec.key_correlation = turn % 2 == 0 ? 0.0 : 0.9;
        check_chunks<float>(spec, direct, 2 * 1.7e-3);
      }
    }
  }
  CaseSpec packed = small_case(2);
  packed.K = packed.V = 128, packed.lengths = {0, 70, 1, 600, 130};
  check_chunks<BFloat16>(packed, direct, 2 * 1.7e-3);
  packed.memory = 3;  // shorter chunks
  check_chunks<float>(packed, direct, 2 * 1.7e-3);
}

// Fewer dims than 128, rows with gaps, and float16 (cuda/any_rows.hpp).
template <class T>
void check_any_rows(Solver solver, double bound) {
  GkaOptions options;
  options.solver = solver;
  int turn = 0;
  for (const auto& [K, V] : std::vector<std::array<int64_t, 2>>{
           {64, 64}, {96, 64}, {128, 72}, {80, 80}, {72, 128}, {112, 112}, {8, 16}, {128, 128}}) {
    for (int64_t tokens : {1, 70, 512 + 70}) {
      CaseSpec spec = small_case(turn++);
      spec.K = K, spec.V = V, spec.T = tokens, spec.strided = false;
      spec.row_gap = turn % 2 == 0 ? 8 : 0;
      spec.memory = turn % 3 == 0 ? 20 : 200;
      check_chunks<float, T>(spec, options, bound);
    }
    CaseSpec packed = small_case(turn++);
    packed.K = K, packed.V = V, packed.strided = false, packed.row_gap = 16;
    packed.lengths = {0, 70, 1, 530, 0, 130};
    check_chunks<T, T>(packed, options, bound);
  }
}
TEST_F(CudaGpu, MatrixUnitsForFewerDims) {
  check_any_rows<BFloat16>(Solver::chebyshev, 2 * 1.7e-3);
}
TEST_F(CudaGpu, DirectOnMatrixUnitsForFewerDims) {
  check_any_rows<BFloat16>(Solver::direct, 2 * 1.7e-3);
}
TEST_F(CudaGpu, DirectOnMatrixUnitsForFloat16) {
  check_any_rows<Float16>(Solver::direct, 8e-4);
}

// One short case of each kernel, for tools that watch every access.
TEST_F(CudaGpu, MatrixUnitsShortly) {
  CaseSpec spec = small_case(0);
  spec.B = 1, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0, spec.strided = false;
  spec.T = 130, spec.K = spec.V = 128;
  GkaOptions direct;
  direct.solver = Solver::direct;
  check_chunks<float>(spec, direct, 2 * 1.7e-3);
  check_chunks<float>(spec, {}, 2 * 1.7e-3);
}

// Heads of a memory of a few tokens, all of them and beside others.
TEST_F(CudaGpu, ShortMemoriesMatchTheOracleAndTheTokenKernel) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (double ridge : {0.1, 0.02, 0.005, 0.001}) {
      for (double memory : {3.0, 1.5, 0.6}) {
        CaseSpec spec = small_case(3);
        spec.K = spec.V = 128, spec.strided = false, spec.Hv = 0;
        spec.g = spec.gk = spec.same_gate = spec.alpha = spec.beta = true;
        spec.h0 = spec.u0 = false;
        spec.B = 1, spec.T = turn % 2 == 0 ? 130 : 512 + 70,
        spec.seed = 5000 + static_cast<uint64_t>(turn);
        spec.ridge_ratio = ridge, spec.memory = memory;
        spec.memory_ratio = turn % 3 == 0 ? 20 : 1;
        spec.key_correlation = turn++ % 4 < 2 ? 0.0 : 0.9;
        GkaOptions options;
        options.solver = solver, options.ridge_ratio = ridge;
        check_chunks<float>(spec, options, 2 * 1.7e-3);
        if (turn % 6 != 0) continue;
        spec.ridge_tensor = true;
        spec.lengths = {0, 1, 70, 1, 600, 130};
        check_chunks<BFloat16>(spec, options, 2 * 1.7e-3);
      }
    }
  }
}

// A piece that a matrix-unit kernel gives up is the token kernel's, which answers as well and takes
// dozens of times as long: an error that sets it off would not show in any answer.
template <class T>
void check_not_left_over(int64_t K, int64_t V,
                         const std::vector<std::pair<Solver, double>>& cases) {  // memories
  CaseSpec spec = small_case(3);
  spec.B = 1, spec.T = 4096, spec.H = 16, spec.Hq = spec.Hk = spec.Hv = 0, spec.K = K, spec.V = V;
  spec.strided = false, spec.g = spec.gk = spec.same_gate = true;
  spec.alpha = spec.beta = spec.h0 = spec.u0 = false;
  spec.ridge_ratio = 0.02;
  for (const auto& [solver, memory] : cases) {
    spec.memory = memory;
    GkaOptions options;
    options.backend = Backend::cuda;
    options.solver = solver;
    Case<T, float> c(spec);
    DeviceCase<T, float> on_gpu(c);
    const auto median = [&](bool by_tokens) {
      GkaOutputs outputs = on_gpu.outputs();
      outputs.residual = View();
      if (!by_tokens) outputs.x = View();
      std::array<double, 4> seconds{};
      for (double& e : seconds) {
        const auto start = std::chrono::steady_clock::now();
        gka_forward(on_gpu.inputs(), outputs, options);
        float last = 0;  // (waits)
        cuda::copy_to_host(&last, outputs.o.data, sizeof last, nullptr);
        e = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      }
      std::sort(seconds.begin() + 1, seconds.end());  // (the first has code to load)
      return seconds[2];
    };
    const double tokens = median(true), chunks = median(false);
    std::printf("%s %s K=%lld V=%lld, memory %g: token kernel %.2f ms, chunks %.2f ms\n",
                name(solver), name(DTypeOf<T>::value), static_cast<long long>(K),
                static_cast<long long>(V), memory, 1e3 * tokens, 1e3 * chunks);
    EXPECT_LT(chunks, 0.5 * tokens) << name(solver) << " " << describe(spec);
  }
}
TEST_F(CudaGpu, OrdinaryPiecesAreNotLeftToTheTokenKernel) {
  const Solver chebyshev = Solver::chebyshev, direct = Solver::direct;
  check_not_left_over<BFloat16>(
      128, 128, {{chebyshev, 30.0}, {direct, 30.0}, {chebyshev, 0.5}, {direct, 2.0}});
  check_not_left_over<BFloat16>(64, 64, {{chebyshev, 30.0}, {direct, 30.0}});
  check_not_left_over<BFloat16>(96, 72, {{direct, 30.0}});
  check_not_left_over<Float16>(128, 128, {{direct, 30.0}});
  check_not_left_over<Float16>(64, 64, {{direct, 30.0}});
}

TEST_F(CudaGpu, MatrixUnitsMatchTheOracleAndTheTokenKernel) {
  int turn = 0;
  for (double ridge : {0.02, 0.1, 0.005, 0.001}) {
    for (int64_t T : {1, 63, 64, 130, 3 * 512 + 70}) {
      CaseSpec spec = small_case(turn++);
      spec.T = T, spec.K = spec.V = 128, spec.strided = false, spec.ridge_ratio = ridge;
      spec.memory = turn % 3 == 0 ? 20 : 200;
      check_chunks<float>(spec, {}, 2 * 1.7e-3);
    }
  }
  CaseSpec packed = small_case(2);
  packed.K = packed.V = 128, packed.lengths = {0, 70, 1, 600, 130};
  check_chunks<BFloat16>(packed, {}, 2 * 1.7e-3);
  packed.memory = 0.3;  // forgets more in a chunk than float32 can hold: left to the token kernel
  check_chunks<float>(packed, {}, 2 * 1.7e-3);
  packed.memory = 200;
  GkaOptions bf16;
  bf16.arithmetic = Arithmetic::bfloat16;
  check_chunks<float>(packed, bf16, 2.5e-2);
}

// A decode step that updates its states where they lie.
TEST_F(CudaGpu, StepUpdatesStatesInPlace) {
  for (int64_t K : {64, 128}) {
    CaseSpec spec = small_case(1);
    spec.B = 5, spec.T = 1, spec.K = spec.V = K;
    spec.strided = false;
    Case<BFloat16, float> c(spec), apart(spec);
    run(apart, {}, true);
    GkaOptions options;
    options.backend = Backend::cuda;
    DeviceCase<BFloat16, float> on_gpu(c);
    on_gpu.outputs().h_final.data = const_cast<void*>(on_gpu.inputs().h0.data);
    on_gpu.outputs().u_final.data = const_cast<void*>(on_gpu.inputs().u0.data);
    gka_step(on_gpu.inputs(), on_gpu.outputs(), options);
    on_gpu.download();
    const Where where{"gka_step in place", "cuda", describe(spec)};
    for_each_output(c, apart, [&](const char* tensor, ConstView a, ConstView b) {
      EXPECT_TRUE(identical(where, tensor, a, b));
    });
  }
}

TEST_F(CudaGpu, AnotherStreamAndTheWorkspaceQuery) {
  GkaOptions options;
  options.backend = Backend::cuda;
  GkaShape shape;
  shape.B = 2, shape.T = 2000, shape.H = 4, shape.K = shape.V = 128;
  EXPECT_GT(gka_workspace_bytes(GkaOperation::forward, shape, options),
            gka_workspace_bytes(GkaOperation::step, shape, options));
}

}  // namespace
}  // namespace kalmanet::testing
