// The C ABI's questions give the answers of the C++ interface.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "api/c_call.hpp"
#include "kalmanet/kalmanet.hpp"

namespace kalmanet {
namespace {

using testing::fails;
using testing::ok;

TEST(CQuery, Versions) {
  EXPECT_EQ(kalmanet_abi_version(), KALMANET_ABI_VERSION);
  EXPECT_STREQ(kalmanet_version(), version());
}

TEST(CQuery, NamesAndSizes) {
  for (int32_t i = -1; i < 5; ++i) {
    EXPECT_STREQ(kalmanet_dtype_name(i), name(static_cast<DType>(i)));
    EXPECT_EQ(kalmanet_dtype_size(i), size_of(static_cast<DType>(i)));
    EXPECT_STREQ(kalmanet_backend_name(i), name(static_cast<Backend>(i)));
    EXPECT_STREQ(kalmanet_instruction_set_name(i), name(static_cast<InstructionSet>(i)));
  }
  EXPECT_STREQ(kalmanet_dtype_name(KALMANET_BFLOAT16), "bfloat16");
  EXPECT_STREQ(kalmanet_solver_name(KALMANET_SOLVER_CHEBYSHEV), "chebyshev");
  EXPECT_STREQ(kalmanet_solver_name(KALMANET_SOLVER_DIRECT), "direct");
  EXPECT_STREQ(kalmanet_solver_name(KALMANET_SOLVER_CG), "cg");
  EXPECT_STREQ(kalmanet_solver_name(KALMANET_SOLVER_AUTOMATIC), "auto");
  EXPECT_STREQ(kalmanet_solver_name(99), "unknown solver");
  EXPECT_STREQ(kalmanet_arithmetic_name(KALMANET_ARITHMETIC_STANDARD), "standard");
  EXPECT_STREQ(kalmanet_arithmetic_name(KALMANET_ARITHMETIC_BFLOAT16), "bfloat16");
  EXPECT_STREQ(kalmanet_arithmetic_name(2), "unknown arithmetic");
  const std::vector<std::string> statuses = {"KALMANET_OK",
                                             "KALMANET_INVALID_ARGUMENT",
                                             "KALMANET_INVALID_SHAPE",
                                             "KALMANET_INVALID_DTYPE",
                                             "KALMANET_UNSUPPORTED",
                                             "KALMANET_INVALID_DATA",
                                             "KALMANET_OUT_OF_MEMORY",
                                             "KALMANET_CALLBACK_FAILED",
                                             "KALMANET_INTERNAL",
                                             "unknown status"};
  for (size_t i = 0; i < statuses.size(); ++i) {
    EXPECT_EQ(kalmanet_status_name(static_cast<kalmanet_status>(i)), statuses[i]);
  }
}

TEST(CQuery, Backends) {
  const std::vector<BackendInfo> all = backends();
  int32_t count = 0;
  ASSERT_TRUE(ok(kalmanet_num_backends(&count)));
  ASSERT_EQ(count, std::ssize(all));
  for (int32_t i = 0; i < count; ++i) {
    kalmanet_backend_info info = KALMANET_BACKEND_INFO_INIT;
    ASSERT_TRUE(ok(kalmanet_get_backend_info(i, &info)));
    const BackendInfo& expected = all[static_cast<size_t>(i)];
    EXPECT_EQ(info.backend, static_cast<int32_t>(expected.backend));
    EXPECT_EQ(info.available, expected.available ? 1 : 0);
    EXPECT_EQ(info.detail, expected.detail);
    // The fields before the text alone.
    kalmanet_backend_info first;
    std::memset(&first, 0xAB, sizeof first);
    first.struct_size = offsetof(kalmanet_backend_info, detail);
    ASSERT_TRUE(ok(kalmanet_get_backend_info(i, &first)));
    EXPECT_EQ(first.available, expected.available ? 1 : 0);
    EXPECT_EQ(static_cast<unsigned char>(first.detail[0]), 0xAB);
  }
  kalmanet_backend_info info = KALMANET_BACKEND_INFO_INIT;
  for (int32_t bad : {-1, count}) {
    EXPECT_TRUE(fails(kalmanet_get_backend_info(bad, &info), KALMANET_INVALID_ARGUMENT, "index",
                      "must be in 0..2"));
  }
  EXPECT_TRUE(fails(kalmanet_num_backends(nullptr), KALMANET_INVALID_ARGUMENT, "count", "null"));
  EXPECT_TRUE(
      fails(kalmanet_get_backend_info(0, nullptr), KALMANET_INVALID_ARGUMENT, "info", "null"));
}

TEST(CQuery, InstructionSets) {
  int32_t available = -1, isa = -1;
  for (InstructionSet set : available_instruction_sets()) {
    const auto c_set = static_cast<int32_t>(set);
    ASSERT_TRUE(ok(kalmanet_instruction_set_available(c_set, &available)));
    EXPECT_EQ(available, 1);
    ASSERT_TRUE(ok(kalmanet_set_instruction_set(c_set)));
    EXPECT_EQ(instruction_set(), set);
    ASSERT_TRUE(ok(kalmanet_get_instruction_set(&isa)));
    EXPECT_EQ(isa, c_set);
    testing::Case<float> c{testing::CaseSpec()};
    const testing::CPlan plan;
    kalmanet_gka_report report = KALMANET_GKA_REPORT_INIT;
    ASSERT_TRUE(ok(testing::c_forward(plan.plan, c, &report)));
    EXPECT_EQ(report.instruction_set, c_set) << "what ran is reported";
  }
  ASSERT_TRUE(ok(kalmanet_reset_instruction_set()));
  const InstructionSet chosen = instruction_set();
  for (int32_t set = KALMANET_ISA_BASELINE; set <= KALMANET_ISA_AVX512; ++set) {
    ASSERT_TRUE(ok(kalmanet_instruction_set_available(set, &available)));
    if (available) continue;
    EXPECT_TRUE(fails(kalmanet_set_instruction_set(set), KALMANET_UNSUPPORTED,
                      "set_instruction_set", kalmanet_instruction_set_name(set)));
  }
  for (int32_t bad : {-1, 3, 1 << 30}) {
    EXPECT_TRUE(fails(kalmanet_set_instruction_set(bad), KALMANET_INVALID_ARGUMENT, "isa",
                      std::to_string(bad)));
    EXPECT_TRUE(fails(kalmanet_instruction_set_available(bad, &available),
                      KALMANET_INVALID_ARGUMENT, "isa", std::to_string(bad)));
  }
  EXPECT_TRUE(
      fails(kalmanet_get_instruction_set(nullptr), KALMANET_INVALID_ARGUMENT, "isa", "null"));
  EXPECT_TRUE(fails(kalmanet_instruction_set_available(0, nullptr), KALMANET_INVALID_ARGUMENT,
                    "available", "null"));
  EXPECT_EQ(instruction_set(), chosen);
}

TEST(CQuery, ChebyshevStepsAndStateBytes) {
  int32_t steps = 0;
  for (double ridge : {0.1, 0.02, 0.001}) {
    for (double tolerance : {1e-2, 1e-5}) {
      ASSERT_TRUE(ok(kalmanet_chebyshev_num_iter(ridge, tolerance, &steps)));
      EXPECT_EQ(steps, chebyshev_num_iter(ridge, tolerance));
    }
  }
  EXPECT_TRUE(fails(kalmanet_chebyshev_num_iter(0, 1e-5, &steps), KALMANET_INVALID_ARGUMENT,
                    "ridge_ratio", "got 0"));
  EXPECT_TRUE(fails(kalmanet_chebyshev_num_iter(0.02, -1, &steps), KALMANET_INVALID_ARGUMENT,
                    "tolerance", "got -1"));
  EXPECT_TRUE(fails(kalmanet_chebyshev_num_iter(0.02, 1e-5, nullptr), KALMANET_INVALID_ARGUMENT,
                    "num_iter", "null"));
  int64_t bytes = 0;
  ASSERT_TRUE(ok(kalmanet_gka_state_bytes(16, 128, 64, &bytes)));
  EXPECT_EQ(bytes, 16 * 128 * (128 + 64) * 4);
  EXPECT_EQ(bytes, gka_state_bytes(16, 128, 64));
  EXPECT_TRUE(fails(kalmanet_gka_state_bytes(0, 128, 64, &bytes), KALMANET_INVALID_ARGUMENT,
                    "num_heads", "got 0"));
  EXPECT_TRUE(fails(kalmanet_gka_state_bytes(1, 1, 1, nullptr), KALMANET_INVALID_ARGUMENT, "bytes",
                    "null"));
}

TEST(CQuery, DenseTensorsAreRowMajor) {
  const int64_t sizes[] = {2, 3, 4, 5};
  float data[1];
  for (int32_t rank = 0; rank <= KALMANET_MAX_RANK; ++rank) {
    const kalmanet_tensor t = kalmanet_dense(data, KALMANET_FLOAT64, rank, sizes);
    EXPECT_EQ(t.data, data);
    EXPECT_EQ(t.dtype, KALMANET_FLOAT64);
    EXPECT_EQ(t.rank, rank);
    int64_t stride = 1;
    for (int32_t d = rank - 1; d >= 0; --d) {
      EXPECT_EQ(t.size[d], sizes[d]);
      EXPECT_EQ(t.stride[d], stride);
      stride *= sizes[d];
    }
  }
}

// How much memory an operation takes; the figures themselves are held to what is really allocated
// in memory_test.cpp.
TEST(CQuery, WorkspaceBytes) {
  const testing::CPlan plan;
  kalmanet_gka_shape shape = KALMANET_GKA_SHAPE_INIT;
  shape.B = 2;
  shape.T = 600;
  shape.H = 4;
  shape.K = 32;
  shape.V = 24;
  shape.Hk = 2;
  shape.saved_x = 0;
  shape.segment_states = 1;
  GkaShape cpp;
  cpp.B = 2;
  cpp.T = 600;
  cpp.H = 4;
  cpp.K = 32;
  cpp.V = 24;
  cpp.Hk = 2;
  cpp.saved_x = false;
  cpp.segment_states = true;
  int64_t bytes = 0;
  const std::vector<int64_t> offsets = {0, 60, 600};
  for (bool packed : {false, true}) {
    if (packed) {
      shape.B = cpp.B = 1;
      shape.cu_seqlens = offsets.data();
      shape.num_offsets = 3;
      cpp.cu_seqlens = offsets;
    }
    for (int32_t operation : {KALMANET_GKA_FORWARD, KALMANET_GKA_BACKWARD, KALMANET_GKA_STEP}) {
      ASSERT_TRUE(ok(kalmanet_gka_workspace_bytes(plan.plan, operation, &shape, &bytes)));
      EXPECT_EQ(bytes, gka_workspace_bytes(static_cast<GkaOperation>(operation), cpp));
      EXPECT_GT(bytes, 0);
    }
  }
  const auto refused = [&](auto change, kalmanet_status status, const char* argument,
                           const char* part) {
    kalmanet_gka_shape changed = shape;
    change(changed);
    EXPECT_TRUE(
        fails(kalmanet_gka_workspace_bytes(plan.plan, KALMANET_GKA_FORWARD, &changed, &bytes),
              status, argument, part));
  };
  using S = kalmanet_gka_shape;
  refused([](S& s) { s.B = -1; }, KALMANET_INVALID_SHAPE, "B", "-1");
  refused([](S& s) { s.T = int64_t{1} << 60; }, KALMANET_INVALID_SHAPE, "T", "must be in 0..");
  refused([](S& s) { s.H = 0; }, KALMANET_INVALID_SHAPE, "H", "must be in 1..");
  refused([](S& s) { s.K = 257; }, KALMANET_INVALID_SHAPE, "K", "1..256");
  refused([](S& s) { s.V = 0; }, KALMANET_INVALID_SHAPE, "V", "1..256");
  refused([](S& s) { s.Hk = 3; }, KALMANET_INVALID_SHAPE, "Hk", "divide H = 4");
  refused([](S& s) { s.dtype = 9; }, KALMANET_INVALID_DTYPE, "dtype", "(9)");
  refused([](S& s) { s.T = s.H = int64_t{1} << 40; }, KALMANET_INVALID_SHAPE, "B", "64-bit");
  refused([](S& s) { s.num_offsets = 0; }, KALMANET_INVALID_ARGUMENT, "cu_seqlens", "both");
  refused([](S& s) { s.T = 299; }, KALMANET_INVALID_ARGUMENT, "cu_seqlens", "299");
  refused([](S& s) { s.struct_size = 4; }, KALMANET_INVALID_ARGUMENT, "shape", "struct_size is 4");
  EXPECT_TRUE(fails(kalmanet_gka_workspace_bytes(plan.plan, 3, &shape, &bytes),
                    KALMANET_INVALID_ARGUMENT, "operation", "unknown value 3"));
  EXPECT_TRUE(fails(kalmanet_gka_workspace_bytes(nullptr, 0, &shape, &bytes),
                    KALMANET_INVALID_ARGUMENT, "plan", "null"));
  kalmanet_gka_options on_reference = KALMANET_GKA_OPTIONS_INIT;
  on_reference.backend = KALMANET_BACKEND_REFERENCE;
  const testing::CPlan reference(on_reference);
  EXPECT_TRUE(fails(kalmanet_gka_workspace_bytes(reference.plan, 0, &shape, &bytes),
                    KALMANET_UNSUPPORTED, "backend", "reference"));
}

}  // namespace
}  // namespace kalmanet
