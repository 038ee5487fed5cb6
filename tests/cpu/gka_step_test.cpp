// The decode step's fast ways beside their plain twins: H packed or whole, and the residual beside
// one recomputed here from H and x; states that are fetched ahead.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/gka_cases.hpp"
#include "cpu/gka_jobs.hpp"
#include "cpu/gka_step_states.hpp"
#include "cpu/scratch_sizes.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

// What one head's tokens, decoded one by one from zero states, come to.
template <class S>
struct Decoded {
  std::vector<S> o, x, residual, state;
};

template <class S>
Decoded<S> decode(const Case<S>& c, Solver solver, int num_iter, cpu::StepMatrix matrix) {
  const int64_t T = c.spec.T, K = c.spec.K, V = c.spec.V;
  Decoded<S> out{std::vector<S>(static_cast<size_t>(T * V)),
                 std::vector<S>(static_cast<size_t>(T * K)), std::vector<S>(static_cast<size_t>(T)),
                 std::vector<S>(static_cast<size_t>(cpu::state_floats(K, V)))};
  const GkaInputs in = c.inputs();
  cpu::GkaStepJob<S> job;
  job.in.K = K;
  job.in.V = V;
  job.in.q = cpu::rows_of(in.q, 0, 0);
  job.in.k = cpu::rows_of(in.k, 0, 0);
  job.in.v = cpu::rows_of(in.v, 0, 0);
  job.in.g = cpu::column_of(in.g, 0, 0);
  job.in.gk = cpu::column_of(in.gk, 0, 0);
  job.in.alpha = cpu::column_of(in.alpha, 0, 0);
  job.in.ridge_ratio = c.spec.ridge_ratio;
  job.in.solver = solver;
  job.in.num_iter = num_iter;
  job.in.tolerance = 1e-5;
  job.end = T;
  job.state = cpu::state_at(out.state.data(), K);
  job.h_stride = cpu::padded(K);
  job.u_stride = cpu::padded(V);
  job.o = {out.o.data(), DTypeOf<S>::value, V, 1};
  job.x = {out.x.data(), DTypeOf<S>::value, K, 1};
  job.residual = {out.residual.data(), DTypeOf<S>::value, 1};
  job.matrix = matrix;
  // Poisoned: scratch promises nothing.
  cpu::ScratchLease<S> scratch(cpu::step_scratch_floats(K, V, solver));
  std::fill_n(scratch.data(), cpu::step_scratch_floats(K, V, solver), static_cast<S>(NAN));
  job.scratch = scratch.data();
  cpu::kernels_of<S>(cpu::kernels()).gka_step(job);
  return out;
}

template <class S>
void compare_packed_with_whole(double bound) {
  for (int64_t K : {1, 5, 16, 33, 64, 100, 128, 200, 256}) {
    CaseSpec spec;
    spec.T = 9;
    spec.H = 1;
    spec.K = K;
    spec.V = 17;
    spec.seed = 8200 + static_cast<uint64_t>(K);
    set_gates(spec, 7);
    const Case<S> c(spec);
    for (InstructionSet isa : available_instruction_sets()) {
      ForcedInstructionSet forced(isa);
      for (Solver solver : {Solver::chebyshev, Solver::cg, Solver::automatic}) {
        const int num_iter = solver == Solver::cg ? 8 : 30;
        const auto whole = decode<S>(c, solver, num_iter, cpu::StepMatrix::whole);
        const auto packed = decode<S>(c, solver, num_iter, cpu::StepMatrix::packed);
        const std::string where =
            std::string(name(solver)) + " on " + name(isa) + ", " + describe(spec);
        // The update of the states is the same arithmetic, packed along or not.
        EXPECT_EQ(whole.state, packed.state) << where;
        EXPECT_LE(relative_error(std::span<const S>(packed.o), std::span<const S>(whole.o)), bound)
            << "o, " << where;
        EXPECT_LE(relative_error(std::span<const S>(packed.x), std::span<const S>(whole.x)), bound)
            << "x, " << where;
      }
    }
  }
}

// Both are sums of the same products in another order: a few hundred roundings that the system's
// condition number, 51 at ridge ratio 0.02, may amplify.
TEST(GkaStepPacked, GivesWhatTheWholeMatrixGivesInFloat32) {
  compare_packed_with_whole<float>(1e-5);
}
TEST(GkaStepPacked, GivesWhatTheWholeMatrixGivesInFloat64) {
  compare_packed_with_whole<double>(1e-13);
}

