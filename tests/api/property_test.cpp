// What the library promises, on random problems: shapes, dtypes, solvers, gates, layouts, splits,
// chunk sizes, instruction sets and threads all drawn from one seed a case.
//
//   KALMANET_PROPERTY_CASES=100000 property_test   more of them (make properties CASES=100000)
//   KALMANET_PROPERTY_SEED=17 property_test        one case alone: a failure names its seed
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "api/property_certificate.hpp"
#include "cpu/gka_oracle.hpp"
#include "kalmanet/kalmanet.hpp"
#include "reference/run.hpp"
#include "support/expect.hpp"
#include "support/slices.hpp"

namespace kalmanet::testing {
namespace {

// What is drawn beside the problem itself.
struct Draw {
  CaseSpec spec;
  GkaOptions options;
  InstructionSet isa;
  int threads;
  bool saved_x;
  std::vector<int64_t> pieces;  // of the whole: by the forward, or by the step if negative
  std::string text;
};

template <class E, size_t N>
E pick(Random& random, const std::array<E, N>& from) {
  return from[static_cast<size_t>(random.integer(0, N - 1))];
}

void draw_shape(Random& random, CaseSpec& spec) {
  spec.B = random.integer(1, 2);
  const bool wide = random.integer(0, 15) == 0;
  spec.K = random.integer(1, wide ? 140 : 40);
  spec.V = random.integer(1, wide ? 140 : 40);
  spec.T = random.integer(1, wide ? 24 : random.integer(0, 7) == 0 ? 150 : 48);
  spec.H = random.integer(1, 3);
  if (random.integer(0, 2) == 0) {
    spec.H = 4;
    const std::array<int64_t, 3> shared = {1, 2, 4};
    spec.Hq = pick(random, shared);
    spec.Hk = pick(random, shared);
    spec.Hv = pick(random, shared);
  }
  if (random.integer(0, 2) == 0) {  // packed, with empty sequences and single tokens
    for (int64_t i = random.integer(1, 5); i > 0; --i) {
      spec.lengths.push_back(random.coin() ? random.integer(0, 1) : random.integer(2, 40));
    }
    int64_t sum = 0;
    for (int64_t n : spec.lengths) sum += n;
    if (sum == 0) spec.lengths.push_back(3);
  }
}

// The tolerances and ridge ratios are those that the promised bounds hold for (gka_oracle.hpp): an
// output may amplify an error of x a hundredfold (docs/numerics.md, section 1), so what stops at a
// tolerance stops at 1e-7. cg's steps part from float64's, so it gets enough to converge.
void draw_solver(Random& random, bool is_double, CaseSpec& spec, GkaOptions& options) {
  options.tolerance = is_double ? 1e-12 : 1e-7;
  spec.ridge_ratio = pick(random, std::array{0.1, 0.02, 0.005});
  switch (random.integer(0, 5)) {
    case 0:
    case 1:
      options.num_iter = static_cast<int>(random.integer(1, 40));
      break;
    case 2:
      options.num_iter = kAutoNumIter;
      break;
    case 3:
      options.solver = Solver::direct;
      break;
    case 4:
      options.solver = Solver::automatic;
      break;
    default:
      options.solver = Solver::cg;
      options.num_iter = is_double ? 60 : 30;
      spec.ridge_ratio = 0.1;
  }
  options.ridge_ratio = spec.ridge_ratio;
  if (options.solver == Solver::chebyshev && options.num_iter != kAutoNumIter && !is_double &&
      random.integer(0, 3) == 0) {
    options.arithmetic = Arithmetic::bfloat16;
  }
}

Draw draw_case(uint64_t seed, bool is_double) {
  Random random(seed);
  Draw d;
  draw_shape(random, d.spec);
  set_gates(d.spec, static_cast<int>(random.integer(0, 63)));
  d.spec.h0 = random.coin();
  d.spec.u0 = random.coin();
  d.spec.strided = random.coin();
  d.spec.unit_keys = random.integer(0, 3) != 0;
  d.spec.memory = pick(random, std::array{8.0, 32.0, 500.0, 0.0});
  d.spec.seed = seed;
  draw_solver(random, is_double, d.spec, d.options);
  d.options.chunk_size = random.coin() ? 0 : random.integer(1, 20);
  const std::vector<InstructionSet> sets = available_instruction_sets();
  d.isa = sets[static_cast<size_t>(random.integer(0, std::ssize(sets) - 1))];
  d.threads = static_cast<int>(random.integer(2, 5));
  d.saved_x = random.coin();
  for (int64_t left = d.spec.T; left > 0;) {
    const int64_t n = std::min(left, random.integer(1, 40));
    d.pieces.push_back(random.coin() ? n : -n);
    left -= n;
  }
  d.text = describe(d.spec) + " " + name(d.options.solver) + "(" +
           std::to_string(d.options.num_iter) + ") " + name(d.options.arithmetic) + " chunk " +
           std::to_string(d.options.chunk_size) + ", " + std::to_string(d.threads) +
           " threads; rerun: KALMANET_PROPERTY_SEED=" + std::to_string(seed);
  return d;
}

Executor& threads(int count) {
  static std::array<std::unique_ptr<Executor>, 8> executors;
  auto& executor = executors[static_cast<size_t>(count)];
  if (!executor) executor = make_executor(count);
  return *executor;
}

// How much larger than x's an error of o may be: sum over tokens of (scale alpha |x| |U|)^2, in
// units of |o|^2, |U_t| bounded by the sum of its terms' norms.
double amplification(const Case<double>& c) {
  const CaseSpec& s = c.spec;
  const std::vector<double> k = c.k.values(), v = c.v.values(), x = c.x.values(), o = c.o.values(),
                            u0 = c.u0.values();
  const auto squares = [](const double* p, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += p[i] * p[i];
    return sum;
  };
  const double start = u0.empty() ? 0.0 : std::sqrt(squares(u0.data(), std::ssize(u0)));
  double terms = 0;
  for (int64_t i = 0; i < s.B * s.T; ++i) {
    const int64_t hk = s.num_k_heads(), hv = s.num_v_heads();
    terms += std::sqrt(squares(&k[static_cast<size_t>(i * hk * s.K)], hk * s.K) *
                       squares(&v[static_cast<size_t>(i * hv * s.V)], hv * s.V));
  }
  const double o2 = squares(o.data(), std::ssize(o));
  const double x2 = squares(x.data(), std::ssize(x));
  return o2 > 0 ? (start + terms) * std::sqrt(x2 / static_cast<double>(s.K) / o2) : 0.0;
}

// Of o against the oracle. float64 has nothing wider for lone tokens, whose errors are eps times
// the condition number (Chebyshev: or its steps squared, chunk.hpp), amplified.
template <class T>
double output_bound(const Case<double>& expected, const GkaOptions& options) {
  if (!std::is_same_v<T, double>) {
    // 1e-7 a hundredfold.
    const bool stops = options.solver == Solver::direct || options.solver == Solver::automatic ||
                       options.num_iter == kAutoNumIter;
    return kOutputBound<T> + (stops ? 1e-5 : 0.0);
  }
  const double kappa = 1 + 1 / options.ridge_ratio;
  const double steps = static_cast<double>(options.num_iter);
  return kOutputBound<T> +
         amplification(expected) * (0x1p-53 * (kappa + steps * steps) + options.tolerance);
}

// Of one tensor, by the oracles' token loop in the kernels' precision from end to end.
template <class T, class G>
double naive_error(const Case<T, G>& c, const Case<double>& expected, const GkaOptions& options,
                   const std::string& tensor) {
  using Real = StateOf<T>;
  Case<T, G> plain = c;
  run_forward<Real>(plain, options);
  run_backward<Real>(plain, options);
  double error = 0;
  const auto look = [&](const char* name, ConstView got, ConstView want) {
    if (tensor == name) error = relative_error(got, want);
  };
  for_each_output(plain, expected, look);
  for_each_gradient(plain, expected, look);
  return error;
}

template <class T>
void check_case(uint64_t seed) {
  using G = std::conditional_t<kIsHalf<T>, float, T>;
  const Draw d = draw_case(seed, std::is_same_v<T, double>);
  const ForcedInstructionSet forced(d.isa);
  const Where where{std::string("property of ") + name(DTypeOf<T>::value), name(d.isa), d.text};
  Case<T, G> whole(d.spec);
  const CaseSpec& spec = whole.spec;
  const bool exact = d.options.arithmetic == Arithmetic::standard;

  const auto run = [&](Case<T, G>& c, int count) {
    GkaOptions options = d.options;
    options.executor = &threads(count);
    const GkaReport report = gka_forward(c.inputs(), c.outputs(), options);
    const ConstView x = d.saved_x ? ConstView(c.x.view()) : ConstView();
    gka_backward(c.inputs(), x, c.output_grads(), c.grads(), options);
    return report;
  };
  const auto same = [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b));
  };
  const auto same_results = [&](Case<T, G>& a, Case<T, G>& b) {
    for_each_output(a, b, same);
    for_each_gradient(a, b, same);
    same("x", a.x.view(), b.x.view());
    same("residual", a.residual.view(), b.residual.view());
  };
  const GkaReport report = run(whole, 1);
  EXPECT_EQ(report.instruction_set, d.isa) << d.text;
  EXPECT_TRUE(whole.gaps_intact()) << text(where, "gaps");

