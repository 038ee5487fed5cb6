// The CUDA backend's backward on a GPU, through the library's front door, against the float64
// oracle. Where there is no GPU every test here is skipped and says so.
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "cuda/backward_job.hpp"
#include "cuda/device_case.hpp"
#include "cuda/gka_cases.hpp"
#include "cuda/gpu_fixture.hpp"

namespace kalmanet::testing {
namespace {

using CudaGpuBackward = CudaGpu;

WorstErrors worst;

template <class T, class G>
GkaReport run(Case<T, G>& c, GkaOptions options) {
  options.backend = Backend::cuda;
  DeviceCase<T, G> on_gpu(c);
  const GkaReport report =
      gka_backward(on_gpu.inputs(), {}, on_gpu.output_grads(), on_gpu.grads(), options);
  on_gpu.download();
  return report;
}

template <class T, class G = T>
void check(const CaseSpec& spec, GkaOptions options, bool by_chunks = false) {
  options.ridge_ratio = spec.ridge_ratio;
  Case<T, G> c(spec), again(spec);
  const Where where{"gka_backward", "cuda",
                    describe(spec) + ", " + name(options.solver) + ", " + name(DTypeOf<T>::value)};
  const GkaReport report = run(c, options);
  EXPECT_EQ(report.backend, Backend::cuda);
  run(again, options);
  for_each_gradient(c, again, [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b)) << "another run gives other bits";
  });
  EXPECT_TRUE(c.gaps_intact()) << text(where, "gaps");
  // On matrix units half a bfloat16's rounding more.
  const bool chunks = report.chunk_size == 64;
  EXPECT_TRUE(chunks || !by_chunks) << text(where, "not on matrix units");
  WorstErrors apart;
  expect_oracle_gradients(c, options, where, chunks ? apart : worst, chunks ? 1e-3 : 0);
}

TEST_F(CudaGpuBackward, MatchesTheOracleOverShapes) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (int64_t T : {1, 15, 64, 65, 150}) {
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
        if (T <= 65) check<double>(spec, options);
      }
    }
  }
  worst.print("worst gradients over shapes");
}

TEST_F(CudaGpuBackward, MatchesTheOracleForEveryCombinationOfGates) {
  for (int gates = 0; gates < 64; ++gates) {
    CaseSpec spec = small_case(gates);
    spec.T = 37, spec.K = 20, spec.V = 12;
    spec.g = gates & 1, spec.gk = gates & 2, spec.alpha = gates & 4, spec.beta = gates & 8;
    spec.ridge_tensor = gates & 16;
    spec.same_gate = (gates & 32) && spec.g && spec.gk;
    GkaOptions options;
    options.bp_lambda = gates % 3 != 0;
    if (gates % 5 == 0) options.num_iter = kAutoNumIter, options.chunk_size = 1;
    check<float>(spec, options);
    check<BFloat16>(spec, options);
  }
}

TEST_F(CudaGpuBackward, CutsLongSequences) {
  for (int turn = 0; turn < 4; ++turn) {
    CaseSpec spec = small_case(turn);
    spec.T = 3 * kSegmentTokens + 5;
    spec.K = turn % 2 == 0 ? 64 : 128, spec.V = turn == 2 ? 70 : spec.K;
    check<float>(spec, {});
    check<BFloat16, float>(spec, {});
  }
}

TEST_F(CudaGpuBackward, MatrixUnitsMatchTheOracle) {
  int turn = 0;
  for (double ridge : {0.02, 0.1, 0.005, 0.001}) {
    for (int64_t T : {1, 63, 64, 130, 3 * 512 + 70}) {
      CaseSpec spec = small_case(turn++);
      spec.T = T, spec.K = spec.V = 128, spec.strided = false, spec.ridge_ratio = ridge;
      spec.memory = turn % 3 == 0 ? 20 : 200;
      Case<BFloat16, float> c(spec), again(spec);
      const Where where{"gka_backward by chunks", "cuda", describe(spec)};
      EXPECT_EQ(run(c, {}).chunk_size, 64);
      run(again, {});
      for_each_gradient(c, again, [&](const char* tensor, ConstView a, ConstView b) {
        EXPECT_TRUE(identical(where, tensor, a, b)) << "another run gives other bits";
      });
      EXPECT_TRUE(c.gaps_intact()) << text(where, "gaps");
      WorstErrors errors;
      expect_oracle_gradients(c, {}, where, errors, 2e-3);
      errors.print(describe(spec).c_str());
    }
  }
  CaseSpec packed = small_case(2);
  packed.K = packed.V = 128, packed.lengths = {0, 70, 1, 600, 130}, packed.strided = false;
  packed.Hq = packed.Hk = packed.Hv = 1;
  check<BFloat16>(packed, {});
  GkaOptions direct;
  direct.solver = Solver::direct;
  check<BFloat16, float>(packed, direct);
  packed.memory = 0.3;  // forgets more in a chunk than float32 can hold: left to the token kernel
  check<BFloat16, float>(packed, {});
}

