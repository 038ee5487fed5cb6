// Views, dtypes, names, versions and errors: the small public types.
#include <gtest/gtest.h>

#include <string>

#include "core/text.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet {
namespace {

TEST(Views, DenseIsRowMajor) {
  double data[24] = {};
  const View v = dense(data, {2, 3, 4});
  EXPECT_TRUE(v.defined());
  EXPECT_EQ(v.dtype, DType::float64);
  EXPECT_EQ(v.rank, 3);
  EXPECT_EQ(v.numel(), 24);
  EXPECT_EQ(v.stride[0], 12);
  EXPECT_EQ(v.stride[1], 4);
  EXPECT_EQ(v.stride[2], 1);
  const float* readable = nullptr;
  const ConstView c = dense(readable, {5});
  EXPECT_FALSE(c.defined());
  EXPECT_EQ(c.dtype, DType::float32);
  const ConstView converted = v;
  EXPECT_EQ(converted.data, data);
  EXPECT_EQ(converted.size, v.size);
  EXPECT_EQ(converted.stride, v.stride);
  EXPECT_FALSE(ConstView().defined());
  EXPECT_EQ(core::shape_text(v), "[2, 3, 4]");
}

TEST(Names, AreThoseOfTheEnumerators) {
  EXPECT_STREQ(name(DType::float32), "float32");
  EXPECT_STREQ(name(DType::float64), "float64");
  EXPECT_STREQ(name(DType::bfloat16), "bfloat16");
  EXPECT_STREQ(name(DType::float16), "float16");
  EXPECT_EQ(size_of(DType::float32), 4);
  EXPECT_EQ(size_of(DType::float64), 8);
  EXPECT_EQ(size_of(DType::bfloat16), 2);
  EXPECT_EQ(size_of(DType::float16), 2);
  EXPECT_STREQ(name(Backend::automatic), "automatic");
  EXPECT_STREQ(name(Backend::cpu), "cpu");
  EXPECT_STREQ(name(Backend::reference), "reference");
  EXPECT_STREQ(name(InstructionSet::baseline), "baseline");
  EXPECT_STREQ(name(InstructionSet::avx2), "avx2");
  EXPECT_STREQ(name(InstructionSet::avx512), "avx512");
  EXPECT_STREQ(name(Solver::chebyshev), "chebyshev");
  EXPECT_STREQ(name(Solver::direct), "direct");
  EXPECT_STREQ(name(Solver::cg), "cg");
}

TEST(Version, IsTheHeadersOne) {
  EXPECT_EQ(version(), std::to_string(KALMANET_VERSION_MAJOR) + "." +
                           std::to_string(KALMANET_VERSION_MINOR) + "." +
                           std::to_string(KALMANET_VERSION_PATCH));
}

TEST(Errors, BeginWithTheArgumentsNameOnce) {
  const Error plain(ErrorCode::invalid_shape, "q", "shape [2]");
  EXPECT_STREQ(plain.what(), "q: shape [2]");
  EXPECT_EQ(plain.argument(), "q");
  EXPECT_EQ(plain.code(), ErrorCode::invalid_shape);
  EXPECT_STREQ(Error(ErrorCode::unsupported, "q", "q: shape [2]").what(), "q: shape [2]");
}

// kappa = 51 at 0.02: R = 0.7543; 2 R^44 = 8.2e-6 <= 1e-5 < 2 R^43 = 1.1e-5.
TEST(ChebyshevNumIter, IsTheSmallestWithinTheTolerance) {
  EXPECT_EQ(chebyshev_num_iter(0.02, 1e-5), 44);
  EXPECT_EQ(chebyshev_num_iter(0.005, 1e-5), 87);
  EXPECT_EQ(chebyshev_num_iter(0.001, 1e-5), 194);
  for (double a : {10.0, 0.5, 0.02, 1e-4, 1e-8}) {
    for (double tolerance : {1e-2, 1e-6, 1e-12}) {
      const int r = chebyshev_num_iter(a, tolerance);
      const long double s = std::sqrt((1.0L + a) / a), R = (s - 1) / (s + 1);
      EXPECT_LE(2 * std::pow(R, r), tolerance * (1 + 1e-6)) << a << ' ' << tolerance;
      if (r > 1) {
        EXPECT_GT(2 * std::pow(R, r - 1), tolerance * (1 - 1e-6)) << a << ' ' << tolerance;
      }
    }
  }
  EXPECT_EQ(chebyshev_num_iter(1e30, 1e-12), 1);
  EXPECT_EQ(chebyshev_num_iter(0.02, 5), 1) << "at least one step";
  EXPECT_THROW(chebyshev_num_iter(0, 1e-5), Error);
  EXPECT_THROW(chebyshev_num_iter(-1, 1e-5), Error);
  EXPECT_THROW(chebyshev_num_iter(0.02, 0), Error);
  EXPECT_THROW(chebyshev_num_iter(0.02, std::nan("")), Error);
  EXPECT_THROW(chebyshev_num_iter(1e-30, 1e-5), Error) << "more steps than an int holds";
}

TEST(GkaStateBytes, CountsBothStatesOfAllHeads) {
  EXPECT_EQ(gka_state_bytes(16, 128, 128), 16 * (128 * 128 + 128 * 128) * 4);
  EXPECT_EQ(gka_state_bytes(3, 5, 7), 3 * (25 + 35) * 4);
  EXPECT_THROW(gka_state_bytes(0, 5, 7), Error);
  EXPECT_THROW(gka_state_bytes(1, 257, 7), Error);
  EXPECT_THROW(gka_state_bytes(1, 5, 0), Error);
}

// The test support itself: a comparison that cannot fail would prove nothing.
TEST(Support, ComparisonsSeeDifferences) {
  using namespace kalmanet::testing;
  const std::vector<double> a = {1, 2, 3}, b = {1, 2, 3.003};
  EXPECT_NEAR(relative_error(b, a), 0.003 / std::sqrt(14), 1e-6);
  EXPECT_TRUE(within({"op", "", "p"}, "t", b, a, 1e-3));
  EXPECT_FALSE(within({"op", "", "p"}, "t", b, a, 1e-4));
  EXPECT_FALSE(within({"op", "", "p"}, "t", {1, 2}, a, 1));
  EXPECT_FALSE(within({"op", "", "p"}, "t", {1, 2, std::nan("")}, a, 1e30));
  const auto failure = within({"gka_forward", "avx2", "T=3"}, "o", b, a, 1e-4);
  for (const char* part : {"gka_forward", "avx2", "T=3", "0.0008", "0.0001"}) {
    EXPECT_NE(std::string(failure.message()).find(part), std::string::npos) << failure.message();
  }
}

TEST(Support, AwkwardTensorsHoldTheSameValuesAndGuardTheirGaps) {
  using namespace kalmanet::testing;
  CaseSpec spec;
  spec.h0 = spec.g = true;
  Case<double> plain(spec);
  spec.strided = true;
  Case<double> awkward(spec);
  EXPECT_EQ(plain.q.values(), awkward.q.values());
  EXPECT_EQ(plain.h0.values(), awkward.h0.values());
  EXPECT_NE(plain.inputs().q.stride, awkward.inputs().q.stride);
  EXPECT_TRUE(awkward.gaps_intact());
  // One past a row of two elements' stride, or past the end: some gap must notice.
  View o = awkward.o.view();
  bool noticed = false;
  for (int64_t past = 1; past < 8 && !noticed; ++past) {
    auto* e = static_cast<double*>(o.data) + (o.size[3] - 1) * o.stride[3] + past;
    const double before = *e;
    *e = 1;
    noticed = !awkward.gaps_intact();
    *e = before;
  }
  EXPECT_TRUE(noticed);
}

}  // namespace
}  // namespace kalmanet