  // The number of threads changes no bit.
  Case<T, G> other(d.spec);
  run(other, d.threads);
  same_results(other, whole);

  // Packed sequences never see each other.
  if (!spec.lengths.empty()) {
    other.clear_results();
    GkaOptions options = d.options;
    options.executor = &threads(1);
    for (int64_t n = 0; n < spec.num_sequences(); ++n) {
      const int64_t begin = other.cu_seqlens[static_cast<size_t>(n)];
      const int64_t end = other.cu_seqlens[static_cast<size_t>(n + 1)];
      GkaInputs in = tokens(other.inputs(), begin, end);
      in.cu_seqlens = {};
      in.h0 = state(in.h0, n);
      in.u0 = state(in.u0, n);
      GkaOutputs out = tokens(other.outputs(), begin, end);
      out.h_final = state(out.h_final, n);
      out.u_final = state(out.u_final, n);
      GkaOutputGrads d_out = other.output_grads();
      d_out.d_o = tokens(d_out.d_o, begin, end);
      d_out.d_h_final = state(d_out.d_h_final, n);
      d_out.d_u_final = state(d_out.d_u_final, n);
      GkaInputGrads grads = tokens(other.grads(), begin, end);
      grads.d_h0 = state(grads.d_h0, n);
      grads.d_u0 = state(grads.d_u0, n);
      gka_forward(in, out, options);
      gka_backward(in, d.saved_x ? ConstView(out.x) : ConstView(), d_out, grads, options);
    }
    same_results(other, whole);
  }

