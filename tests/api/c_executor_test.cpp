// Threads of the C ABI: pools, and callbacks of every temper. A well-behaved callback changes no
// bit; whatever another one does wrong is noticed and named.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "api/c_call.hpp"
#include "api/c_structs.hpp"
#include "kalmanet/kalmanet.hpp"

namespace kalmanet {
namespace {

using testing::Case;
using testing::CaseSpec;
using testing::CPlan;
using testing::describe;
using testing::fails;
using testing::ok;

CaseSpec problem() {
  CaseSpec spec;
  spec.B = 2;
  spec.T = 70;
  spec.H = 3;
  spec.K = 20;
  spec.V = 12;
  spec.g = spec.gk = spec.alpha = spec.h0 = spec.u0 = true;
  return spec;
}

// A callback as a C++ function, with what it saw.
struct Host {
  std::function<int32_t(int64_t n, kalmanet_task task, void* task_data)> body;
  std::atomic<int64_t> runs{0}, tasks{0};

  static int32_t run(void* user_data, int64_t n, kalmanet_task task, void* task_data) {
    Host& host = *static_cast<Host*>(user_data);
    ++host.runs;
    host.tasks += n;
    return host.body(n, task, task_data);
  }
  kalmanet_executor_callbacks callbacks(int32_t concurrency) {
    kalmanet_executor_callbacks c = KALMANET_EXECUTOR_CALLBACKS_INIT;
    c.concurrency = concurrency;
    c.run = &Host::run;
    c.user_data = this;
    return c;
  }
};

struct CExecutor {
  kalmanet_executor* executor = nullptr;
  ~CExecutor() { kalmanet_executor_destroy(executor); }
};

kalmanet_gka_options with(kalmanet_executor* executor) {
  kalmanet_gka_options options = KALMANET_GKA_OPTIONS_INIT;
  options.executor = executor;
  return options;
}

void expect_bits_of_one_thread(const kalmanet_gka_plan* plan, const std::string& how) {
  for (int64_t T : {int64_t{1}, int64_t{70}, int64_t{400}}) {
    CaseSpec spec = problem();
    spec.T = T;
    if (T == 400) spec.B = spec.H = 1;  // few heads: cut into segments
    Case<float> expected(spec), c(spec), stepped(spec);
    GkaOptions options;
    const std::unique_ptr<Executor> one = make_executor(1);
    options.executor = one.get();
    gka_forward(expected.inputs(), expected.outputs(), options);
    gka_backward(expected.inputs(), {}, expected.output_grads(), expected.grads(), options);
    ASSERT_TRUE(ok(testing::c_forward(plan, c))) << how;
    ASSERT_TRUE(ok(testing::c_backward(plan, c, nullptr, false))) << how;
    const auto same = [&](const char* t, const ConstView& got, const ConstView& want) {
      EXPECT_TRUE(testing::identical({how, "", describe(spec)}, t, got, want));
    };
    testing::for_each_output(c, expected, same);
    testing::for_each_gradient(c, expected, same);
    Case<float> expected_step(spec);
    gka_step(expected_step.inputs(), expected_step.outputs(), options);
    ASSERT_TRUE(ok(testing::c_step(plan, stepped))) << how;
    testing::for_each_output(stepped, expected_step, same);
  }
}

TEST(CExecutors, PoolsOfTheirOwn) {
  for (int32_t threads : {1, 2, 5}) {
    CExecutor e;
    ASSERT_TRUE(ok(kalmanet_executor_create_pool(threads, &e.executor)));
    const CPlan plan(with(e.executor));
    expect_bits_of_one_thread(plan.plan, std::to_string(threads) + " threads of its own");
  }
  CExecutor none;
  for (int32_t bad : {0, -1, 1025}) {
    EXPECT_TRUE(fails(kalmanet_executor_create_pool(bad, &none.executor), KALMANET_INVALID_ARGUMENT,
                      "num_threads", "must be in 1..1024"));
    EXPECT_EQ(none.executor, nullptr);
  }
  EXPECT_TRUE(fails(kalmanet_executor_create_pool(2, nullptr), KALMANET_INVALID_ARGUMENT,
                    "executor", "null"));
}

TEST(CExecutors, TheProcessWidePool) {
  int32_t before = 0, now = 0;
  ASSERT_TRUE(ok(kalmanet_get_num_threads(&before)));
  ASSERT_TRUE(ok(kalmanet_set_num_threads(3)));
  ASSERT_TRUE(ok(kalmanet_get_num_threads(&now)));
  EXPECT_EQ(now, 3);
  EXPECT_EQ(num_threads(), 3);
  const CPlan plan;
  expect_bits_of_one_thread(plan.plan, "3 threads of the process");
  EXPECT_TRUE(
      fails(kalmanet_set_num_threads(0), KALMANET_INVALID_ARGUMENT, "num_threads", "got 0"));
  EXPECT_TRUE(
      fails(kalmanet_get_num_threads(nullptr), KALMANET_INVALID_ARGUMENT, "num_threads", "null"));
  ASSERT_TRUE(ok(kalmanet_set_num_threads(before)));
}

TEST(CExecutors, CallbacksThatKeepTheirWord) {
  const auto in_order = [](int64_t n, kalmanet_task task, void* data) {
    for (int64_t i = 0; i < n; ++i) task(data, i);
    return 0;
  };
  const auto reversed = [](int64_t n, kalmanet_task task, void* data) {
    for (int64_t i = n - 1; i >= 0; --i) task(data, i);
    return 0;
  };
  const auto a_thread_each = [](int64_t n, kalmanet_task task, void* data) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < n; ++i) threads.emplace_back([=] { task(data, i); });
    for (std::thread& thread : threads) thread.join();
    return 0;
  };
  // Other threads only: the caller's waits.
  const auto three_threads = [](int64_t n, kalmanet_task task, void* data) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        for (int64_t i; (i = next++) < n;) task(data, n - 1 - i);
      });
    }
    for (std::thread& thread : threads) thread.join();
    return 0;
  };
  using Body = decltype(Host::body);
  const std::vector<std::pair<std::string, Body>> bodies = {{"in order", in_order},
                                                            {"reversed", reversed},
                                                            {"a thread each", a_thread_each},
                                                            {"three threads", three_threads}};
  for (const auto& [how, body] : bodies) {
    for (int32_t concurrency : {1, 4}) {
      Host host;
      host.body = body;
      const kalmanet_executor_callbacks callbacks = host.callbacks(concurrency);
      CExecutor e;
      ASSERT_TRUE(ok(kalmanet_executor_create_callback(&callbacks, &e.executor)));
      const CPlan plan(with(e.executor));
      expect_bits_of_one_thread(plan.plan, how + ", concurrency " + std::to_string(concurrency));
      EXPECT_GT(host.runs, 0);
      EXPECT_GT(host.tasks, host.runs) << "there was work to spread";
    }
  }
}

