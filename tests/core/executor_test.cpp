// The library's own threads: every task once, nested runs, exceptions, thread counts, forks.
#include "kalmanet/executor.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kalmanet/error.hpp"

namespace kalmanet {
namespace {

// Restores the number of threads that the process had.
struct Executors : ::testing::Test {
  int before = num_threads();
  ~Executors() override { set_num_threads(before); }
};

TEST_F(Executors, RunEveryTaskOnce) {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    EXPECT_EQ(num_threads(), threads);
    EXPECT_EQ(default_executor().concurrency(), threads);
    for (int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> count(static_cast<size_t>(n));
      default_executor().run(n, [&](int64_t i) { ++count[static_cast<size_t>(i)]; });
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(count[static_cast<size_t>(i)], 1)
            << threads << " threads, task " << i << '/' << n;
      }
    }
  }
}

// How many of n tasks were seen running at the same time: each waits until all have begun, which
// only n threads at once can bring about, or until patience is over.
int tasks_at_once(int n) {
  std::atomic<int> begun{0};
  std::atomic<bool> over{false};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  default_executor().run(n, [&](int64_t) {
    ++begun;
    while (begun < n && !over) {
      if (std::chrono::steady_clock::now() > deadline) over = true;
      std::this_thread::yield();
    }
    if (begun < n) begun = -n;  // the rest run when it is too late
  });
  return begun;
}

TEST_F(Executors, UseSeveralThreadsAtTheSameTime) {
  set_num_threads(3);
  EXPECT_EQ(tasks_at_once(3), 3);
}

TEST_F(Executors, ManyShortJobsInARow) {
  set_num_threads(4);
  std::atomic<int64_t> sum{0};
  for (int job = 0; job < 20000; ++job) {
    default_executor().run(5, [&](int64_t i) { sum += i; });
  }
  EXPECT_EQ(sum, 20000 * 10);
}

TEST_F(Executors, NestedRunsStayOnTheirThread) {
  set_num_threads(4);
  std::atomic<int> wrong{0}, inner{0};
  default_executor().run(16, [&](int64_t) {
    const auto me = std::this_thread::get_id();
    default_executor().run(10, [&](int64_t) {
      ++inner;
      if (std::this_thread::get_id() != me) ++wrong;
      default_executor().run(2, [&](int64_t) {
        if (std::this_thread::get_id() != me) ++wrong;
      });
    });
  });
  EXPECT_EQ(inner, 160);
  EXPECT_EQ(wrong, 0);
}

TEST_F(Executors, RethrowWhatATaskThrows) {
  for (int threads : {1, 4}) {
    set_num_threads(threads);
    for (int64_t bad : {0, 3, 99}) {
      try {
        default_executor().run(100, [&](int64_t i) {
          if (i == bad) throw std::runtime_error("task " + std::to_string(i));
        });
        FAIL() << "no exception, " << threads << " threads";
      } catch (const std::runtime_error& e) {
        EXPECT_EQ(e.what(), "task " + std::to_string(bad));
      }
      // The pool still works.
      std::atomic<int> count{0};
      default_executor().run(10, [&](int64_t) { ++count; });
      EXPECT_EQ(count, 10);
    }
    // All of them throw: one arrives, nothing hangs.
    EXPECT_THROW(default_executor().run(50, [](int64_t) { throw 1; }), int);
  }
}

TEST_F(Executors, ServeSeveralCallersAtOnce) {
  set_num_threads(3);
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int job = 0; job < 2000; ++job) {
        default_executor().run(7, [&](int64_t i) { sum += i; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 4 * 2000 * 21);
}

TEST_F(Executors, WorkInAForkedChild) {
  set_num_threads(3);
  default_executor().run(10, [](int64_t) {});
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a hang becomes a death
    std::atomic<int> count{0};
    default_executor().run(1000, [&](int64_t) { ++count; });
    _exit(count == 1000 && tasks_at_once(3) == 3 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

TEST_F(Executors, PoolsOfTheirOwn) {
  set_num_threads(2);
  const auto three = make_executor(3);
  const auto one = make_executor(1);
  EXPECT_EQ(three->concurrency(), 3);
  EXPECT_EQ(one->concurrency(), 1);
  EXPECT_EQ(num_threads(), 2) << "the process-wide pool stays as it is";
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (Executor* pool : {three.get(), one.get(), &default_executor()}) {
    callers.emplace_back([&sum, pool] {
      for (int job = 0; job < 500; ++job) pool->run(7, [&](int64_t i) { sum += i; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 3 * 500 * 21);
  // A task of one pool that asks another to spread work does it itself.
  std::atomic<int> wrong{0};
  three->run(8, [&](int64_t) {
    const auto me = std::this_thread::get_id();
    default_executor().run(4, [&](int64_t) { wrong += std::this_thread::get_id() != me; });
  });
  EXPECT_EQ(wrong, 0);
  for (int n : {0, -1, 1025}) EXPECT_THROW(make_executor(n), Error) << n;
}

TEST_F(Executors, APoolSurvivesAFork) {
  auto pool = make_executor(3);
  pool->run(10, [](int64_t) {});
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    pool.reset();  // its threads are the parent's
    auto another = make_executor(2);
    std::atomic<int> count{0};
    another->run(100, [&](int64_t) { ++count; });
    _exit(count == 100 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

TEST_F(Executors, RefuseBadThreadCounts) {
  for (int n : {0, -1, 1025}) {
    try {
      set_num_threads(n);
      FAIL() << n;
    } catch (const Error& e) {
      EXPECT_EQ(e.argument(), "num_threads");
      EXPECT_EQ(e.code(), ErrorCode::invalid_argument);
      EXPECT_NE(std::string(e.what()).find(std::to_string(n)), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find("1..1024"), std::string::npos) << e.what();
    }
  }
  set_num_threads(2);
  std::atomic<int> errors{0};
  default_executor().run(2, [&](int64_t) {
    try {
      set_num_threads(3);
    } catch (const Error&) {
      ++errors;
    }
  });
  EXPECT_EQ(errors, 2);
  EXPECT_EQ(num_threads(), 2);
}

// The environment is read once a process, so each value gets its own: this test program again.
int in_new_process(const char* value) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    setenv("KALMANET_NUM_THREADS", value, 1);
    execl("/proc/self/exe", "core_test", "--gtest_filter=EnvironmentProbe.DISABLED_Exit",
          "--gtest_also_run_disabled_tests", "--gtest_brief=1", static_cast<char*>(nullptr));
    _exit(99);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// 100 + threads, or 50 for an Error that names the variable and its value.
TEST(EnvironmentProbe, DISABLED_Exit) {
  try {
    const int n = num_threads();
    _exit(100 + n);
  } catch (const Error& e) {
    const std::string value = std::getenv("KALMANET_NUM_THREADS");
    const bool clear = e.argument() == "KALMANET_NUM_THREADS" &&
                       std::string(e.what()).find("\"" + value + "\"") != std::string::npos;
    _exit(clear ? 50 : 51);
  }
}

TEST(Environment, NumThreads) {
  EXPECT_EQ(in_new_process("1"), 101);
  EXPECT_EQ(in_new_process("5"), 105);
  for (const char* bad : {"0", "-2", "many", "3x", "1.5", "99999999999999999999", "2000", " 2"}) {
    EXPECT_EQ(in_new_process(bad), 50) << '"' << bad << '"';
  }
  EXPECT_GE(in_new_process(""), 101) << "empty counts as unset";
}

}  // namespace
}  // namespace kalmanet