  // The certificate is what an independent computation makes of H and x, whatever the solver did:
  // float32 states and x leave some eps / a in it (residuals_agree). A wrong x does not pass.
  Case<double> wide = to_double(whole);
  const std::vector<double> said = whole.residual.values();
  const std::vector<double> found = recomputed_residuals(wide, d.options.ridge_ratio);
  const double floor = 16 * kRoundoff<StateOf<T>> / spec.ridge_ratio;
  for (size_t i = 0; i < found.size(); ++i) {
    ASSERT_LE(std::abs(said[i] - found[i]), floor + 1e-2 * found[i])
        << text(where, "residual") << ": token and head " << i << " says " << said[i] << ", found "
        << found[i];
  }
  const auto planted =
      static_cast<size_t>(seed % static_cast<uint64_t>(std::max<int64_t>(1, std::ssize(said))));
  if (!said.empty() && found[planted] > 0 && said[planted] < 0.05) {
    for (size_t i = 0; i < static_cast<size_t>(spec.K); ++i) {
      wide.x[static_cast<int64_t>(planted) * spec.K + static_cast<int64_t>(i)] *= 1.1;
    }
    // (H + lambda) 1.1 x - q = 0.1 q + 1.1 r
    EXPECT_GT(recomputed_residuals(wide, d.options.ridge_ratio)[planted], 0.04)
        << text(where, "a wrong x passed");
  }
  if (!exact) return;  // bounds of bfloat16 products: tests/cpu/bf16_test.cpp

