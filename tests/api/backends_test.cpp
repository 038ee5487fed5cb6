// Choice of backend: automatic is the cpu and never the reference; a refusal says why and what to
// do.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"

namespace kalmanet {
namespace {

using testing::Case;
using testing::CaseSpec;

CaseSpec small() {
  CaseSpec spec;
  spec.T = 12;
  spec.g = spec.gk = spec.alpha = spec.beta = spec.h0 = spec.u0 = true;
  return spec;
}

// The three operations on a Case.
enum class Operation { forward, backward, step };
constexpr Operation kOperations[] = {Operation::forward, Operation::backward, Operation::step};

template <class T>
GkaReport run(Operation operation, Case<T>& c, const GkaOptions& options) {
  switch (operation) {
    case Operation::forward:
      return gka_forward(c.inputs(), c.outputs(), options);
    case Operation::backward:
      return gka_backward(c.inputs(), {}, c.output_grads(), c.grads(), options);
    case Operation::step:
      return gka_step(c.inputs(), c.outputs(), options);
  }
  return {};
}

template <class T>
void expect_nothing_written(const Case<T>& c) {
  for (const auto* t : {&c.o, &c.h_final, &c.u_final, &c.x, &c.residual, &c.dq, &c.dk, &c.dv, &c.dg,
                        &c.d_ridge_ratio, &c.d_h0}) {
    for (double e : t->values()) ASSERT_TRUE(std::isnan(e)) << "an output was written";
  }
}

// Expects an Error(unsupported) about the backend whose message has the parts.
template <class T>
void expect_refusal(Case<T>& c, const GkaOptions& options, const std::vector<std::string>& parts) {
  for (Operation operation : kOperations) {
    try {
      run(operation, c, options);
      ADD_FAILURE() << "computed, but should have been refused: " << parts.front();
    } catch (const Error& e) {
      EXPECT_EQ(static_cast<int>(e.code()), static_cast<int>(ErrorCode::unsupported)) << e.what();
      EXPECT_EQ(e.argument(), "backend");
      for (const std::string& part : parts) {
        EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
            << '"' << e.what() << "\" lacks \"" << part << '"';
      }
    }
    expect_nothing_written(c);
  }
}

template <class T>
void automatic_is_the_cpu() {
  for (Backend asked : {Backend::automatic, Backend::cpu}) {
    for (Operation operation : kOperations) {
      Case<T> c(small());
      GkaOptions options;
      options.backend = asked;
      const GkaReport report = run(operation, c, options);
      EXPECT_EQ(report.backend, Backend::cpu);
      EXPECT_EQ(report.instruction_set, instruction_set());
      EXPECT_EQ(report.min_iterations, 30);
      EXPECT_EQ(report.max_iterations, 30);
      EXPECT_GE(report.chunk_size, 1);
    }
  }
}

TEST(ChoiceOfBackend, AutomaticIsTheCpu) {
  testing::for_each_dtype([]<class T>(T) { automatic_is_the_cpu<T>(); });
}

TEST(ChoiceOfBackend, ReferenceByNameOnly) {
  Case<double> d(small());
  GkaOptions options;
  options.backend = Backend::reference;
  for (Operation operation : kOperations) {
    EXPECT_EQ(run(operation, d, options).backend, Backend::reference);
  }
  for (double e : d.dk.values()) EXPECT_TRUE(std::isfinite(e));
}

TEST(ChoiceOfBackend, EverySolverRunsOnBoth) {
  for (Solver solver : {Solver::chebyshev, Solver::direct, Solver::cg}) {
    Case<float> c(small());
    GkaOptions options;
    options.solver = solver;
    for (Operation operation : kOperations) {
      options.backend = Backend::automatic;
      EXPECT_EQ(run(operation, c, options).backend, Backend::cpu) << name(solver);
      options.backend = Backend::reference;
      EXPECT_EQ(run(operation, c, options).backend, Backend::reference) << name(solver);
    }
  }
}

// A build or a machine without CUDA refuses it by name and says why; it is never chosen by itself.
TEST(ChoiceOfBackend, CudaByNameOnlyAndNeverInSilence) {
  const BackendInfo cuda = backends().back();
  ASSERT_EQ(cuda.backend, Backend::cuda);
  if (cuda.available) GTEST_SKIP() << "there is a GPU here: " << cuda.detail;
  Case<float> c(small());
  GkaOptions options;
  options.backend = Backend::cuda;
  for (Operation operation : kOperations) {
    try {
      run(operation, c, options);
      ADD_FAILURE() << "computed without a GPU";
    } catch (const Error& e) {
      EXPECT_EQ(static_cast<int>(e.code()), static_cast<int>(ErrorCode::unsupported)) << e.what();
      EXPECT_EQ(e.argument(), "backend");
    }
    expect_nothing_written(c);
  }
}

// Every dtype is computed by both, and they agree.
TEST(ChoiceOfBackend, EveryDtypeIsComputedByBoth) {
  testing::for_each_dtype([]<class T>(T) {
    for (Operation operation : kOperations) {
      Case<T> cpu(small()), reference(small());
      GkaOptions options;
      EXPECT_EQ(run(operation, cpu, options).backend, Backend::cpu);
      options.backend = Backend::reference;
      EXPECT_EQ(run(operation, reference, options).backend, Backend::reference);
      const testing::Where where{name(DTypeOf<T>::value), name(instruction_set()),
                                 testing::describe(small())};
      const double bound = std::max(1e-5, 2 * testing::kRoundoff<T>);
      const auto same = [&](const char* tensor, ConstView a, ConstView b) {
        EXPECT_TRUE(testing::within(where, tensor, a, b, bound));
      };
      if (operation == Operation::backward) {
        testing::for_each_gradient(cpu, reference, same);
      } else {
        testing::for_each_output(cpu, reference, same);
      }
    }
  });
}

TEST(Backends, AreListedWithTheInstructionSetInUse) {
  const std::vector<BackendInfo> list = backends();
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0].backend, Backend::cpu);
  EXPECT_TRUE(list[0].available);
  EXPECT_EQ(list[1].backend, Backend::reference);
  EXPECT_TRUE(list[1].available);
  EXPECT_EQ(list[2].backend, Backend::cuda);  // available or not, and then why not
  EXPECT_FALSE(list[2].detail.empty());
  for (InstructionSet isa : available_instruction_sets()) {
    set_instruction_set(isa);
    EXPECT_EQ(instruction_set(), isa);
    EXPECT_NE(backends()[0].detail.find(std::string("using ") + name(isa)), std::string::npos)
        << backends()[0].detail;
    Case<float> c(small());
    EXPECT_EQ(run(Operation::forward, c, {}).instruction_set, isa) << "what ran is reported";
  }
  reset_instruction_set();
}