// |(H + a |H| I) x - q| / |q| by plain loops in float64.
double plain_residual(const std::vector<double>& h, const std::vector<double>& x,
                      const std::vector<double>& q, double ridge) {
  const size_t K = q.size();
  double f2 = 0, r2 = 0, q2 = 0;
  for (double e : h) f2 += e * e;
  for (size_t i = 0; i < K; ++i) {
    double r = ridge * std::sqrt(f2) * x[i] - q[i];
    for (size_t j = 0; j < K; ++j) r += h[i * K + j] * x[j];
    r2 += r * r;
    q2 += q[i] * q[i];
  }
  return std::sqrt(r2 / q2);
}

// The certificate of the forward and of the step is about the x that they return, whatever the
// solver; and it tells that x from a wrong one, off by a thousandth.
TEST(Certificate, IsTheResidualOfTheReturnedX) {
  CaseSpec spec;
  spec.T = 1;  // h_final is the token's H
  spec.H = 2;
  spec.K = 72;
  spec.V = 24;
  spec.h0 = spec.u0 = true;
  spec.ridge_ratio = 0.02;
  spec.seed = 8300;
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    for (Solver solver : {Solver::chebyshev, Solver::direct, Solver::cg, Solver::automatic}) {
      for (auto* operation : {&gka_forward, &gka_step}) {
        Case<float> c(spec);
        GkaOptions options = c.options();
        options.solver = solver;
        operation(c.inputs(), c.outputs(), options);
        const std::string where = std::string(operation == &gka_step ? "gka_step, " : "forward, ") +
                                  name(solver) + " on " + name(isa);
        for (int64_t head = 0; head < spec.H; ++head) {
          const auto part = [&](const std::vector<double>& all, int64_t n) {
            return std::vector<double>(all.begin() + head * n, all.begin() + (head + 1) * n);
          };
          const auto h = part(c.h_final.values(), spec.K * spec.K);
          auto x = part(c.x.values(), spec.K);
          const auto q = part(c.q.values(), spec.K);
          const double reported = c.residual.values()[static_cast<size_t>(head)];
          // H is rounded to float32 where the forward returns it but not where it uses it.
          EXPECT_NEAR(reported, plain_residual(h, x, q, 0.02), 2e-6) << where;
          EXPECT_LT(reported, 4e-4) << where;
          for (double& e : x) e *= 1.001;
          EXPECT_GT(plain_residual(h, x, q, 0.02), 0.5e-3) << where;
        }
      }
    }
  }
}

// States beyond the caches are fetched while a solver works (step_ahead.hpp). That must not show:
// many sequences at once and each of them alone, whose states are too few to be fetched, give the
// same bits, also where heads are odd ones out of a batch that no number of threads divides.
TEST(GkaStep, StatesBeyondTheCachesGiveTheSameBits) {
  CaseSpec spec;
  spec.B = 131;
  spec.T = 2;
  spec.H = 5;
  spec.K = 64;
  spec.V = 48;
  spec.h0 = spec.u0 = true;
  spec.seed = 8400;
  set_gates(spec, 7);
  ASSERT_GT(4 * spec.B * spec.H * spec.K * (spec.K + spec.V), cpu::kBytesKept);
  Case<float> all(spec), alone(spec);
  const int threads = num_threads();
  for (Solver solver : {Solver::chebyshev, Solver::cg, Solver::direct}) {
    const auto in_place = [&](Case<float>& c) {
      GkaInputs in = c.inputs();
      GkaOutputs out = c.outputs();
      out.h_final = c.h0.view();
      out.u_final = c.u0.view();
      return std::pair(in, out);
    };
    GkaOptions options = all.options();
    options.solver = solver;
    set_num_threads(3);
    auto [in, out] = in_place(all);
    gka_step(in, out, options);
    set_num_threads(threads);
    auto [one_in, one_out] = in_place(alone);
    for (int64_t b = 0; b < spec.B; ++b) {
      const auto row = [b](auto view) {
        if (!view.defined()) return view;
        view.data = reinterpret_cast<decltype(view.data)>(
            reinterpret_cast<uintptr_t>(view.data) +
            static_cast<uintptr_t>(b * view.stride[0]) * sizeof(float));
        view.size[0] = 1;
        return view;
      };
      GkaInputs i = one_in;
      for (ConstView* v :
           {&i.q, &i.k, &i.v, &i.g, &i.gk, &i.alpha, &i.beta, &i.ridge_ratio, &i.h0, &i.u0}) {
        *v = row(*v);
      }
      GkaOutputs o = one_out;
      for (View* v : {&o.o, &o.x, &o.residual, &o.h_final, &o.u_final}) *v = row(*v);
      gka_step(i, o, options);
    }
    EXPECT_EQ(all.o.values(), alone.o.values()) << name(solver) << ", " << describe(spec);
    EXPECT_EQ(all.h0.values(), alone.h0.values()) << name(solver) << ", " << describe(spec);
    EXPECT_EQ(all.u0.values(), alone.u0.values()) << name(solver) << ", " << describe(spec);
  }
}

}  // namespace
}  // namespace kalmanet::testing