  // The answer.
  GkaOptions oracle = d.options;
  if (oracle.num_iter == kAutoNumIter || oracle.solver != Solver::chebyshev) {
    oracle.solver = Solver::direct;
  }
  const Case<double> expected = oracle_results(whole, oracle);
  const double bound = output_bound<T>(expected, d.options);
  const auto good = [&](const Where& at, const char* tensor, ConstView got, ConstView want,
                        double allowed) {
    const ::testing::AssertionResult within_bound = rounded_once(at, tensor, got, want, allowed);
    // The promise: that, or twice what plain code of the same precision errs by.
    const bool fine = within_bound || relative_error(got, want) <=
                                          2 * naive_error<T>(whole, expected, oracle, tensor);
    EXPECT_TRUE(fine) << within_bound.message();
  };
  for_each_output(whole, expected, [&](const char* tensor, ConstView got, ConstView want) {
    good(where, tensor, got, want, bound);
  });
  // Gradients hold 1 / a once more (docs/numerics.md, sections 7 and 8: ten times for float32).
  // Where chunks are short, the backward has more of a young sequence's tokens in float32 (it
  // computes the first chunk in float64), whose errors are eps times the condition number,
  // amplified.
  const double kappa = 1 + 1 / spec.ridge_ratio;
  double back = std::is_same_v<T, double> ? bound * kappa : 10 * bound;
  if (!std::is_same_v<T, double> && d.options.chunk_size > 0 && d.options.chunk_size < 16) {
    back += 0x1p-24 * kappa * amplification(expected);
  }
  for_each_gradient(whole, expected, [&](const char* tensor, ConstView got, ConstView want) {
    good(where, tensor, got, want, back);
  });

  // Prefill, continuation and single steps in any order: both ways are within the bound.
  if (!spec.lengths.empty()) return;
  other.clear_results();
  int64_t begin = 0;
  for (int64_t piece : d.pieces) {
    const int64_t end = begin + std::abs(piece);
    GkaInputs in = tokens(other.inputs(), begin, end);
    const GkaOutputs out = tokens(other.outputs(), begin, end);
    if (begin > 0) {
      in.h0 = out.h_final;
      in.u0 = out.u_final;
    }
    piece > 0 ? gka_forward(in, out, d.options) : gka_step(in, out, d.options);
    begin = end;
  }
  for_each_output(other, expected, [&](const char* tensor, ConstView got, ConstView want) {
    good({where.operation + " in pieces", name(d.isa), d.text}, tensor, got, want, bound);
  });
}

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr || *value == '\0' ? otherwise : std::strtoull(value, nullptr, 10);
}

void check_seed(uint64_t seed) {
  switch (seed % 8) {
    case 0:
      return check_case<double>(seed);
    case 1:
    case 2:
      return check_case<BFloat16>(seed);
    case 3:
      return check_case<Float16>(seed);
    default:
      return check_case<float>(seed);
  }
}

TEST(Properties, HoldForRandomProblems) {
#if defined(KALMANET_FEW_PROPERTIES)
  constexpr uint64_t kCases = 60;
#else
  constexpr uint64_t kCases = 2400;
#endif
  if (const uint64_t seed = number_from("KALMANET_PROPERTY_SEED", 0)) return check_seed(seed);
  const uint64_t cases = number_from("KALMANET_PROPERTY_CASES", kCases);
  const ::testing::TestResult& result =
      *::testing::UnitTest::GetInstance()->current_test_info()->result();
  // Seeds that once failed: a direct block's extrapolated shifts were beyond counting.
  for (const uint64_t seed : {1924, 4792, 7744, 26824, 28144}) check_seed(seed);
  uint64_t seed = 0;
  while (seed < cases && result.total_part_count() < 20) check_seed(++seed);
  std::printf("%llu random cases\n", static_cast<unsigned long long>(seed));
}

}  // namespace
}  // namespace kalmanet::testing