TEST(CExecutors, APlanKeepsItsExecutor) {
  Host host;
  host.body = [](int64_t n, kalmanet_task task, void* data) {
    for (int64_t i = 0; i < n; ++i) task(data, i);
    return 0;
  };
  const kalmanet_executor_callbacks callbacks = host.callbacks(2);
  kalmanet_executor* executor = nullptr;
  ASSERT_TRUE(ok(kalmanet_executor_create_callback(&callbacks, &executor)));
  const CPlan a(with(executor)), b(with(executor));
  kalmanet_executor_destroy(executor);  // before its plans
  kalmanet_executor_destroy(nullptr);
  expect_bits_of_one_thread(a.plan, "a destroyed executor");
  expect_bits_of_one_thread(b.plan, "a destroyed executor");
}

// What a task spreads runs on its own thread; the callback is not entered a second time.
TEST(CExecutors, NestedRunsStayOnTheirThread) {
  Host host;
  host.body = [](int64_t n, kalmanet_task task, void* data) {
    for (int64_t i = 0; i < n; ++i) std::thread([=] { task(data, i); }).join();
    return 0;
  };
  const kalmanet_executor_callbacks callbacks = host.callbacks(4);
  CExecutor e;
  ASSERT_TRUE(ok(kalmanet_executor_create_callback(&callbacks, &e.executor)));
  Executor& executor = *e.executor->executor;
  int inner = 0;
  executor.run(3, [&](int64_t) {
    const auto me = std::this_thread::get_id();
    executor.run(5, [&](int64_t) { inner += std::this_thread::get_id() == me ? 1 : 100; });
  });
  EXPECT_EQ(inner, 15);
  EXPECT_EQ(host.runs, 1);
  executor.run(0, [](int64_t) { FAIL(); });
  EXPECT_EQ(host.runs, 1);
}

// One plan, two calls at the same time.
TEST(CExecutors, APlanMayBeUsedFromSeveralThreads) {
  CExecutor e;
  ASSERT_TRUE(ok(kalmanet_executor_create_pool(2, &e.executor)));
  const CPlan plan(with(e.executor));
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] { expect_bits_of_one_thread(plan.plan, "several callers"); });
  }
  for (std::thread& caller : callers) caller.join();
}

struct BadHost {
  const char* what;
  decltype(Host::body) body;
  kalmanet_status status;
  const char* part;
};