// The variable is read once a process, so each value gets a new one: this test program again.
int in_new_process(const char* value) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    setenv("KALMANET_ISA", value, 1);
    execl("/proc/self/exe", "api_test", "--gtest_filter=IsaProbe.DISABLED_Exit",
          "--gtest_also_run_disabled_tests", "--gtest_brief=1", static_cast<char*>(nullptr));
    _exit(99);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// 10 + the instruction set that ran, or 50 for a clear Error from the operation and from
// backends().
TEST(IsaProbe, DISABLED_Exit) {
  Case<float> c(small());
  try {
    _exit(10 + static_cast<int>(run(Operation::forward, c, {}).instruction_set));
  } catch (const Error& e) {
    const BackendInfo cpu = backends()[0];
    const bool clear =
        e.argument() == "KALMANET_ISA" &&
        std::string(e.what()).find(std::getenv("KALMANET_ISA")) != std::string::npos &&
        !cpu.available && cpu.detail == e.what();
    _exit(clear ? 50 : 51);
  }
}

TEST(Backends, FollowTheEnvironmentVariable) {
  for (InstructionSet isa : available_instruction_sets()) {
    EXPECT_EQ(in_new_process(name(isa)), 10 + static_cast<int>(isa)) << name(isa);
  }
  EXPECT_EQ(in_new_process(""), 10 + static_cast<int>(available_instruction_sets().back()));
  EXPECT_EQ(in_new_process("sse9"), 50);
  EXPECT_EQ(in_new_process("AVX2"), 50) << "names are lower case";
}

}  // namespace
}  // namespace kalmanet