// Fewer dims than 128, rows with gaps, and float16 (cuda/any_rows.hpp).
template <class T>
void check_any_rows(Solver solver) {
  GkaOptions options;
  options.solver = solver;
  int turn = 0;
  for (const auto& [K, V] : std::vector<std::array<int64_t, 2>>{
           {64, 64}, {96, 64}, {128, 72}, {80, 80}, {72, 128}, {112, 112}, {8, 16}, {128, 128}}) {
    for (int64_t tokens : std::vector<int64_t>{1, 70, cuda::kBackwardTokens + 70}) {
      CaseSpec spec = small_case(turn++);
      spec.K = K, spec.V = V, spec.T = tokens, spec.strided = false;
      spec.row_gap = turn % 2 == 0 ? 8 : 0;
      spec.memory = turn % 3 == 0 ? 20 : 200;
      check<T, float>(spec, options, true);
    }
    CaseSpec packed = small_case(turn++);
    packed.K = K, packed.V = V, packed.strided = false, packed.row_gap = 16;
    packed.lengths = {0, 70, 1, 270, 0, 17};
    check<T>(packed, options, true);
  }
}
TEST_F(CudaGpuBackward, MatrixUnitsForFewerDims) {
  check_any_rows<BFloat16>(Solver::chebyshev);
}
TEST_F(CudaGpuBackward, DirectOnMatrixUnitsForFewerDims) {
  check_any_rows<BFloat16>(Solver::direct);
}
TEST_F(CudaGpuBackward, DirectOnMatrixUnitsForFloat16) {
  check_any_rows<Float16>(Solver::direct);
}

TEST_F(CudaGpuBackward, ShortMemoriesMatchTheOracle) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (double ridge : {0.1, 0.02, 0.005, 0.001}) {
      for (double memory : {3.0, 1.5, 0.6}) {
        CaseSpec spec = small_case(3);
        spec.K = spec.V = 128, spec.strided = false, spec.Hv = 0;
        spec.g = spec.gk = spec.same_gate = spec.alpha = spec.beta = true;
        spec.h0 = spec.u0 = false;
        spec.B = 1, spec.T = turn % 2 == 0 ? 130 : kSegmentTokens + 70,
        spec.seed = 6000 + static_cast<uint64_t>(turn);
        spec.ridge_ratio = ridge, spec.memory = memory;
        spec.memory_ratio = turn % 3 == 0 ? 20 : 1;
        spec.key_correlation = turn++ % 4 < 2 ? 0.0 : 0.9;
        GkaOptions options;
        options.solver = solver, options.ridge_ratio = ridge;
        check<BFloat16, float>(spec, options);
        if (turn % 6 != 0) continue;
        spec.ridge_tensor = true, spec.Hk = 1;
        spec.lengths = {0, 1, 70, 1, 600, 130};
        check<BFloat16>(spec, options);
      }
    }
  }
}

// One short case, for tools that watch every access.
TEST_F(CudaGpuBackward, MatrixUnitsShortly) {
  CaseSpec spec = small_case(0);
  spec.B = 1, spec.H = 1, spec.Hq = spec.Hk = spec.Hv = 0, spec.strided = false;
  spec.T = cuda::kBackwardTokens + 70, spec.K = spec.V = 128;
  GkaOptions direct;
  direct.solver = Solver::direct;
  check<BFloat16, float>(spec, direct);
}

TEST_F(CudaGpuBackward, PackedSequences) {
  int turn = 0;
  for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{
           {0}, {1}, {0, 1, 0, 17, 1, 64, 0}, {16, kSegmentTokens + 1, 1, 0, 33}}) {
    CaseSpec spec = small_case(turn++);
    spec.lengths = lengths;
    spec.K = 60, spec.V = 33;
    check<float>(spec, {});
    check<BFloat16>(spec, {});
  }
}

// The same sequence alone, and as one of a batch in another place: the same bits.
template <class T>
void check_neighbours(CaseSpec spec) {
  spec.B = 3;
  Case<T, float> all(spec);
  run(all, {});
  spec.B = 1;
  Case<T, float> one(spec);
  const auto take = [](auto& to, const auto& from) {
    if (!to.defined()) return;
    const std::vector<double> values = from.values();
    to.assign(std::span(values).last(static_cast<size_t>(to.view().numel())));
  };
  take(one.q, all.q), take(one.k, all.k), take(one.v, all.v), take(one.g, all.g);
  take(one.gk, all.gk), take(one.alpha, all.alpha), take(one.beta, all.beta);
  take(one.ridge_ratio, all.ridge_ratio), take(one.h0, all.h0), take(one.u0, all.u0);
  take(one.d_o, all.d_o), take(one.d_h_final, all.d_h_final), take(one.d_u_final, all.d_u_final);
  run(one, {});
  for_each_gradient(one, all, [&](const char* tensor, ConstView got, ConstView batch) {
    const std::vector<double> a = values(got), b = values(batch);
    const size_t from = b.size() - a.size();
    for (size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i], b[from + i]) << tensor << ' ' << i;
  });
}

TEST_F(CudaGpuBackward, NoGradientDependsOnItsNeighbours) {
  for (int turn : {0, 1}) {
    CaseSpec spec = small_case(turn);
    spec.T = kSegmentTokens + 50, spec.K = 64, spec.V = 64;
    check_neighbours<float>(spec);
    spec.K = spec.V = 128, spec.strided = false;
    check_neighbours<BFloat16>(spec);
  }
}

TEST_F(CudaGpuBackward, TheWorkspaceQuery) {
  GkaOptions options;
  options.backend = Backend::cuda;
  GkaShape shape;
  shape.B = 1, shape.T = 8192, shape.H = 32, shape.K = shape.V = 128;
  const int64_t bytes = gka_workspace_bytes(GkaOperation::backward, shape, options);
  EXPECT_GT(bytes, 0);
  std::printf("backward's workspace at B1 T8192 H32 K128: %.0f MiB\n",
              static_cast<double>(bytes) / (1 << 20));
}

}  // namespace
}  // namespace kalmanet::testing