TEST(CExecutors, CallbacksThatDoNot) {
  const auto all = [](int64_t n, kalmanet_task task, void* data) {
    for (int64_t i = 0; i < n; ++i) task(data, i);
  };
  const std::vector<BadHost> hosts = {
      {"returns an error at once", [](int64_t, kalmanet_task, void*) { return 42; },
       KALMANET_CALLBACK_FAILED, "run: returned 42 (0 of 6 tasks were run)"},
      {"returns an error in the end",
       [=](int64_t n, kalmanet_task task, void* data) {
         all(n, task, data);
         return -1;
       },
       KALMANET_CALLBACK_FAILED, "run: returned -1 (6 of 6 tasks were run)"},
      {"does nothing", [](int64_t, kalmanet_task, void*) { return 0; }, KALMANET_CALLBACK_FAILED,
       "run: returned when 0 of 6 tasks were done"},
      {"forgets the last",
       [=](int64_t n, kalmanet_task task, void* data) {
         all(n - 1, task, data);
         return 0;
       },
       KALMANET_CALLBACK_FAILED, "run: returned when 5 of 6 tasks were done"},
      {"does the first twice and forgets the last",
       [=](int64_t n, kalmanet_task task, void* data) {
         all(n - 1, task, data);
         task(data, 0);
         return 0;
       },
       KALMANET_CALLBACK_FAILED, "run: called task 0 twice"},
      {"does one too many",
       [=](int64_t n, kalmanet_task task, void* data) {
         all(n + 1, task, data);
         return 0;
       },
       KALMANET_CALLBACK_FAILED, "run: called task 6 of a job of 6"},
      {"begins before the first",
       [=](int64_t n, kalmanet_task task, void* data) {
         task(data, -1);
         all(n, task, data);
         return 0;
       },
       KALMANET_CALLBACK_FAILED, "run: called task -1 of a job of 6"},
      {"throws", [](int64_t, kalmanet_task, void*) -> int32_t { throw std::runtime_error("hm"); },
       KALMANET_INTERNAL, "hm"},
      {"throws a number", [](int64_t, kalmanet_task, void*) -> int32_t { throw 5; },
       KALMANET_INTERNAL, "unknown type"},
      {"runs out of memory",
       [](int64_t, kalmanet_task, void*) -> int32_t { throw std::bad_alloc(); },
       KALMANET_OUT_OF_MEMORY, "out of memory"},
  };
  for (const BadHost& bad : hosts) {
    Host host;
    host.body = bad.body;
    const kalmanet_executor_callbacks callbacks = host.callbacks(1);
    CExecutor e;
    ASSERT_TRUE(ok(kalmanet_executor_create_callback(&callbacks, &e.executor)));
    const CPlan plan(with(e.executor));
    Case<float> c(problem());
    EXPECT_EQ(testing::c_forward(plan.plan, c), bad.status) << bad.what;
    EXPECT_NE(std::string(kalmanet_last_error()).find(bad.part), std::string::npos)
        << bad.what << ": \"" << kalmanet_last_error() << '"';
    // The same plan works as soon as its callback does.
    host.body = [=](int64_t n, kalmanet_task task, void* data) {
      all(n, task, data);
      return 0;
    };
    expect_bits_of_one_thread(plan.plan, std::string("after a callback that ") + bad.what);
  }
}

TEST(CExecutors, BadCallbacksAreRefusedAtOnce) {
  Host host;
  CExecutor none;
  const auto refused = [&](auto change, const char* argument, const char* part) {
    kalmanet_executor_callbacks callbacks = host.callbacks(2);
    change(callbacks);
    EXPECT_TRUE(fails(kalmanet_executor_create_callback(&callbacks, &none.executor),
                      KALMANET_INVALID_ARGUMENT, argument, part));
    EXPECT_EQ(none.executor, nullptr);
  };
  using C = kalmanet_executor_callbacks;
  refused([](C& c) { c.run = nullptr; }, "run", "null");
  refused([](C& c) { c.concurrency = 0; }, "concurrency", "got 0");
  refused([](C& c) { c.concurrency = 100000; }, "concurrency", "got 100000");
  refused([](C& c) { c.struct_size = 12; }, "callbacks", "struct_size is 12");
  EXPECT_TRUE(fails(kalmanet_executor_create_callback(nullptr, &none.executor),
                    KALMANET_INVALID_ARGUMENT, "callbacks", "null"));
  const kalmanet_executor_callbacks callbacks = host.callbacks(1);
  EXPECT_TRUE(fails(kalmanet_executor_create_callback(&callbacks, nullptr),
                    KALMANET_INVALID_ARGUMENT, "executor", "null"));
}

}  // namespace
}  // namespace kalmanet
